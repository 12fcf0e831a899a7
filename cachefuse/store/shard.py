"""One shard file: an uncompressed Zarr v3 `sharding_indexed` chunk, inner chunks in order, index at the end.

    rows, padded with zeros to whole inner chunks | (offset, bytes) of each inner chunk, <u8 | CRC-32C of the index, <u4

Such a file is one contiguous run of rows: it can be written as a stream and read through a memory map.
"""

import ctypes
import os
import sys
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Self

import numpy as np

from cachefuse.files import make_folder, named, sync_folder
from cachefuse.store.format import CHUNKS_PER_BLOCK, checksum

INDEX_CODECS = [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "crc32c"}]

SYNC_BYTES = 1 << 20  # after so many bytes the disk starts to write
_SYNC_FILE_RANGE_WRITE = 2


def chunk_rows(rows: int) -> int:
    """Return the rows of one inner chunk of a shard of ``rows`` rows; the last chunk may need padding."""
    return max(1, -(-rows // min(CHUNKS_PER_BLOCK, max(1, rows))))


def padded_rows(rows: int) -> int:
    """Return the rows of a shard that holds ``rows``, padded to whole inner chunks."""
    size = chunk_rows(rows)
    return max(1, -(-rows // size)) * size


def shard_index(rows: int, row_bytes: int) -> bytes:
    """Return the index, with its checksum, of a shard of ``rows`` rows that has all inner chunks, in order."""
    size = chunk_rows(rows) * row_bytes
    offsets = np.arange(padded_rows(rows) // chunk_rows(rows), dtype="<u8") * size
    index = np.stack([offsets, np.full_like(offsets, size)], axis=1).tobytes()
    return index + checksum(index).to_bytes(4, "little")


def shard_bytes(rows: int, row_bytes: int) -> int:
    """Return the size of a shard file."""
    return padded_rows(rows) * row_bytes + len(shard_index(rows, row_bytes))


def check_index(path: Path, rows: int, row_bytes: int) -> str:
    """Return "whole" if a shard's index is ours, "foreign" if it is another valid one, else "damaged".

    Other writers may reorder the inner chunks, or leave out those that are all zero.
    """
    expected = shard_index(rows, row_bytes)
    with path.open("rb") as file:
        file.seek(-min(len(expected), os.fstat(file.fileno()).st_size), os.SEEK_END)
        index = file.read()
    if index == expected:
        return "whole"
    return "foreign" if checksum(index[:-4]).to_bytes(4, "little") == index[-4:] else "damaged"


class ShardWriter:
    """Writes one shard as a stream into a temporary file beside it, so that a shard is never half there.

    Use it as a context manager: an unfinished file is removed.
    """

    def __init__(self, temporary: Path) -> None:
        make_folder(temporary.parent)
        self.n_rows = 0
        self.crc = 0  # of the rows, without padding
        self._temporary = temporary
        self._unsynced = 0
        self._file: BinaryIO = temporary.open("wb")

    def append(self, rows: np.ndarray) -> None:
        """Append rows (n, ...), little-endian and contiguous."""
        self.crc = checksum(rows, self.crc)
        self.n_rows += len(rows)
        with named(self._temporary):
            self._file.write(rows.data if rows.size else b"")
        self._unsynced += rows.nbytes
        if self._unsynced >= SYNC_BYTES:
            self._unsynced = 0
            _start_sync(self._file)

    def finish(self, path: Path, shard_rows: int, row_bytes: int) -> int:
        """Pad to ``shard_rows``, flush to disk and rename to ``path``. Return the size in bytes."""
        with named(path):
            self._file.truncate(self._file.seek(padded_rows(shard_rows) * row_bytes))
            self._file.write(shard_index(shard_rows, row_bytes))
            self._file.flush()
            os.fsync(self._file.fileno())
            size = self._file.tell()
            self._file.close()
        make_folder(path.parent)
        os.replace(self._temporary, path)
        sync_folder(path.parent)
        return size

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Remove an unfinished file."""
        with suppress(OSError):  # a full disk cannot take the rest of the buffer, which nobody needs
            self._file.close()
        self._temporary.unlink(missing_ok=True)


def _start_sync(file: BinaryIO) -> None:
    """Ask the disk to start writing, so that the final flush takes less time. Linux only."""
    sync_file_range = _sync_file_range()
    if sync_file_range:
        sync_file_range(file.fileno(), 0, 0, _SYNC_FILE_RANGE_WRITE)  # only a hint: errors appear at the fsync


@cache
def _sync_file_range() -> Callable[[int, int, int, int], int] | None:
    function = getattr(ctypes.CDLL(None), "sync_file_range", None) if sys.platform == "linux" else None
    if function:
        function.argtypes = (ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint)
    return function
