"""Files mapped read-only into one reserved range of addresses, so that their rows form one tensor."""

import ctypes
import math
import mmap
import os
import sys
import weakref
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

AVAILABLE = os.name == "posix"
_FIXED = 0x10  # MAP_FIXED, the same on Linux and macOS
_NORESERVE = 0x4000 if sys.platform == "linux" else 0x40
_FAILED = ctypes.c_void_p(-1).value


class MappedFiles:
    """The first rows of several files, mapped at equal distances: row r of file f is row f * stride + r.

    ``rows`` (n, *row_shape) covers the whole range. Do not touch the gaps between files, or the place of a file that is
    None: nothing is mapped there. Keep this object while its rows are in use, because the range is freed with it.
    """

    def __init__(self, files: Sequence[Path | None], n_rows: int, row_shape: tuple[int, ...], dtype: np.dtype) -> None:
        """Map at most ``n_rows`` of each file. Raises OSError if a file cannot be mapped."""
        row_bytes = math.prod(row_shape) * dtype.itemsize
        step = math.lcm(mmap.ALLOCATIONGRANULARITY, row_bytes)  # each file begins at a page, and at a row
        span = -(-max(1, n_rows) * row_bytes // step) * step
        self.stride = span // row_bytes
        size = max(1, len(files)) * span
        libc = _libc()
        # This reserves addresses only. The system counts no memory for them.
        anonymous = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _NORESERVE
        base = _mmap(libc, None, size, 0, anonymous, -1)
        weakref.finalize(self, libc.munmap, base, size)
        for i, file in enumerate(files):
            if file is not None:
                with file.open("rb") as opened:
                    length = min(span, os.fstat(opened.fileno()).st_size)
                    flags = mmap.MAP_SHARED | _FIXED
                    _mmap(libc, base + i * span, length, mmap.PROT_READ, flags, opened.fileno())
        buffer = (ctypes.c_uint8 * size).from_address(base)
        self.array = np.frombuffer(memoryview(buffer), dtype).reshape(-1, *row_shape)
        self.rows: Tensor = torch.from_numpy(self.array)
        self.array = self.array.view()
        self.array.flags.writeable = False


def _libc() -> ctypes.CDLL:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = (
        ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_int64
    )  # fmt: skip
    libc.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
    return libc


def _mmap(libc: ctypes.CDLL, address: int | None, size: int, protection: int, flags: int, file: int) -> int:
    mapped = libc.mmap(address, size, protection, flags, file, 0)
    if mapped == _FAILED:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return int(mapped)
