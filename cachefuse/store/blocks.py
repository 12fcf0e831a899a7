"""An array's blocks: rows by (block, row in block). Each block's checksum is verified before its first row is read."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from cachefuse.errors import CacheError
from cachefuse.store.format import checksum
from cachefuse.store.mapped import MappedFiles

ReadBlock = Callable[[int, slice | np.ndarray], np.ndarray]  # (block, row numbers in block) -> rows


@dataclass(frozen=True)
class BlockFile:
    """A finished block: its file, its number of rows, and their checksum from the journal."""

    path: Path
    n_rows: int
    crc: int


class Blocks(ABC):
    """Rows of finished blocks. ``files`` has None for a missing block; ``name`` is for messages."""

    def __init__(self, name: str, files: Sequence[BlockFile | None], row_shape: tuple[int, ...], dtype: np.dtype):
        self.name = name
        self.files = list(files)
        self.row_shape = row_shape
        self.dtype = dtype
        self._unchecked = np.ones(len(self.files), bool)
        self._n_unchecked = len(self.files)

    def take(self, block: np.ndarray, row: np.ndarray, out: Tensor | None = None) -> Tensor:
        """Return the rows (B, *row_shape) at (block, row), int64 (B,) each; written to ``out`` if given.

        Raises CacheError, naming the block, if one is missing or damaged.
        """
        self.check(block)
        return self._take(block, row, out)

    def check(self, block: np.ndarray) -> None:
        """Raise CacheError, naming the block, if one of ``block`` (B,) is missing or damaged."""
        if self._n_unchecked:
            for number in np.unique(block).tolist():
                self._check(number)

    def data(self, block: int) -> np.ndarray:
        """Return all rows of a block, read-only. Raises CacheError if it is missing or damaged."""
        self._check(block)
        return self._data(block, self.files[block])

    def tensor(self, block: int) -> Tensor:
        """Return all rows of a block; do not write to them. Raises CacheError if it is missing or damaged."""
        self._check(block)
        return self._tensor(block, self.files[block])

    def _check(self, block: int) -> None:
        if not self._unchecked[block]:
            return
        file = self.files[block]
        if file is None:
            raise CacheError(f"{self.name}: block {block} is not there; run the same cachefuse extract again to go on")
        if checksum(self._data(block, file)) != file.crc:
            raise DamagedBlockError(self.name, block, file.path, "its checksum does not fit")
        self._unchecked[block] = False
        self._n_unchecked -= 1

    @abstractmethod
    def _take(self, block: np.ndarray, row: np.ndarray, out: Tensor | None) -> Tensor: ...

    @abstractmethod
    def _data(self, block: int, file: BlockFile | None) -> np.ndarray: ...

    def _tensor(self, block: int, file: BlockFile | None) -> Tensor:
        return torch.from_numpy(np.array(self._data(block, file)))


class DamagedBlockError(CacheError):
    """A block whose bytes differ from those that were written."""

    def __init__(self, name: str, block: int, path: Path, why: str) -> None:
        super().__init__(f"{name}: block {block} is damaged ({path}: {why}); run cachefuse verify --repair")
        self.why = why


class MappedBlocks(Blocks):
    """Shards, each one contiguous run of rows, read through memory maps."""

    def __init__(self, name: str, files: Sequence[BlockFile | None], row_shape: tuple[int, ...], dtype: np.dtype):
        super().__init__(name, files, row_shape, dtype)
        max_rows = max((file.n_rows for file in self.files if file), default=0)
        self._mapped = MappedFiles([file.path if file else None for file in self.files], max_rows, row_shape, dtype)

    def _take(self, block: np.ndarray, row: np.ndarray, out: Tensor | None) -> Tensor:
        position = torch.from_numpy(block * self._mapped.stride + row)
        return torch.index_select(self._mapped.rows, 0, position, out=out)

    def _data(self, block: int, file: BlockFile | None) -> np.ndarray:
        start = block * self._mapped.stride
        return self._mapped.array[start : start + (file.n_rows if file else 0)]

    def _tensor(self, block: int, file: BlockFile | None) -> Tensor:
        start = block * self._mapped.stride
        return self._mapped.rows[start : start + (file.n_rows if file else 0)]


class ZarrBlocks(Blocks):
    """Blocks in another layout (compressed, unsharded, chunks in another order). zarr-python reads them, slower."""

    def __init__(
        self,
        name: str,
        files: Sequence[BlockFile | None],
        row_shape: tuple[int, ...],
        dtype: np.dtype,
        read: ReadBlock,
    ):
        super().__init__(name, files, row_shape, dtype)
        self._read = read

    def _take(self, block: np.ndarray, row: np.ndarray, out: Tensor | None) -> Tensor:
        out = torch.from_numpy(np.empty((len(row), *self.row_shape), self.dtype)) if out is None else out
        for number in np.unique(block).tolist():
            mask = block == number  # (B,)
            out[torch.from_numpy(mask)] = torch.from_numpy(self._read(number, row[mask]))
        return out

    def _data(self, block: int, file: BlockFile | None) -> np.ndarray:
        if file is None:
            return np.empty((0, *self.row_shape), self.dtype)
        try:
            rows = self._read(block, slice(0, file.n_rows))
        except Exception as error:  # codecs raise many kinds of errors on changed bytes
            raise DamagedBlockError(self.name, block, file.path, str(error)) from error
        if rows.dtype != self.dtype or rows.shape != (file.n_rows, *self.row_shape):
            raise DamagedBlockError(self.name, block, file.path, f"its metadata says {rows.dtype} {rows.shape}")
        return rows
