"""Opening a view. Blocks in cachefuse's own layout are mapped; zarr-python reads any other layout."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import zarr

from cachefuse.store.blocks import BlockFile, Blocks, DamagedBlockError, MappedBlocks, ReadBlock, ZarrBlocks
from cachefuse.store.format import check_regular, checksum
from cachefuse.store.mapped import AVAILABLE
from cachefuse.store.rows import RaggedRows, Rows
from cachefuse.store.shard import check_index, shard_bytes
from cachefuse.store.views import View, Written, block_name


def open_rows(view: View, group: Path, name: str, n_rows: int, written: Mapping[int, Written]) -> Rows:
    """Open the rows of a view in a group. ``written`` has the existing blocks; ``name`` is for messages.

    Checks each shard's index (order, completeness, checksum). Raises CacheError, naming the block, if one is damaged.
    """
    opening = _Opening(view, group, name, n_rows, written)
    foreign = not AVAILABLE or any(view.is_foreign(group, block) for block in (written if view.ragged else [0]))
    offsets = opening.offsets(foreign) if view.ragged else None
    files = {array: opening.files(array, offsets) for array in view.arrays}
    foreign = foreign or not all(opening.is_in_order(array, files[array]) for array in view.arrays)
    arrays = [opening.blocks(array, files[array], foreign) for array in view.arrays]
    if offsets is not None:
        return RaggedRows(arrays[0], offsets, n_rows, view.block_rows, *arrays[1:])
    return Rows(arrays[0], n_rows, view.block_rows, *arrays[1:])


@dataclass(frozen=True)
class _Opening:
    """The steps of opening one view."""

    view: View
    group: Path
    name: str
    n_rows: int
    written: Mapping[int, Written]

    @property
    def n_blocks(self) -> int:
        return -(-self.n_rows // self.view.block_rows)

    def offsets(self, foreign: bool) -> np.ndarray:
        """Return (n_blocks, block_rows + 1) offsets of a ragged view; zeros for a missing block."""
        array = self.view.offsets
        offsets = np.zeros((self.n_blocks, self.view.block_rows + 1), np.int64)
        read = _reader(self.group / array, 1) if foreign and self.written else None
        for block, written in self.written.items():
            file = self.view.files(self.group, block)[array]
            try:
                values = np.fromfile(file, "<i8") if read is None else read(block, slice(0, 1))[0]
            except Exception as error:  # zarr-python raises many kinds of errors on changed files
                raise DamagedBlockError(self.name, block, file, str(error)) from error
            fits = values.shape == offsets[block].shape and values[0] == 0 and (np.diff(values) >= 0).all()
            if not fits or checksum(values) != written.files[array][1]:
                raise DamagedBlockError(self.name, block, file, "its offsets have changed")
            offsets[block] = values
        return offsets

    def files(self, array: str, offsets: np.ndarray | None) -> list[BlockFile | None]:
        """Return each block's file of an array; None for a missing block."""
        files: list[BlockFile | None] = [None] * self.n_blocks
        for block, written in self.written.items():
            n_rows = written.rows if offsets is None else int(offsets[block, -1])
            files[block] = BlockFile(self.view.files(self.group, block)[array], n_rows, written.files[array][1])
        return files

    def is_in_order(self, array: str, files: list[BlockFile | None]) -> bool:
        """Whether every shard has all inner chunks, in order. Raises CacheError if an index is damaged."""
        shape, dtype = self.view.arrays[array]
        row_bytes = math.prod(shape) * dtype.itemsize
        states = set()
        for block, file in enumerate(files):
            if file is not None:
                rows = file.n_rows if self.view.ragged else self.view.block_rows
                fits = file.path.stat().st_size == shard_bytes(rows, row_bytes)
                states.add(check_index(file.path, rows, row_bytes) if fits else "damaged")
                if "damaged" in states:
                    raise DamagedBlockError(self.name, block, file.path, "its index or its size is wrong")
        return "foreign" not in states

    def blocks(self, array: str, files: list[BlockFile | None], foreign: bool) -> Blocks:
        """Return an array's blocks: mapped, or read by zarr-python if another program wrote them."""
        shape, dtype = self.view.arrays[array]
        if not foreign:
            return MappedBlocks(self.name, files, shape, dtype)
        folder = self.group / array
        read = _ragged_reader(folder) if self.view.ragged else _reader(folder, self.view.block_rows)
        return ZarrBlocks(self.name, files, shape, dtype, read)


def _reader(path: Path, block_rows: int) -> ReadBlock:
    array = cache(partial(_open_array, path))  # opened by the first read

    def read(block: int, rows: slice | np.ndarray) -> np.ndarray:
        opened = array()
        first = block * block_rows
        if isinstance(rows, slice):
            return np.asarray(opened[first + rows.start : first + rows.stop])
        return np.asarray(opened.oindex[first + rows])

    return read


def _open_array(path: Path) -> "zarr.Array[Any]":
    check_regular(path)
    return zarr.open_array(path, mode="r", zarr_format=3)


def _ragged_reader(path: Path) -> ReadBlock:
    def read(block: int, rows: slice | np.ndarray) -> np.ndarray:
        array = _open_array(path / block_name(block))
        return np.asarray(array.oindex[rows])

    return read
