"""The layout of a store: names, block sizes, checksums, the provenance key, and journals of JSON lines."""

import errno
import hashlib
import json
import os
import stat
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path

import google_crc32c
import numpy as np

from cachefuse.errors import CacheError
from cachefuse.feature_spec import IDS, NGRAMS, POOLED, TOKENS
from cachefuse.files import JsonObject, named, read_bounded, sync_folder, write_atomically

MAX_METADATA = 64 << 20  # bytes of a file of metadata: the names of many classes are long
MAX_JOURNAL = 1 << 30  # bytes
NOT_A_FILE = {errno.EINVAL, errno.EFBIG, errno.ELOOP, errno.ENXIO}  # of what ``read_bounded`` refuses


def check_regular(folder: Path) -> None:
    """Raise OSError if a file under a folder is not regular, before a library reads it: it might never end."""
    for parent, folders, files in os.walk(folder):
        for name in (*folders, *files):
            path = os.path.join(parent, name)
            mode = os.stat(path).st_mode
            if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
                raise OSError(errno.EINVAL, "is not a regular file", path)


def append_lines(path: Path, lines: Iterable[JsonObject]) -> None:
    """Append lines and flush them to disk. A last line that was cut short, as a kill leaves it, is removed first.

    So every ended line is whole, unless it was damaged later.
    """
    data = _to_lines(lines)
    if not data:
        return
    with named(path), path.open("ab+") as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise OSError(errno.EINVAL, "is not a regular file", str(path))
        size = file.seek(0, os.SEEK_END)
        if size:
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":
                file.seek(0)
                last = file.read().rpartition(b"\n")[2]
                if _line(last) is None:
                    file.truncate(size - len(last))
                else:
                    data = b"\n" + data
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    if not size:
        sync_folder(path.parent)


def read_lines(path: Path) -> Iterator[JsonObject]:
    """Yield the lines that are whole. Raises CacheError for a file that is not regular, or too large."""
    yield from (line for line in map(_line, _read_lines(path)) if line is not None)


def n_damaged_lines(path: Path) -> int:
    """Return how many lines are damaged. A last line that is cut short is not: its writing was interrupted."""
    return sum(bool(line.strip()) and _line(line) is None for line in _read_lines(path)[:-1])


def rewrite_lines(path: Path) -> None:
    """Write a file of lines again, without the damaged ones."""
    write_atomically(path, _to_lines(read_lines(path)))


def _to_lines(lines: Iterable[JsonObject]) -> bytes:
    text = "".join(json.dumps(seal(line), ensure_ascii=False) + "\n" for line in lines)
    return text.encode("utf-8", "backslashreplace")


def _read_lines(path: Path) -> list[bytes]:
    try:
        return read_bounded(path, MAX_JOURNAL).split(b"\n")
    except FileNotFoundError:
        return []
    except OSError as error:
        if error.errno not in NOT_A_FILE:
            raise
        raise CacheError(f"{path} {error.strerror}; delete it, and run the same cachefuse extract again") from error


def _line(data: bytes) -> JsonObject | None:
    """Return a line's values, or None if it is cut short or damaged."""
    with suppress(ValueError, AttributeError, CacheError, RecursionError):
        return unseal(json.loads(data), "a line")
    return None


FORMAT = 2  # version of the store; a reader refuses other versions
BLOCK_BYTES = 32 << 20  # the maximum of one block of a view
MIN_BLOCK_ROWS, MAX_BLOCK_ROWS = 64, 4096
CHUNKS_PER_BLOCK = 16
VIEWS = (POOLED, TOKENS, IDS, NGRAMS)
DTYPES = {"float16": "<f2", "float32": "<f4", "int8": "|i1", "int32": "<i4"}
FEATURE_DTYPES = ("float16", "float32", "int8")  # the user's choices; ids and n-grams are always int32
PIECE = 1 << 18  # bytes per step of a checksum: they stay in the processor's cache


def block_rows(n_rows: int, row_bytes: int) -> int:
    """Return the rows of one block: a power of two, so that blocks of different views begin at the same rows.

    A resumed extraction may repeat one block, so small datasets have small blocks.
    """
    max_rows = max(1, min(MAX_BLOCK_ROWS, BLOCK_BYTES // max(1, row_bytes)))
    preferred = max(MIN_BLOCK_ROWS, n_rows // 16)
    return 1 << (min(max_rows, preferred).bit_length() - 1)


def checksum(data: np.ndarray | bytes, value: int = 0) -> int:
    """Return the CRC-32C of some bytes. ``value`` is the checksum of the bytes before them."""
    view = data if isinstance(data, bytes) else np.ascontiguousarray(data).reshape(-1).view(np.uint8).data
    for start in range(0, len(view), PIECE):
        value = google_crc32c.extend(value, bytes(view[start : start + PIECE]))
    return value


def provenance_key(provenance: Mapping[str, str]) -> str:
    """Hash everything that the features depend on. The same key means the same features."""
    return hashlib.blake2b(_canonical(provenance), digest_size=16).hexdigest()


def differing_fields(old: Mapping[str, str], new: Mapping[str, str]) -> list[str]:
    """Return the provenance fields that differ, sorted."""
    return sorted(key for key in old.keys() | new.keys() if old.get(key) != new.get(key))


def seal(values: Mapping[str, object]) -> JsonObject:
    """Return values for a JSON file with their checksum, so that a changed byte is noticed."""
    return {**values, "checksum": checksum(_canonical(values))}


def unseal(sealed: Mapping[str, object], where: object) -> JsonObject:
    """Return sealed values without their checksum. Raises CacheError, naming ``where``, if the checksum is wrong."""
    values = {key: value for key, value in sealed.items() if key != "checksum"}
    if sealed.get("checksum") != checksum(_canonical(values)):
        raise CacheError(f"{where} is damaged: its checksum does not fit")
    return values


def _canonical(values: Mapping[str, object]) -> bytes:
    return json.dumps(values, sort_keys=True, ensure_ascii=False).encode("utf-8", "backslashreplace")
