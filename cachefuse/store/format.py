"""The layout of a store: names, block sizes, checksums, the provenance key, and journals of JSON lines."""

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import google_crc32c
import numpy as np

from cachefuse.errors import CacheError
from cachefuse.feature_spec import IDS, POOLED, TOKENS
from cachefuse.files import JsonObject, sync_folder


def append_lines(path: Path, lines: Iterable[JsonObject]) -> None:
    """Append lines and flush them to disk. A last line that was cut short is ended first."""
    text = "".join(json.dumps(seal(line), ensure_ascii=False) + "\n" for line in lines)
    data = text.encode("utf-8", "backslashreplace")
    if not data:
        return
    with path.open("ab+") as file:
        size = file.tell()
        if size:
            file.seek(-1, os.SEEK_END)
            data = data if file.read(1) == b"\n" else b"\n" + data
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    if not size:
        sync_folder(path.parent)


def read_lines(path: Path) -> Iterator[JsonObject]:
    """Yield the lines that are complete."""
    if not path.is_file():
        return
    for line in path.read_bytes().splitlines():
        try:
            yield unseal(json.loads(line), path)
        except (ValueError, AttributeError, CacheError):
            continue


FORMAT = 2  # version of the store; a reader refuses other versions
BLOCK_BYTES = 32 << 20  # the maximum of one block of a view
MIN_BLOCK_ROWS, MAX_BLOCK_ROWS = 64, 4096
CHUNKS_PER_BLOCK = 16
VIEWS = (POOLED, TOKENS, IDS)
DTYPES = {"float16": "<f2", "float32": "<f4", "int8": "|i1", "int32": "<i4"}
FEATURE_DTYPES = ("float16", "float32", "int8")  # the user's choices; ids are always int32
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
