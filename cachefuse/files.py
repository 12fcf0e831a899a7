"""Atomic writes, folder names, JSON, readable sizes."""

import errno
import json
import math
import os
import re
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from numbers import Integral, Real
from pathlib import Path
from typing import Any, BinaryIO

from cachefuse.temporary import replacing

PIECE = 1 << 20  # bytes
JsonObject = dict[str, Any]  # as a file has it, before anything in it is checked; or to be written


def slug(text: str) -> str:
    """Return a safe folder name for any text."""
    return re.sub(r"[^A-Za-z0-9_.-]+", "-", text).strip("-.") or "unnamed"


@contextmanager
def named(path: Path | str) -> Iterator[None]:
    """Give a system error within the block, as of a full or failing disk, the name of the file, if it has none."""
    try:
        yield
    except OSError as error:
        if error.errno is not None and error.filename is None:
            error.filename = str(path)
        raise


def write_atomically(path: Path, data: bytes) -> None:
    """Write a file completely or not at all, even in a power cut."""
    with opened_atomically(path) as file:
        file.write(data)


@contextmanager
def opened_atomically(path: Path) -> Iterator[BinaryIO]:
    """Yield a file that appears completely or not at all, even in a power cut."""
    with named(path), replacing(path) as file:
        yield file
    sync_folder(path.parent)


@contextmanager
def open_regular(path: Path | str, limit: int | None = None) -> Iterator[BinaryIO]:
    """Open a regular file, or the one that a link leads to, of at most ``limit`` bytes.

    Raises OSError, with the path, for another kind of file, whose reading may never end, and for a larger one.
    """
    # Opening a pipe without this flag waits for its other end.
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise OSError(errno.EINVAL, "is not a regular file", str(path))
        if limit is not None and status.st_size > limit:
            raise OSError(errno.EFBIG, f"is larger than the limit of {limit:,} bytes", str(path))
        with named(path), open(descriptor, "rb", closefd=False) as file:
            yield file
    finally:
        os.close(descriptor)


def read_bounded(path: Path | str, limit: int) -> bytes:
    """Return the bytes of a regular file, or of the one that a link leads to, of at most ``limit`` bytes.

    Raises OSError, with the path, for another kind of file and for a larger one.
    """
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        data = b"" if size > limit else file.read(size)
        while size <= limit and len(data) <= limit and (more := file.read(PIECE)):  # it grew meanwhile
            data += more
    if max(size, len(data)) > limit:
        raise OSError(errno.EFBIG, f"is larger than the limit of {limit:,} bytes", str(path))
    return data


def clear_place(path: Path) -> None:
    """Remove a folder that stands where a file belongs."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)


def make_folder(path: Path) -> None:
    """Make a folder and its parents, and flush their names to disk."""
    new = [folder for folder in (path, *path.parents) if not folder.exists()]
    path.mkdir(parents=True, exist_ok=True)
    for folder in new:
        sync_folder(folder.parent)


def sync_folder(path: Path) -> None:
    """Flush a folder's names to disk. On Windows, where folders cannot be opened, the system does it."""
    if not hasattr(os, "O_DIRECTORY"):
        return
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def format_bytes(n_bytes: float) -> str:
    """Return a size such as "3.07 GB": three digits, units of powers of 1,000."""
    unit = min(4, int(math.log10(max(1, n_bytes)) / 3 + 1e-9))
    return f"{n_bytes / 1000**unit:.3g} {('B', 'kB', 'MB', 'GB', 'TB')[unit]}"


def to_json(value: object) -> str:
    """Return indented JSON, keys in the given order. NaN and infinity, which JSON lacks, become null."""
    return json.dumps(_plain(value), indent=2, ensure_ascii=False, allow_nan=False)


def _plain(value: object) -> object:
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, Real) and not isinstance(value, bool):  # of NumPy too, which JSON does not know
        number = int(value) if isinstance(value, Integral) else float(value)
        return number if math.isfinite(number) else None
    return value
