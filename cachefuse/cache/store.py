"""The feature store: one Zarr v3 group a dataset, rows aligned across encoders and modalities.

    samples/{id, split, target, digest, present/<modality>, items/<modality>}
    features/<encoder>/<modality>/{pooled, tokens, offsets, journal.jsonl}

A block of rows is the unit of work, of resume and of a file. A row exists if the journal says so: a shard that is
absent would read as zeros, so nothing is read that the journal does not list.
"""

import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import zarr

from cachefuse.cache.features import Features
from cachefuse.cache.journal import append_lines, read_lines
from cachefuse.cache.layout import FORMAT, differing_fields, provenance_key
from cachefuse.cache.samples import (
    LEDGER,
    check_same_rows,
    finish_update,
    sample_columns,
    update_samples,
    write_samples,
)
from cachefuse.data.dataset import Dataset
from cachefuse.data.manifest import Manifest
from cachefuse.errors import CacheError
from cachefuse.runtime import slug


@dataclass(frozen=True)
class BadSample:
    """A line of the ledger: a sample that a modality had to do without, and why."""

    id: str
    modality: str
    source: str
    reason: str


class FeatureStore:
    """A dataset's samples and every feature extracted from them.

    Open an existing store with ``FeatureStore(path)``; make or update one with ``FeatureStore.for_dataset``.
    """

    def __init__(self, path: Path) -> None:
        if not (path / "zarr.json").is_file():
            raise CacheError(f"no feature store at {path}; run cachefuse extract first")
        self.path = path
        try:
            self._root = _open_group(path)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CacheError(f"{path} is damaged: its zarr.json can't be read: {error}") from error
        self._meta: dict[str, Any] = dict(self._root.attrs.get("cachefuse", {}))
        if self._meta.get("format") != FORMAT:
            raise CacheError(
                f"{path} is not a feature store of this version (format {self._meta.get('format')}, not {FORMAT})"
            )
        samples = self._root.get("samples")
        if samples is None:
            raise CacheError(f"{path} was being updated when it was interrupted; run cachefuse extract again to go on")
        self.ids: list[str] = [str(value) for value in samples["id"][:]]
        self.splits = np.array([str(value) for value in samples["split"][:]])
        self.targets: np.ndarray = samples["target"][:]
        ledger = (BadSample(**line) for line in read_lines(path / "samples" / LEDGER))
        self._bad = {(line.modality, line.id): line for line in ledger}
        self.n_bad = Counter(modality for modality, _ in self._bad)

    @classmethod
    def for_dataset(cls, path: Path, dataset: Dataset) -> "FeatureStore":
        """Open or make the store of a dataset, and bring its samples, splits and targets up to date.

        Rows are only ever appended: raises CacheError, naming rows, if stored rows are gone, moved or changed.
        """
        digests = dataset.digests()
        _sweep(path)
        if (path / "zarr.json").is_file():
            finish_update(path)
            columns = sample_columns(dataset, digests, cls(path)._bad)
            check_same_rows(path, columns)
            update_samples(path, columns)
            _open_group(path, "a").attrs["cachefuse"] = _describe(dataset)
        else:  # made beside its place, so that a store is whole from the moment it is there
            path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as temporary:
                new = Path(temporary) / path.name
                zarr.create_group(new, attributes={"cachefuse": _describe(dataset)})
                write_samples(new / "samples", sample_columns(dataset, digests, ()))
                os.replace(new, path)
        return cls(path)

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def dataset(self) -> str:
        return str(self._meta["dataset"])

    @property
    def classes(self) -> tuple[str, ...]:
        return tuple(self._meta["classes"])

    @property
    def extracted(self) -> str:
        """When extract last brought this store up to date (ISO 8601, UTC)."""
        return str(self._meta["extracted"])

    @property
    def manifest(self) -> Manifest:
        return Manifest.model_validate(self._meta["manifest"])

    def present(self, modality: str) -> np.ndarray:
        """Return (N,) bool: which samples have this modality."""
        column = self._root["samples"].get(f"present/{modality}")
        return np.zeros(len(self), bool) if column is None else column[:]

    def items(self, modality: str) -> np.ndarray | None:
        """Return (N + 1,) offsets of each sample's items where a sample has several (captions), else None."""
        offsets = self._root["samples"].get(f"items/{modality}")
        return None if offsets is None else offsets[:]

    def n_items(self, modality: str) -> int:
        """Return the number of rows in this modality's features."""
        offsets = self.items(modality)
        return len(self) if offsets is None else int(offsets[-1])

    def features(self) -> "list[Features]":
        """Return what has been extracted, sorted by encoder and modality."""
        found = []
        for encoder in sorted((self.path / "features").glob("*")):
            for group in sorted(encoder.glob("*")):
                if (group / "zarr.json").is_file():
                    found.append(Features(self, group))
        return found

    def open_features(self, encoder: str, modality: str) -> "Features | None":
        """Return one encoder's features of one modality, or None; ``encoder`` is a spec's short form."""
        path = self.path / "features" / slug(encoder) / modality
        return Features(self, path) if (path / "zarr.json").is_file() else None

    def require_features(self, encoder: str, modality: str, provenance: Mapping[str, str], source: str) -> "Features":
        """Open one encoder's features of one modality, making them if they are new; ``source`` opens the encoder.

        Raises CacheError, listing the fields that differ, if they were made by something else under the same name.
        """
        features = self.open_features(encoder, modality)
        if features is not None and features.key != provenance_key(provenance) and not features.n_written:
            shutil.rmtree(features.path)  # an attempt that wrote nothing stands in nobody's way
            features = None
        if features is None:
            path = self.path / "features" / slug(encoder) / modality
            meta = {
                "encoder": encoder,
                "modality": modality,
                "source": source,
                "key": provenance_key(provenance),
                "provenance": dict(provenance),
                "views": {},
            }
            root = _open_group(self.path, "a")
            root.create_group(f"features/{slug(encoder)}/{modality}", attributes={"cachefuse": meta})
            return Features(self, path)
        if features.key != provenance_key(provenance):
            fields = ", ".join(
                f"{field} ({features.provenance.get(field)} there, {provenance.get(field)} here)"
                for field in differing_fields(features.provenance, provenance)
            )
            raise CacheError(
                f"{self.path} holds {features.encoder} {modality} features that were made differently: {fields}; "
                f"use another --workspace, or delete {features.path} to extract them again"
            )
        return features

    def mark_bad(self, bad: Sequence[BadSample]) -> None:
        """Note samples in the ledger, each once; ``update_present`` then marks their modality absent."""
        new = {(line.modality, line.id): line for line in bad if (line.modality, line.id) not in self._bad}
        if new:
            append_lines(self.path / "samples" / LEDGER, [vars(line) for line in new.values()])
            self._bad.update(new)
            self.n_bad.update(modality for modality, _ in new)

    def update_present(self, modality: str) -> None:
        """Mark a modality absent where the ledger lists it."""
        bad = np.array([(modality, sample) in self._bad for sample in self.ids])
        present = self.present(modality)
        if (present & bad).any():
            _open_group(self.path, "a")["samples"][f"present/{modality}"][:] = present & ~bad

    def ledger(self) -> list[BadSample]:
        """Return the samples that had to do without a modality."""
        return list(self._bad.values())


def _describe(dataset: Dataset) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "dataset": dataset.name,
        "manifest": dataset.manifest.model_dump(mode="json", by_alias=True, exclude_defaults=True),
        "classes": list(dataset.classes),
        "extracted": datetime.now(UTC).isoformat(timespec="milliseconds"),
    }


def _sweep(path: Path) -> None:
    """Remove what a killed process may have left of a store that it was making, or of a file that it was writing."""
    for folder in path.parent.glob(f".{path.name}.*/"):
        shutil.rmtree(folder, ignore_errors=True)
    for file in path.rglob("*.partial"):
        file.unlink(missing_ok=True)


def _open_group(path: Path, mode: Any = "r") -> Any:
    return zarr.open_group(path, mode=mode)
