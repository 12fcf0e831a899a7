"""One encoder's features of one modality in a store: views written and read a block of rows at a time."""

import math
import os
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import zarr

from cachefuse.cache.journal import append_lines, read_lines
from cachefuse.cache.layout import DTYPES, block_rows, chunk_rows
from cachefuse.errors import CacheError

if TYPE_CHECKING:
    from cachefuse.cache.store import FeatureStore

JOURNAL = "journal.jsonl"


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

    def __init__(self, store: "FeatureStore", path: Path) -> None:
        self.store = store
        self.path = path
        attributes: Any = zarr.open_group(path, mode="r").attrs
        self._meta: dict[str, Any] = dict(attributes["cachefuse"])
        self.encoder: str = self._meta["encoder"]
        self.modality: str = self._meta["modality"]
        self.source: str = self._meta["source"]
        self.key: str = self._meta["key"]
        self.provenance: dict[str, str] = self._meta["provenance"]
        self.n_rows = store.n_items(self.modality)
        self.views = {
            name: View(tuple(view["row_shape"]), view["block_rows"], view["ragged"])
            for name, view in self._meta["views"].items()
            if (path / name / "zarr.json").is_file()
        }
        self._done = {
            (line["view"], line["block"]): (line["rows"], line.get("bytes")) for line in read_lines(path / JOURNAL)
        }

    @property
    def n_written(self) -> int:
        """The number of blocks in the journal, of all views."""
        return len(self._done)

    def rows_of(self, view: str, block: int) -> range:
        """Return the rows of a block."""
        size = self.views[view].block_rows
        return range(block * size, min((block + 1) * size, self.n_rows))

    def pending(self, view: str) -> list[int]:
        """Return the blocks of a view that are not whole in the journal, or whose files are gone or cut short."""
        n_blocks = -(-self.n_rows // self.views[view].block_rows)
        return [block for block in range(n_blocks) if not self._is_done(view, block)]

    def missing_rows(self, view: str) -> np.ndarray:
        """Return the rows of a view that are still to be computed: those of its pending blocks."""
        if view not in self.views:
            return np.arange(self.n_rows)
        return np.array([row for block in self.pending(view) for row in self.rows_of(view, block)], np.int64)

    def _is_done(self, view: str, block: int) -> bool:
        whole = len(self.rows_of(view, block)), _total_size(self._files(view, block))
        return self._done.get((view, block)) == whole

    def _files(self, view: str, block: int) -> list[Path]:
        """Return where a block lies: one shard, or for ragged tokens their flat rows and their offsets."""
        if self.views[view].ragged:
            flat = self.path / view / _block_name(block) / "c" / "0" / "0"
            return [flat, self.path / "offsets" / "c" / str(block) / "0"]
        return [self.path.joinpath(view, "c", str(block), *("0" for _ in self.views[view].row_shape))]

    def begin(self, view: str, row_shape: tuple[int, ...], *, ragged: bool = False) -> None:
        """Make a view's arrays: rows of (D,), (T, D), or where ragged (T_i, D) with T_i near the given T."""
        dtype = np.dtype(DTYPES[self.provenance["dtype"]])
        size = block_rows(self.n_rows, math.prod(row_shape) * dtype.itemsize)
        group: Any = zarr.open_group(self.path, mode="a")
        if ragged:
            group.create_group(view, overwrite=True)
            shape = (-(-self.n_rows // size), size + 1)
            group.create_array(
                "offsets", shape=shape, chunks=(1, size + 1), dtype="<i8", compressors=None, overwrite=True
            )
        else:
            group.create_array(
                view,
                shape=(self.n_rows, *row_shape),
                shards=(size, *row_shape),
                chunks=(chunk_rows(size), *row_shape),
                dtype=dtype,
                compressors=None,
                fill_value=0,
                overwrite=True,
            )
        self.views[view] = View(row_shape, size, ragged)
        self._meta["views"] = {name: vars(view) for name, view in self.views.items()}
        group.attrs["cachefuse"] = self._meta

    def write(self, view: str, block: int, values: Sequence[np.ndarray]) -> None:
        """Write one block of a view, a row a value, then note it in the journal."""
        rows = self.rows_of(view, block)
        if len(values) != len(rows):
            raise ValueError(f"block {block} has {len(rows)} rows. Got {len(values)} instead")
        flat = np.concatenate(values) if self.views[view].ragged else np.stack(values)
        with np.errstate(over="ignore"):
            data = np.ascontiguousarray(flat, dtype=DTYPES[self.provenance["dtype"]])
        if not np.isfinite(data).all():
            raise CacheError(self._not_finite(view, rows, values))
        files = self._files(view, block)
        for file in files:
            file.unlink(missing_ok=True)  # Zarr would merge a shard that is there, and fail if it is damaged
        group: Any = zarr.open_group(self.path, mode="a")
        with zarr.config.set({"array.write_empty_chunks": True}):
            if self.views[view].ragged:
                self._write_ragged(group, view, block, data, [len(value) for value in values])
            else:
                array = _grow(group[view], self.n_rows)
                array[rows.start : rows.stop] = data
        for file in files:
            _to_disk(file)
        done = len(rows), _total_size(files)
        line = {"view": view, "block": block, "rows": done[0], "bytes": done[1], "crc32": zlib.crc32(data.data)}
        append_lines(self.path / JOURNAL, [line])
        self._done[(view, block)] = done

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

    def _not_finite(self, view: str, rows: range, values: Sequence[np.ndarray]) -> str:
        """Say which sample has features that can't be stored, and why."""
        with np.errstate(over="ignore"):
            whole = [bool(np.isfinite(x.astype(DTYPES[self.provenance["dtype"]])).all()) for x in values]
        row, value = rows[whole.index(False)], values[whole.index(False)]
        overflow = bool(np.isfinite(value).all())
        cause = "overflow float16; use --dtype float32" if overflow else "are NaN or infinite; try --device cpu"
        offsets = self.store.items(self.modality)
        sample = row if offsets is None else int(np.searchsorted(offsets, row, side="right")) - 1
        return f"{self.encoder}: {self.modality} {view} features of sample {self.store.ids[sample]} {cause}"

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
        group: Any = zarr.open_group(self.path, mode="r")
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


def _block_name(block: int) -> str:
    return f"block-{block:06d}"


def _grow(array: Any, rows: int) -> Any:
    """Lengthen an array along axis 0 if rows were appended to its samples."""
    if array.shape[0] != rows:
        array.resize((rows, *array.shape[1:]))
    return array


def _total_size(files: Sequence[Path]) -> int:
    """Return the size of some files in bytes, or -1 if any is missing."""
    try:
        return sum(file.stat().st_size for file in files)
    except FileNotFoundError:
        return -1


def _to_disk(file: Path) -> None:
    """Have a file on the disk before going on."""
    with file.open("rb+") as opened:
        os.fsync(opened.fileno())
