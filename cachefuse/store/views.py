"""The layout of a view in its group: arrays of shards, and the metadata that lets any Zarr v3 reader open them."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from zarr.core.buffer import Buffer

from cachefuse.errors import CacheError
from cachefuse.feature_spec import IDS, NGRAMS, NUMBERED
from cachefuse.files import JsonObject, clear_place, make_folder, read_bounded, write_atomically
from cachefuse.store.format import DTYPES, MAX_BLOCK_ROWS, MAX_METADATA, VIEWS
from cachefuse.store.shard import INDEX_CODECS, chunk_rows, padded_rows


@dataclass(frozen=True)
class Written:
    """A block's entry in the journal: rows, (bytes, CRC-32C) of each file by array, outdated rows.

    ``cosine``: mean and minimum of the cosine between quantised and float16 rows. ``long``: the tokens of each text
    that is longer than its encoder's limit, by row; None if they were not counted.
    """

    rows: int
    files: Mapping[str, tuple[int, int]]
    stale: frozenset[int] = frozenset()
    cosine: tuple[float, float] | None = None
    long: Mapping[int, int] | None = None


@dataclass(frozen=True)
class View:
    """The layout of one view: the shape of a row, rows per block, whether the number of tokens varies, the dtype.

    ``row_shape`` is (D,), (T, D), (T,) of ids, or (T, 2) of n-grams. If ragged, T is only an estimate. Rows of dtype
    int8 have a float16 scale for each vector of D. Every id or column of n-grams is less than ``vocabulary``.
    """

    name: str
    row_shape: tuple[int, ...]
    block_rows: int
    ragged: bool
    dtype: str
    vocabulary: int = 0

    @classmethod
    def from_dict(cls, values: JsonObject) -> "View":
        """Return a view from a store's metadata. Raises CacheError for names and sizes that cachefuse never writes."""
        try:
            view = cls(**{**values, "row_shape": tuple(values["row_shape"])})
            sizes = (*view.row_shape, view.block_rows)
            valid = view.name in VIEWS and view.dtype in DTYPES and 1 <= len(view.row_shape) <= 2
            valid = valid and all(type(n) is int and n >= 1 for n in sizes)
            valid = valid and view.block_rows <= MAX_BLOCK_ROWS and view.block_rows.bit_count() == 1
            numbered = view.name in NUMBERED
            valid = valid and type(view.vocabulary) is int and numbered == (view.vocabulary > 0)
            valid = valid and numbered == (view.dtype == "int32")
            valid = valid and (not numbered or view.ragged)
            valid = valid and (view.name == IDS) == (len(view.row_shape) == 1 and view.ragged)
            valid = valid and (view.name != NGRAMS or view.token_shape == (2,))
        except (TypeError, KeyError):
            valid = False
        if not valid:
            raise CacheError(f"not a view that cachefuse makes: {values}")
        return view

    def to_dict(self) -> JsonObject:
        """Return the metadata that a store keeps."""
        return {name: value for name, value in vars(self).items() if name != "vocabulary" or value}

    @property
    def token_shape(self) -> tuple[int, ...]:
        """The shape of one token of a ragged view: (D,), () of ids, or (2,) of n-grams."""
        return self.row_shape[1:]

    @property
    def offsets(self) -> str:
        """The name of the array that says where each ragged row begins."""
        return f"{self.name}_offsets" if self.name in NUMBERED else "offsets"

    @property
    def empty(self) -> np.ndarray:
        """The row of a sample without this modality: zeros, or no tokens."""
        shape = (0, *self.token_shape) if self.ragged else self.row_shape
        return np.zeros(shape, np.int32 if self.name in NUMBERED else np.float32)

    def unknown(self, values: np.ndarray) -> np.ndarray:
        """Return which tokens of a view with a vocabulary, (n,) or (n, 2), it cannot have, (n,) bool."""
        numbers = values[:, 0] if values.ndim == 2 else values
        unknown: np.ndarray = (numbers < 0) | (numbers >= self.vocabulary)
        return unknown | (values[:, 1] < 1) if values.ndim == 2 else unknown

    @property
    def arrays(self) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
        """The arrays of shards: name -> (shape of a row, or of a token if ragged; dtype)."""
        shape = self.token_shape if self.ragged else self.row_shape
        arrays = {self.name: (shape, np.dtype(DTYPES[self.dtype]))}
        if self.dtype == "int8":
            arrays["scales"] = (shape[:-1], np.dtype(DTYPES["float16"]))
        return arrays

    def files(self, group: Path, block: int) -> dict[str, Path]:
        """Return a block's files by array: shards, and a chunk of offsets if the view is ragged."""
        files = {}
        for name, (shape, _) in self.arrays.items():
            folders = [block_name(block), "c", "0"] if self.ragged else ["c", str(block)]
            files[name] = group.joinpath(name, *folders, *("0" for _ in shape))
        if self.ragged:
            files[self.offsets] = group / self.offsets / "c" / str(block) / "0"
        return files

    def declare(self, group: Path, n_rows: int) -> None:
        """Write the metadata of the view's arrays for ``n_rows``, unless it exists already."""
        for name, (shape, dtype) in self.arrays.items():
            if self.ragged:
                declare_group(group / name)
            else:
                declare_shards(group / name, n_rows, self.block_rows, shape, dtype)
        if self.ragged:
            size = self.block_rows + 1
            shape = (-(-n_rows // self.block_rows), size)
            _declare(group / self.offsets, shape=shape, chunks=(1, size), dtype=np.dtype("<i8"))

    def is_foreign(self, group: Path, block: int) -> bool:
        """Whether a block is in another program's layout: compressed, unsharded, or in shards of another size.

        It is not if its metadata is missing or unreadable; ``declare`` writes that again.
        """
        folders = [group / name / block_name(block) if self.ragged else group / name for name in self.arrays]
        rows = None if self.ragged else self.block_rows
        return any(not _is_ours(folder, rows) and _can_be_opened(folder) for folder in folders)


def declare_shards(folder: Path, n_rows: int, rows: int, row_shape: tuple[int, ...], dtype: np.dtype) -> None:
    """Write an array's metadata: ``n_rows`` in shards of ``rows``, with uncompressed inner chunks."""
    shards, chunks = (padded_rows(rows), *row_shape), (chunk_rows(rows), *row_shape)
    _declare(folder, shape=(n_rows, *row_shape), shards=shards, chunks=chunks, dtype=dtype)


def declare_group(folder: Path, attributes: JsonObject | None = None) -> None:
    """Write a group's metadata, unless it exists already."""
    files: dict[str, Buffer] = {}
    zarr.create_group(files, attributes=dict(attributes or {}))
    _write(folder, files)


def _declare(folder: Path, **array: Any) -> None:
    files: dict[str, Buffer] = {}
    zarr.create_array(files, compressors=None, fill_value=0, **array)
    _write(folder, files)


def _write(folder: Path, files: Mapping[str, Buffer]) -> None:
    """Write the metadata that zarr-python made in memory. If zarr-python wrote it, a power cut might empty the file."""
    data, path = files["zarr.json"].to_bytes(), folder / "zarr.json"
    if not _holds(path, data):
        make_folder(folder)
        clear_place(path)
        write_atomically(path, data)


def _holds(path: Path, data: bytes) -> bool:
    try:
        return read_bounded(path, len(data)) == data
    except OSError:
        return False


def _is_ours(folder: Path, block_rows: int | None) -> bool:
    try:
        declared = json.loads(read_bounded(folder / "zarr.json", MAX_METADATA))
    except (OSError, ValueError, RecursionError):
        return True
    try:
        shard = declared["chunk_grid"]["configuration"]["chunk_shape"]
        (sharding,) = declared["codecs"]
        inner = sharding["configuration"]
        return (
            sharding["name"] == "sharding_indexed"
            and inner["index_location"] == "end"
            and inner["index_codecs"] == INDEX_CODECS
            and inner["codecs"] in ([INDEX_CODECS[0]], [{"name": "bytes"}])  # single bytes have no byte order
            and inner["chunk_shape"] == [chunk_rows(shard[0]), *shard[1:]]
            and block_rows in (None, shard[0])
        )
    except (ValueError, KeyError, TypeError, IndexError):
        return False


def _can_be_opened(folder: Path) -> bool:
    try:
        zarr.open_array(folder, mode="r", zarr_format=3)
    except Exception:  # zarr-python raises many kinds of errors on changed metadata
        return False
    return True


def block_name(block: int) -> str:
    """Return the name of the array of one block of ragged tokens."""
    return f"block-{block:06d}"
