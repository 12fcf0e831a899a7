"""The feature store: one Zarr v3 group a dataset, rows aligned across encoders and modalities.

    samples/{id, split, target, digest, present/<modality>, items/<modality>}
    features/<encoder>/<modality>/{pooled, tokens, offsets, journal.jsonl}

A block of rows is the unit of work, of resume and of a file. A row exists if the journal says so: a shard that is
absent would read as zeros, so nothing is read that the journal does not list.
"""

import json
import math
import os
import tempfile
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import zarr

from cachefuse.cache.layout import DTYPES, FORMAT, block_rows, chunk_rows, differing_fields, provenance_key
from cachefuse.data.dataset import Dataset
from cachefuse.data.manifest import Manifest
from cachefuse.errors import CacheError
from cachefuse.runtime import slug

JOURNAL = "journal.jsonl"
LEDGER = "bad.jsonl"


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
        self._root = _open_group(path)
        self._meta: dict[str, Any] = dict(self._root.attrs.get("cachefuse", {}))  # type: ignore[arg-type]
        if self._meta.get("format") != FORMAT:
            raise CacheError(
                f"{path} is not a feature store of this version (format {self._meta.get('format')}, not {FORMAT})"
            )
        samples = self._root["samples"]
        self.ids: list[str] = [str(value) for value in samples["id"][:]]
        self.splits = np.array([str(value) for value in samples["split"][:]])
        self.targets: np.ndarray = samples["target"][:]

    @classmethod
    def for_dataset(cls, path: Path, dataset: Dataset) -> "FeatureStore":
        """Open or make the store of a dataset, and bring its samples, splits and targets up to date.

        Rows are only ever appended: raises CacheError, naming rows, if stored rows are gone, moved or changed.
        """
        digests = dataset.digests()
        if (path / "zarr.json").is_file():
            _check_same_rows(cls(path), dataset, digests)
            _write_samples(path, dataset, digests)
        else:  # made beside its place, so that a store is whole from the moment it is there
            path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as temporary:
                _write_samples(Path(temporary) / path.name, dataset, digests)
                os.replace(Path(temporary) / path.name, path)
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
        if features is None:
            path = self.path / "features" / slug(encoder) / modality
            group = _open_group(self.path, "a").require_group(f"features/{slug(encoder)}/{modality}")
            group.attrs["cachefuse"] = {
                "encoder": encoder,
                "modality": modality,
                "source": source,
                "key": provenance_key(provenance),
                "provenance": dict(provenance),
                "views": {},
            }
            return Features(self, path)
        if features.key != provenance_key(provenance):
            fields = ", ".join(
                f"{field} ({features.provenance.get(field)} there, {provenance.get(field)} here)"
                for field in differing_fields(features.provenance, provenance)
            )
            raise CacheError(
                f"{self.path} holds {encoder} {modality} features that were made differently: {fields}; "
                f"use another --workspace, or delete {features.path} to extract them again"
            )
        return features

    def mark_bad(self, bad: Sequence[BadSample]) -> None:
        """Note samples in the ledger and mark their modality absent."""
        known = {(line.modality, line.id) for line in self.ledger()}
        new = [line for line in bad if (line.modality, line.id) not in known]
        if not new:
            return
        _append_lines(self.path / "samples" / LEDGER, [vars(line) for line in new])
        rows = {sample: row for row, sample in enumerate(self.ids)}
        for modality in sorted({line.modality for line in new}):
            column = _open_group(self.path, "a")["samples"][f"present/{modality}"]
            values = column[:]
            values[[rows[line.id] for line in new if line.modality == modality]] = False
            column[:] = values

    def ledger(self) -> list[BadSample]:
        """Return the samples that had to do without a modality."""
        return [BadSample(**line) for line in _read_lines(self.path / "samples" / LEDGER)]


@dataclass(frozen=True)
class View:
    """How one view is stored: a row's shape, rows a block, and whether rows differ in their number of tokens."""

    row_shape: tuple[int, ...]
    block_rows: int
    ragged: bool

    @property
    def empty(self) -> np.ndarray:
        """The row of a sample without this modality: zeros, or no tokens."""
        return np.zeros((0, self.row_shape[-1]) if self.ragged else self.row_shape, np.float32)


