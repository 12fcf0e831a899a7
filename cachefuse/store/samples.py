"""The samples of a store: ids, splits, targets, the modalities that each sample has, and its rows of features."""

import json
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import zarr

from cachefuse.data.answers import EVALUATION
from cachefuse.data.manifest import VQA, Manifest
from cachefuse.errors import CacheError, ConfigError
from cachefuse.files import JsonObject, read_bounded
from cachefuse.store.columns import BAD_SAMPLES, KIND, column_checksum, n_listed, read_about, read_column
from cachefuse.store.format import FORMAT, MAX_METADATA, append_lines, n_damaged_lines, read_lines, unseal


@dataclass(frozen=True)
class BadSample:
    """A sample whose image or text is unusable, and the reason: one line of the list of bad samples."""

    id: str
    modality: str
    source: str
    reason: str


class StoredSamples:
    """A dataset's samples in a store. Arrays are read on first use."""

    def __init__(self, path: Path) -> None:
        if not os.path.lexists(path / "zarr.json"):
            raise CacheError(f"no feature store at {path}; run cachefuse extract first")
        self.path = path
        try:
            declared = json.loads(read_bounded(path / "zarr.json", MAX_METADATA))
            meta = declared.get("attributes", {}).get("cachefuse", {})
            version = meta.get("format")
        except (OSError, ValueError, AttributeError, RecursionError) as error:
            raise CacheError(
                f"{path} is damaged: its zarr.json cannot be read ({error}); run cachefuse extract again"
            ) from error
        if version != FORMAT:
            raise CacheError(f"{path} is not a feature store of this version (format {version}, not {FORMAT})")
        self._meta = unseal(meta, path / "zarr.json")
        if not (path / "samples").is_dir():
            raise CacheError(f"an update of {path} was interrupted; run cachefuse extract again to go on")
        self._bad: dict[tuple[str, str], BadSample] = {}
        for line in self._lines():
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
        """(N, C) int8 for multi-label, (N,) int32 for classes, (N,) float32 for scores; unlabelled is -1 or NaN.

        For visual question answering (N, 10) int32, the classes of the ten answers: see ``encode_answers``.
        """
        return self._column("target")

    @cached_property
    def digests(self) -> np.ndarray:
        """(N,) strings: the digest of each sample's content, or "" in a store without digests."""
        known = "digest" in read_about(self.path)["columns"]
        return self._column("digest") if known else np.full(len(self), "")

    @cached_property
    def content(self) -> np.ndarray:
        """(N,) numbers that samples of equal content share, by their digests; -1 for one without content or digest."""
        has_any = np.zeros(len(self), bool)
        for modality in self.modalities:
            has_any |= self.present(modality)
        numbers: dict[str, int] = {"": -1}
        content = [numbers.setdefault(digest, len(numbers) - 1) for digest in self.digests.tolist()]
        return np.where(has_any, np.array(content, np.int64), -1)

    @cached_property
    def groups(self) -> np.ndarray | None:
        """(N,) strings: the name of each sample's group, "" for a sample of its own; None without groups."""
        return self._column("group") if "group" in read_about(self.path)["columns"] else None

    @property
    def dataset(self) -> str:
        return str(self._meta["dataset"])

    @property
    def classes(self) -> tuple[str, ...]:
        return tuple(self._meta["classes"])

    @property
    def measures_answers(self) -> bool:
        """Whether VQA accuracy can be measured; True for other tasks. False in stores of an older version."""
        return self.manifest.task != VQA or self._meta.get("answers") == EVALUATION

    @cached_property
    def kinds(self) -> dict[str, np.ndarray]:
        """Kinds of samples by name, such as "answer_type": (N,) strings, "" in samples without one."""
        names = [name for name in read_about(self.path)["columns"] if name.startswith(KIND)]
        return {name.removeprefix(KIND): self._column(name) for name in names}

    @property
    def extracted(self) -> str:
        """When extract last brought this store up to date (ISO 8601, UTC)."""
        return str(self._meta["extracted"])

    @property
    def manifest(self) -> Manifest:
        return Manifest.model_validate(self._meta["manifest"])

    @cached_property
    def modalities(self) -> tuple[str, ...]:
        """The modalities of the dataset."""
        names = read_about(self.path)["columns"]
        return tuple(sorted(name.removeprefix("present/") for name in names if name.startswith("present/")))

    def present(self, modality: str) -> np.ndarray:
        """Return (N,) bool: which samples have this modality."""
        return self._column(f"present/{modality}") if modality in self.modalities else np.zeros(len(self), bool)

    def items(self, modality: str) -> np.ndarray | None:
        """Return (N + 1,) offsets of each sample's items if a sample has several (captions), else None.

        Raises ConfigError if samples share rows: then ``feature_rows`` is what the caller needs.
        """
        if self.shared_rows(modality) is not None:
            raise ConfigError(f"{self.dataset} has several samples per {modality}, but here each sample needs its own")
        name = f"items/{modality}"
        return self._column(name) if name in read_about(self.path)["columns"] else None

    def has_several(self, modality: str) -> bool:
        """Whether samples have several items (captions) of this modality."""
        return f"items/{modality}" in read_about(self.path)["columns"]

    def shared_rows(self, modality: str) -> np.ndarray | None:
        """Return (N,) the feature row of each sample if samples share rows (questions about one image), else None.

        Rows are numbered in order of first use.
        """
        name = f"rows/{modality}"
        return self._column(name) if name in read_about(self.path)["columns"] else None

    def feature_rows(self, modality: str, samples: np.ndarray | None = None) -> np.ndarray:
        """Return the row of a modality's features that each sample reads, (N,) int64, or (n,) for ``samples`` (n,).

        It is the sample's own number, unless samples share rows. Raises ConfigError if samples have several rows
        (captions): ``items`` gives those.
        """
        shared = self.shared_rows(modality)
        if shared is None and self.items(modality) is not None:
            raise ConfigError(f"{self.dataset} has several {modality}s per sample, but this reads one")
        rows = np.arange(len(self)) if shared is None else shared
        return rows if samples is None else rows[samples]

    def n_items(self, modality: str) -> int:
        """Return the number of rows in this modality's features."""
        return self._rows_before(modality, len(self))

    def sample_of(self, modality: str, row: int) -> str:
        """Return the id of the (first) sample that a row of a modality's features belongs to."""
        shared = self.shared_rows(modality)
        if shared is not None:
            return str(self.ids[int((shared == row).argmax())])
        offsets = self.items(modality)
        return str(self.ids[row if offsets is None else int(np.searchsorted(offsets, row, side="right")) - 1])

    def present_rows(self, modality: str) -> np.ndarray:
        """Return which rows of a modality's features belong to samples that have it, (n_items,) bool."""
        present, shared = self.present(modality), self.shared_rows(modality)
        if shared is not None:
            rows = np.zeros(self.n_items(modality), bool)
            rows[shared[present]] = True
            return rows
        offsets = self.items(modality)
        return present if offsets is None else np.repeat(present, np.diff(offsets))

    def appended_at(self, modality: str) -> tuple[int, ...]:
        """Return the feature rows at which later calls appended samples, ascending."""
        return tuple(self._rows_before(modality, sample) for sample in read_about(self.path)["appended_at"])

    def _rows_before(self, modality: str, sample: int) -> int:
        """Return the number of feature rows of all samples before the given one."""
        shared = self.shared_rows(modality)
        if shared is not None:
            return int(shared[:sample].max(initial=-1)) + 1
        offsets = self.items(modality)
        return int(sample if offsets is None else offsets[sample])

    def mark_bad(self, bad: Sequence[BadSample]) -> None:
        """Add samples to the list of bad samples, each once. ``update_present`` then marks their modality absent."""
        new = {(line.modality, line.id): line for line in bad if (line.modality, line.id) not in self._bad}
        if new:
            append_lines(self.path / "samples" / BAD_SAMPLES, [vars(line) for line in new.values()])
            self._bad.update(new)
            self.n_bad.update(modality for modality, _ in new)

    def update_present(self, modality: str) -> None:
        """Mark a modality absent in the samples that are listed as bad."""
        bad = np.array([(modality, sample) in self._bad for sample in self.ids], bool)
        present, n_bad = self.present(modality), self.n_bad[modality]
        if (present & bad).any() or n_listed(self.path, modality) < n_bad:
            array = zarr.open_array(self.path / "samples" / "present" / modality, mode="r+", zarr_format=3)
            array[:] = present & ~bad
            array.update_attributes({"checksum": column_checksum(present & ~bad), "listed": n_bad})

    def bad_samples(self, *, whole: bool = True) -> list[BadSample]:
        """Return the samples with an unusable image or text. Raises CacheError if ``whole`` and some lines are lost."""
        if whole and (lost := self.lost_lines()) is not None:
            raise CacheError(f"{self.path}/samples/{BAD_SAMPLES}: {lost}; run cachefuse verify --repair")
        return list(self._bad.values())

    def lost_lines(self) -> str | None:
        """Return what is wrong with the list of bad samples, or None."""
        try:
            damaged = n_damaged_lines(self.path / "samples" / BAD_SAMPLES)
        except CacheError as error:
            return str(error)
        if damaged:
            return f"damaged lines: {damaged:,}"
        with suppress(CacheError):  # where the modalities are lost, they are said to be
            few = [m for m in self.modalities if self.n_bad[m] < n_listed(self.path, m)]
            return f"lines of {few[0]} are lost" if few else None
        return None

    def _lines(self) -> Iterator[JsonObject]:
        with suppress(CacheError):  # ``bad_samples`` tells
            yield from read_lines(self.path / "samples" / BAD_SAMPLES)

    def _column(self, name: str) -> np.ndarray:
        try:
            return read_column(self.path, name)
        except Exception as error:  # zarr-python raises many kinds of errors on changed files
            raise CacheError(
                f"{self.path}/samples/{name} is damaged ({error}); run the same cachefuse extract again"
            ) from error
