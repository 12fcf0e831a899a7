"""How a view lies in its group: arrays of shards, and the metadata that lets any Zarr v3 reader open them."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import zarr

from cachefuse.errors import CacheError
from cachefuse.feature_spec import IDS
from cachefuse.files import make_folder, write_atomically
from cachefuse.store.format import DTYPES, MAX_BLOCK_ROWS, VIEWS
from cachefuse.store.shard import INDEX_CODECS, chunk_rows, padded_rows


@dataclass(frozen=True)
class Written:
    """A block as the journal has it: rows, (bytes, CRC-32C) of each of its files by array, rows that are outdated.

    ``cosine`` of quantised rows to those in float16: mean and least.
    """

    rows: int
    files: Mapping[str, tuple[int, int]]
    stale: frozenset[int] = frozenset()
    cosine: tuple[float, float] | None = None


@dataclass(frozen=True)
class View:
    """How one view is stored: a row's shape, rows a block, whether rows differ in their number of tokens, the dtype.

    ``row_shape`` is (D,), (T, D), or of ids (T,); where ragged, T is only what a row was expected to have. Rows of
    dtype int8 have a float16 scale for each vector of D. ``vocabulary`` is that of ids: every id is less.
    """

    name: str
    row_shape: tuple[int, ...]
    block_rows: int
    ragged: bool
    dtype: str
    vocabulary: int = 0

    @classmethod
    def from_dict(cls, values: Any) -> "View":
        """Return the view that a store describes, which may come from anyone: a name is no path, sizes are bounded."""
        try:
            view = cls(**{**values, "row_shape": tuple(values["row_shape"])})
            sizes = (*view.row_shape, view.block_rows)
            sound = view.name in VIEWS and view.dtype in DTYPES and 1 <= len(view.row_shape) <= 2
            sound = sound and all(type(n) is int and n >= 1 for n in sizes)
            sound = sound and view.block_rows <= MAX_BLOCK_ROWS and view.block_rows.bit_count() == 1
            sound = sound and type(view.vocabulary) is int and (view.name == IDS) == (view.vocabulary > 0)
            sound = sound and (view.name == IDS) == (view.dtype == "int32")
            sound = sound and (view.name != IDS or (view.ragged and len(view.row_shape) == 1))
        except (TypeError, KeyError):
            sound = False
        if not sound:
            raise CacheError(f"not a view that cachefuse makes: {values}")
        return view

    def to_dict(self) -> dict[str, Any]:
        """Return what a store says of it."""
        return {name: value for name, value in vars(self).items() if name != "vocabulary" or value}

    @property
    def token_shape(self) -> tuple[int, ...]:
        """The shape of one token where they are ragged: (D,), or () of ids."""
        return self.row_shape[1:]

    @property
    def offsets(self) -> str:
        """The name of the array that says where each ragged row begins."""
        return "ids_offsets" if self.name == IDS else "offsets"

    @property
    def empty(self) -> np.ndarray:
        """The row of a sample without this modality: zeros, or no tokens."""
        shape = (0, *self.token_shape) if self.ragged else self.row_shape
        return np.zeros(shape, np.int32 if self.name == IDS else np.float32)

    @property
    def arrays(self) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
        """The arrays of shards that hold it: name -> (shape of a row, or of a token where ragged; dtype)."""
        shape = self.token_shape if self.ragged else self.row_shape
        found = {self.name: (shape, np.dtype(DTYPES[self.dtype]))}
        if self.dtype == "int8":
            found["scales"] = (shape[:-1], np.dtype(DTYPES["float16"]))
        return found

    def files(self, group: Path, block: int) -> dict[str, Path]:
        """Return where a block lies, by array: shards, and where tokens are ragged a chunk of their offsets."""
        found = {}
        for name, (shape, _) in self.arrays.items():
            place = [block_name(block), "c", "0"] if self.ragged else ["c", str(block)]
            found[name] = group.joinpath(name, *place, *("0" for _ in shape))
        if self.ragged:
            found[self.offsets] = group / self.offsets / "c" / str(block) / "0"
        return found

    def declare(self, group: Path, n_rows: int) -> None:
        """Write the metadata of the view's arrays for ``n_rows``, where it is not there already."""
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
        """Whether another program laid out a block's arrays: compressed, unsharded, or in shards of another size.

        Metadata that is gone or can't be opened says nothing; ``declare`` writes it again.
        """
        folders = [group / name / block_name(block) if self.ragged else group / name for name in self.arrays]
        rows = None if self.ragged else self.block_rows
        return any(not _is_ours(folder, rows) and _can_be_opened(folder) for folder in folders)


def declare_shards(folder: Path, n_rows: int, rows: int, row_shape: tuple[int, ...], dtype: np.dtype) -> None:
    """Write an array's metadata: ``n_rows`` in shards of ``rows``, of uncompressed inner chunks."""
    shards, chunks = (padded_rows(rows), *row_shape), (chunk_rows(rows), *row_shape)
    _declare(folder, shape=(n_rows, *row_shape), shards=shards, chunks=chunks, dtype=dtype)


def declare_group(folder: Path, attributes: Mapping[str, Any] | None = None) -> None:
    """Write a group's metadata, where it is not there already."""
    files: dict[str, Any] = {}
    zarr.create_group(files, attributes=dict(attributes or {}))
    _write(folder, files)


def _declare(folder: Path, **about: Any) -> None:
    files: dict[str, Any] = {}
    zarr.create_array(files, compressors=None, fill_value=0, **about)
    _write(folder, files)


def _write(folder: Path, files: Mapping[str, Any]) -> None:
    """Have the metadata that zarr-python made in memory on the disk: written by it, a power cut might empty it."""
    data, path = files["zarr.json"].to_bytes(), folder / "zarr.json"
    if not path.is_file() or path.read_bytes() != data:
        make_folder(folder)
        write_atomically(path, data)


def _is_ours(folder: Path, block_rows: int | None) -> bool:
    try:
        declared = json.loads((folder / "zarr.json").read_bytes())
    except (OSError, ValueError):
        return True
    try:
        shard = declared["chunk_grid"]["configuration"]["chunk_shape"]
        (sharding,) = declared["codecs"]
        inner = sharding["configuration"]
        return (
            sharding["name"] == "sharding_indexed"
            and inner["index_location"] == "end"
            and inner["index_codecs"] == INDEX_CODECS
            and inner["codecs"] in ([INDEX_CODECS[0]], [{"name": "bytes"}])  # one byte has no order
            and inner["chunk_shape"] == [chunk_rows(shard[0]), *shard[1:]]
            and block_rows in (None, shard[0])
        )
    except (ValueError, KeyError, TypeError, IndexError):
        return False


def _can_be_opened(folder: Path) -> bool:
    try:
        zarr.open_array(folder, mode="r")
    except Exception:  # whatever zarr-python raises on metadata that was cut short or changed
        return False
    return True


def block_name(block: int) -> str:
    """Return the name of a block's own array, where tokens are ragged."""
    return f"block-{block:06d}"