class Features:
    """One encoder's features of one modality: views (pooled, tokens) written and read a block of rows at a time."""

    def __init__(self, store: FeatureStore, path: Path) -> None:
        self.store = store
        self.path = path
        self._meta: dict[str, Any] = dict(_open_group(path).attrs["cachefuse"])
        self.encoder: str = self._meta["encoder"]
        self.modality: str = self._meta["modality"]
        self.source: str = self._meta["source"]
        self.key: str = self._meta["key"]
        self.provenance: dict[str, str] = self._meta["provenance"]
        self.n_rows = store.n_items(self.modality)
        self.views = {
            name: View(tuple(view["row_shape"]), view["block_rows"], view["ragged"])
            for name, view in self._meta["views"].items()
        }
        self._done = {(line["view"], line["block"]): line["rows"] for line in _read_lines(path / JOURNAL)}

    def rows_of(self, view: str, block: int) -> range:
        """Return the rows of a block."""
        size = self.views[view].block_rows
        return range(block * size, min((block + 1) * size, self.n_rows))

    def pending(self, view: str) -> list[int]:
        """Return the blocks of a view that are not whole in the journal, or whose file is gone."""
        n_blocks = -(-self.n_rows // self.views[view].block_rows)
        return [block for block in range(n_blocks) if not self._is_done(view, block)]

    def missing_rows(self, view: str) -> np.ndarray:
        """Return the rows of a view that are still to be computed: those of its pending blocks."""
        if view not in self.views:
            return np.arange(self.n_rows)
        return np.array([row for block in self.pending(view) for row in self.rows_of(view, block)], np.int64)

    def _is_done(self, view: str, block: int) -> bool:
        return self._done.get((view, block)) == len(self.rows_of(view, block)) and self._shard(view, block).exists()

    def _shard(self, view: str, block: int) -> Path:
        if self.views[view].ragged:
            return self.path / view / _block_name(block) / "c" / "0" / "0"
        return self.path.joinpath(view, "c", str(block), *(["0"] if view == "pooled" else ["0", "0"]))

    def begin(self, view: str, row_shape: tuple[int, ...], *, ragged: bool = False) -> None:
        """Make a view's arrays: rows of (D,), (T, D), or where ragged (T_i, D) with T_i near the given T."""
        dtype = np.dtype(DTYPES[self.provenance["dtype"]])
        size = block_rows(self.n_rows, math.prod(row_shape) * dtype.itemsize)
        group = _open_group(self.path, "a")
        if ragged:
            group.require_group(view)
            shape = (-(-self.n_rows // size), size + 1)
            group.create_array("offsets", shape=shape, chunks=(1, size + 1), dtype="<i8", compressors=None)
        else:
            group.create_array(
                view,
                shape=(self.n_rows, *row_shape),
                shards=(size, *row_shape),
                chunks=(chunk_rows(size), *row_shape),
                dtype=dtype,
                compressors=None,
                fill_value=0,
            )
        self.views[view] = View(row_shape, size, ragged)
        self._meta["views"] = {name: vars(view) for name, view in self.views.items()}
        group.attrs["cachefuse"] = self._meta

    def write(self, view: str, block: int, values: Sequence[np.ndarray]) -> None:
        """Write one block of a view, a row a value, then note it in the journal."""
        rows = self.rows_of(view, block)
        if len(values) != len(rows):
            raise ValueError(f"block {block} has {len(rows)} rows. Got {len(values)} instead")
        group = _open_group(self.path, "a")
        with zarr.config.set({"array.write_empty_chunks": True}):
            if self.views[view].ragged:
                data = self._cast(np.concatenate(values), view)
                self._write_ragged(group, view, block, data, [len(value) for value in values])
            else:
                data = self._cast(np.stack(values), view)
                array = _grow(group[view], self.n_rows)
                array[rows.start : rows.stop] = data
        line = {"view": view, "block": block, "rows": len(rows), "crc32": zlib.crc32(data)}
        _append_lines(self.path / JOURNAL, [line])
        self._done[(view, block)] = len(rows)

    def _write_ragged(self, group: Any, view: str, block: int, data: np.ndarray, lengths: list[int]) -> None:
        """Write flat rows without padding, one array a block, and the block's offsets (rows + 1)."""
        stored = data if len(data) else np.zeros((1, data.shape[1]), data.dtype)  # Zarr has no chunks of zero rows
        shape = stored.shape
        array = group[view].create_array(
            _block_name(block), shape=shape, chunks=shape, dtype=data.dtype, compressors=None, overwrite=True
        )
        array[:] = stored
        size = self.views[view].block_rows
        line = np.full(size + 1, len(data), np.int64)
        line[: len(lengths) + 1] = np.concatenate([[0], np.cumsum(lengths)])
        offsets = _grow(group["offsets"], -(-self.n_rows // size))
        offsets[block] = line

    def _cast(self, values: np.ndarray, view: str) -> np.ndarray:
        with np.errstate(over="ignore"):
            data = np.ascontiguousarray(values, dtype=DTYPES[self.provenance["dtype"]])
        if np.isfinite(data).all():
            return data
        cause = "overflow float16; use --dtype float32" if np.isfinite(values).all() else "are NaN or infinite"
        raise CacheError(f"{self.encoder}: {self.modality} {view} features {cause}")

    def read(self, view: str = "pooled", rows: slice | np.ndarray | None = None) -> Any:
        """Return rows of a view: (n, D), (n, T, D), or for ragged tokens a list of n (T_i, D) arrays.

        Raises CacheError if any block is missing, saying how to go on: nothing is read that was not written.
        """
        missing = len(self.missing_rows(view))
        if missing:
            if view not in self.views:
                raise CacheError(
                    f"{self.store.path} has no {view} view of {self.encoder} ({self.modality}); make it with "
                    f"cachefuse extract --dataset {self.store.dataset} --encoder {self.source} --views {view}"
                )
            raise CacheError(
                f"{self.encoder} ({self.modality}, {view}) has {self.n_rows - missing:,} of {self.n_rows:,} rows; "
                f"run the same cachefuse extract again to go on"
            )
        group = _open_group(self.path)
        if self.views[view].ragged:
            every = np.arange(self.n_rows)
            return self._read_ragged(group, view, every if rows is None else every[rows])
        array = group[view]
        if rows is None:
            return array[:]
        return array[rows] if isinstance(rows, slice) else array.oindex[rows]

    def _read_ragged(self, group: Any, view: str, rows: np.ndarray) -> list[np.ndarray]:
        """Read each block once, in order, and hand its rows out."""
        size = self.views[view].block_rows
        found: dict[int, np.ndarray] = {}
        for block in np.unique(rows // size).tolist():
            flat, offsets = group[f"{view}/{_block_name(block)}"][:], group["offsets"][block]
            for row in rows[rows // size == block].tolist():
                start, stop = offsets[row - block * size : row - block * size + 2]
                found[row] = flat[start:stop]
        return [found[row] for row in rows.tolist()]


class BlockWriter:
    """Collects the missing rows of one view, in order, and writes each block as it fills."""

    def __init__(self, features: Features, view: str, *, ragged: bool) -> None:
        self.features = features
        self.view = view
        self.ragged = ragged
        self._waiting: list[tuple[int, np.ndarray | None]] = []

    def add(self, rows: np.ndarray, values: Sequence[np.ndarray | None]) -> None:
        """Take the next rows, (D,) or (T, D) each; None, for a sample that can't be encoded, becomes zeros."""
        self._waiting.extend(zip(rows.tolist(), values, strict=True))
        if self.view not in self.features.views:
            shapes = [value.shape for value in values if value is not None]
            if not shapes:
                return  # the width is not known yet
            mean = tuple(max(1, round(length)) for length in np.mean(shapes, axis=0).tolist())
            self.features.begin(self.view, mean, ragged=self.ragged)
        view = self.features.views[self.view]
        while self._waiting:
            block = self._waiting[0][0] // view.block_rows
            n = len(self.features.rows_of(self.view, block))
            if len(self._waiting) < n:
                return
            block_values = [view.empty if value is None else value for _, value in self._waiting[:n]]
            self.features.write(self.view, block, block_values)
            del self._waiting[:n]


def text_offsets(dataset: Dataset) -> np.ndarray | None:
    """Return (N + 1,) offsets into the dataset's flat texts if any sample has several, else None."""
    if not dataset.texts or all(len(texts) <= 1 for texts in dataset.texts):
        return None
    return np.concatenate([[0], np.cumsum([len(texts) for texts in dataset.texts])]).astype(np.int64)


def _check_same_rows(store: FeatureStore, dataset: Dataset, digests: list[str]) -> None:
    old = len(store.ids)
    if dataset.ids[:old] != store.ids:
        row = next((i for i, (a, b) in enumerate(zip(store.ids, dataset.ids, strict=False)) if a != b), len(dataset))
        raise CacheError(
            f"{store.path} was made from other rows: row {row + 1} was {store.ids[row]!r}"
            + (f" and is now {dataset.ids[row]!r}" if row < len(dataset) else " and is gone")
            + "; rows may only be appended. Use another --workspace, or delete the store to extract again"
        )
    stored = [str(value) for value in _open_group(store.path)["samples"]["digest"][:]]
    changed = [sample for sample, a, b in zip(store.ids, stored, digests, strict=False) if a != b]
    if changed:
        raise CacheError(
            f"{len(changed):,} samples changed since {store.path} was made: {', '.join(changed[:3])}"
            f"{', ...' if len(changed) > 3 else ''}. Use another --workspace, or delete the store to extract again"
        )
    if (text_offsets(dataset) is None) != (store.items("text") is None):
        raise CacheError(f"{store.path}: some samples now have several texts where all had one, or the reverse")


def _write_samples(path: Path, dataset: Dataset, digests: list[str]) -> None:
    root = _open_group(path, "a")
    samples = root.require_group("samples")
    _replace(samples, "id", np.array(dataset.ids, dtype=np.dtypes.StringDType()))
    _replace(samples, "split", dataset.splits.astype(np.dtypes.StringDType()))
    _replace(samples, "target", dataset.targets)
    _replace(samples, "digest", np.array(digests, dtype=np.dtypes.StringDType()))
    for modality in dataset.modalities:
        column = dataset.images if modality == "image" else dataset.texts
        present = np.array([bool(source) for source in column or ()])
        old = samples.get(f"present/{modality}")
        if old is not None:
            present[: old.shape[0]] &= old[:]
        _replace(samples.require_group("present"), modality, present)
    offsets = text_offsets(dataset)
    if offsets is not None:
        _replace(samples.require_group("items"), "text", offsets)
    root.attrs["cachefuse"] = {
        "format": FORMAT,
        "dataset": dataset.name,
        "manifest": dataset.manifest.model_dump(mode="json", by_alias=True, exclude_defaults=True),
        "classes": list(dataset.classes),
        "extracted": datetime.now(UTC).isoformat(timespec="milliseconds"),
    }


def _block_name(block: int) -> str:
    return f"block-{block:06d}"


def _grow(array: Any, rows: int) -> Any:
    """Lengthen an array along axis 0 if rows were appended to its samples."""
    if array.shape[0] != rows:
        array.resize((rows, *array.shape[1:]))
    return array


def _replace(group: zarr.Group, name: str, values: np.ndarray) -> None:
    """Write a whole array of the samples group, unless it is there already with the same values."""
    if name in group:
        old = group[name][:]
        if old.shape == values.shape and old.dtype == values.dtype and bool((old == values).all()):
            return
    array = group.create_array(name, shape=values.shape, chunks=values.shape, dtype=values.dtype, overwrite=True)
    array[:] = values


def _open_group(path: Path, mode: Any = "r") -> Any:
    return zarr.open_group(path, mode=mode)


def _append_lines(path: Path, lines: Iterable[dict[str, Any]]) -> None:
    """Append JSON lines and have them on the disk before going on; a torn last line is closed off first."""
    with path.open("ab") as file:
        if file.tell() and not path.read_bytes().endswith(b"\n"):
            file.write(b"\n")
        for line in lines:
            file.write(json.dumps(line, ensure_ascii=False).encode("utf-8", "backslashreplace") + b"\n")
        file.flush()
        os.fsync(file.fileno())


def _read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """Yield JSON lines, passing over one that a crash cut short."""
    if not path.is_file():
        return
    for line in path.read_bytes().splitlines():
        try:
            yield json.loads(line)
        except ValueError:
            continue
