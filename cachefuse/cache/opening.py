"""Opening a view: its blocks mapped where they lie as cachefuse writes them, else read by zarr-python."""

import math
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import zarr

from cachefuse.cache.blocks import BlockFile, Blocks, DamagedBlockError, MappedBlocks, ReadBlock, ZarrBlocks
from cachefuse.cache.layout import checksum
from cachefuse.cache.mapped import AVAILABLE
from cachefuse.cache.rows import RaggedRows, Rows
from cachefuse.cache.shard import check_index, shard_bytes
from cachefuse.cache.views import View, block_name

if TYPE_CHECKING:
    from cachefuse.cache.features import Features


def open_rows(features: "Features", view: str, there: np.ndarray) -> Rows:
    """Open a view's rows; ``there`` (n_blocks,) bool says which blocks are.

    Checks each shard's index (order, completeness, checksum). Raises CacheError, naming the block, if one is damaged.
    """
    about, n_rows = features.views[view], features.n_rows
    blocks = [int(block) for block in np.flatnonzero(there)]
    foreign = not AVAILABLE or any(
        about.is_foreign(features.path, block) for block in (blocks if about.ragged else [0])
    )
    offsets = _offsets(features, about, blocks, len(there), foreign) if about.ragged else None
    files = {name: _block_files(features, about, name, blocks, len(there), offsets) for name in about.arrays}
    if not foreign:
        foreign = not all(_is_in_order(features, about, name, files[name]) for name in about.arrays)
    arrays = [_open(features, about, name, files[name], foreign) for name in about.arrays]
    if offsets is not None:
        return RaggedRows(arrays[0], offsets, n_rows, about.block_rows, *arrays[1:])
    return Rows(arrays[0], n_rows, about.block_rows, *arrays[1:])


def _offsets(features: "Features", view: View, blocks: list[int], n_blocks: int, foreign: bool) -> np.ndarray:
    """Return (n_blocks, block_rows + 1) offsets; zeros where a block is not there."""
    offsets = np.zeros((n_blocks, view.block_rows + 1), np.int64)
    read = _reader(features.path / view.offsets, 1) if foreign and blocks else None
    for block in blocks:
        file, written = view.files(features.path, block)[view.offsets], features.written(view.name, block)
        try:
            values = np.fromfile(file, "<i8") if read is None else read(block, slice(0, 1))[0]
        except Exception as error:  # whatever zarr-python raises on what was changed
            raise DamagedBlockError(features.name(view.name), block, file, str(error)) from error
        fits = values.shape == offsets[block].shape and values[0] == 0 and (np.diff(values) >= 0).all()
        if not fits or written is None or checksum(values) != written.files[view.offsets][1]:
            raise DamagedBlockError(
                features.name(view.name), block, file, "its offsets are not those that were written"
            )
        offsets[block] = values
    return offsets


def _block_files(
    features: "Features", view: View, name: str, blocks: list[int], n_blocks: int, offsets: np.ndarray | None
) -> list[BlockFile | None]:
    files: list[BlockFile | None] = [None] * n_blocks
    for block in blocks:
        written = features.written(view.name, block)
        if written is not None:
            n_rows = written.rows if offsets is None else int(offsets[block, -1])
            files[block] = BlockFile(view.files(features.path, block)[name], n_rows, written.files[name][1])
    return files


def _is_in_order(features: "Features", view: View, name: str, files: list[BlockFile | None]) -> bool:
    """Whether every shard's inner chunks are all there, in order. Raises CacheError if an index is damaged."""
    shape, dtype = view.arrays[name]
    row_bytes = math.prod(shape) * dtype.itemsize
    states = set()
    for block, file in enumerate(files):
        if file is not None:
            rows = file.n_rows if view.ragged else view.block_rows
            fits = file.path.stat().st_size == shard_bytes(rows, row_bytes)
            states.add(check_index(file.path, rows, row_bytes) if fits else "damaged")
            if "damaged" in states:
                raise DamagedBlockError(
                    features.name(view.name), block, file.path, "its index is not that of a whole shard"
                )
    return "foreign" not in states


def _open(features: "Features", view: View, name: str, files: list[BlockFile | None], foreign: bool) -> Blocks:
    shape, dtype = view.arrays[name]
    if not foreign:
        return MappedBlocks(features.name(view.name), files, shape, dtype)
    if view.ragged:
        return ZarrBlocks(features.name(view.name), files, shape, dtype, _ragged_reader(features.path / name))
    return ZarrBlocks(features.name(view.name), files, shape, dtype, _reader(features.path / name, view.block_rows))


def _reader(path: Path, block_rows: int) -> ReadBlock:
    array = cache(partial(zarr.open_array, path, mode="r"))  # opened once, and where reading can say what is damaged

    def read(block: int, rows: slice | np.ndarray) -> np.ndarray:
        opened: Any = array()
        first = block * block_rows
        if isinstance(rows, slice):
            return np.asarray(opened[first + rows.start : first + rows.stop])
        return np.asarray(opened.oindex[first + rows])

    return read


def _ragged_reader(path: Path) -> ReadBlock:
    def read(block: int, rows: slice | np.ndarray) -> np.ndarray:
        array: Any = zarr.open_array(path / block_name(block), mode="r")
        return np.asarray(array.oindex[rows])

    return read
