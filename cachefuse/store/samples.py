"""The samples of a store: ids, splits, targets, which modalities they have, and which rows of features are theirs."""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import zarr

from cachefuse.data.manifest import Manifest
from cachefuse.errors import CacheError, ConfigError
from cachefuse.store.columns import BAD_SAMPLES, column_checksum, read_about, read_column
from cachefuse.store.format import FORMAT, append_lines, read_lines, unseal


@dataclass(frozen=True)
class BadSample:
    """A line of the ledger: a sample that a modality had to do without, and why."""

    id: str
    modality: str
    source: str
    reason: str


class StoredSamples:
    """A dataset's samples as a store has them; nothing but their number is read before it is asked for."""

    def __init__(self, path: Path) -> None:
        if not (path / "zarr.json").is_file():
            raise CacheError(f"no feature store at {path}; run cachefuse extract first")
        self.path = path
        try:
            declared: Any = json.loads((path / "zarr.json").read_bytes())
            meta = declared.get("attributes", {}).get("cachefuse", {})
            found = meta.get("format")
        except (ValueError, AttributeError) as error:
            raise CacheError(f"{path} is damaged: its zarr.json can't be read; run cachefuse extract again") from error
        if found != FORMAT:
            raise CacheError(f"{path} is not a feature store of this version (format {found}, not {FORMAT})")
        self._meta = unseal(meta, path / "zarr.json")
        if not (path / "samples").is_dir():
            raise CacheError(f"{path} was being updated when it was interrupted; run cachefuse extract again to go on")
        self._bad: dict[tuple[str, str], BadSample] = {}
        for line in read_lines(path / "samples" / BAD_SAMPLES):
            bad = BadSample(**{name: str(line.get(name, "")) for name in ("id", "modality", "source", "reason")})
            self._bad[(bad.modality, bad.id)] = bad
        self.n_bad = Counter(modality for modality, _ in self._bad)

    def __len__(self) -> int:
        return int(read_about(self.path)["rows"])

    @cached_property
    def ids(self) -> np.ndarray:
        """(N,) strings."""
        return self._column("id")

    @cached_property
    def splits(self) -> np.ndarray:
        """(N,) strings."""
        return self._column("split")

    @cached_property
    def targets(self) -> np.ndarray:
        """(N, C) int8 for multi-label, (N,) int32 for classes, -1 where unlabelled; (N,) float32 for scores, or NaN.

        Of visual question answering (N, 10) int32, the classes of the answers given: -2 for one that is no class, -1
        where there is none.
        """
        return self._column("target")

    @cached_property
    def digests(self) -> np.ndarray:
        """(N,) strings: each sample's digest of its content, empty in a store that has none."""
        known = "digest" in read_about(self.path)["columns"]
        return self._column("digest") if known else np.full(len(self), "")

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

    @cached_property
    def modalities(self) -> tuple[str, ...]:
        """The modalities that the dataset has."""
        names = read_about(self.path)["columns"]
        return tuple(sorted(name.removeprefix("present/") for name in names if name.startswith("present/")))

    def present(self, modality: str) -> np.ndarray:
        """Return (N,) bool: which samples have this modality."""
        return self._column(f"present/{modality}") if modality in self.modalities else np.zeros(len(self), bool)

    def items(self, modality: str) -> np.ndarray | None:
        """Return (N + 1,) offsets of each sample's items where a sample has several (captions), else None.

        Raises ConfigError where samples share rows instead, which ``feature_rows`` gives: whoever asks for items would
        take one row for another's.
        """
        if self.shared_rows(modality) is not None:
            raise ConfigError(f"several samples of {self.dataset} are about one {modality}, and this reads one of each")
        name = f"items/{modality}"
        return self._column(name) if name in read_about(self.path)["columns"] else None

    def has_several(self, modality: str) -> bool:
        """Return whether a sample has several items (captions) of this modality."""
        return f"items/{modality}" in read_about(self.path)["columns"]

    def shared_rows(self, modality: str) -> np.ndarray | None:
        """Return (N,) the feature row of each sample where samples share them (questions about one image), else None.

        Rows are numbered as they first occur.
        """
        name = f"rows/{modality}"
        return self._column(name) if name in read_about(self.path)["columns"] else None

    def feature_rows(self, modality: str, samples: np.ndarray | None = None) -> np.ndarray:
        """Return which row of a modality's features each sample reads, (N,) int64, or (n,) of some samples (n,).

        It is the sample's own number, but where samples share rows. Raises ConfigError where a sample has several rows
        (captions), which ``items`` gives.
        """
        shared = self.shared_rows(modality)
        if shared is None and self.items(modality) is not None:
            raise ConfigError(f"{self.dataset} has several {modality}s a sample, and this reads one of each")
        rows = np.arange(len(self)) if shared is None else shared
        return rows if samples is None else rows[samples]

    def n_items(self, modality: str) -> int:
        """Return the number of rows in this modality's features."""
        return self._rows_before(modality, len(self))

    def sample_of(self, modality: str, row: int) -> str:
        """Return the id of the sample, or of the first, that a row of a modality's features belongs to."""
        shared = self.shared_rows(modality)
        if shared is not None:
            return str(self.ids[int((shared == row).argmax())])
        offsets = self.items(modality)
        return str(self.ids[row if offsets is None else int(np.searchsorted(offsets, row, side="right")) - 1])

    def present_rows(self, modality: str) -> np.ndarray:
        """Return which rows of a modality's features are those of samples that have it, (n_items,) bool."""
        present, shared = self.present(modality), self.shared_rows(modality)
        if shared is not None:
            rows = np.zeros(self.n_items(modality), bool)
            rows[shared[present]] = True
            return rows
        offsets = self.items(modality)
        return present if offsets is None else np.repeat(present, np.diff(offsets))

    def appended_at(self, modality: str) -> tuple[int, ...]:
        """Return the feature rows at which samples were appended to a store that was there, ascending."""
        return tuple(self._rows_before(modality, sample) for sample in read_about(self.path)["appended_at"])

    def _rows_before(self, modality: str, sample: int) -> int:
        """Return how many feature rows the samples before one have."""
        shared = self.shared_rows(modality)
        if shared is not None:
            return int(shared[:sample].max(initial=-1)) + 1
        offsets = self.items(modality)
        return int(sample if offsets is None else offsets[sample])

    def mark_bad(self, bad: Sequence[BadSample]) -> None:
        """Note samples in the ledger, each once; ``update_present`` then marks their modality absent."""
        new = {(line.modality, line.id): line for line in bad if (line.modality, line.id) not in self._bad}
        if new:
            append_lines(self.path / "samples" / BAD_SAMPLES, [vars(line) for line in new.values()])
            self._bad.update(new)
            self.n_bad.update(modality for modality, _ in new)

    def update_present(self, modality: str) -> None:
        """Mark a modality absent where the ledger lists it."""
        bad = np.array([(modality, sample) in self._bad for sample in self.ids], bool)
        present = self.present(modality)
        if (present & bad).any():
            array: Any = zarr.open_array(self.path / "samples" / "present" / modality, mode="r+")
            array[:] = present & ~bad
            array.attrs["checksum"] = column_checksum(present & ~bad)

    def bad_samples(self) -> list[BadSample]:
        """Return the samples that had to do without a modality."""
        return list(self._bad.values())

    def _column(self, name: str) -> np.ndarray:
        try:
            return read_column(self.path, name)
        except Exception as error:  # whatever zarr-python raises on files that were cut short or changed
            raise CacheError(
                f"{self.path}/samples/{name} is damaged ({error}); run the same cachefuse extract again"
            ) from error
