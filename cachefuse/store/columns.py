"""The arrays of a store's samples on disk: written whole, read with their checksums."""

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from zarr.codecs import Crc32cCodec, ZstdCodec

from cachefuse.errors import CacheError
from cachefuse.files import sync_folder
from cachefuse.store.format import append_lines, checksum, seal, unseal

BAD_SAMPLES = "bad.jsonl"
CHUNK_ROWS = 1 << 16  # read and written at a time, so that a million ids never stand in memory twice
IDENTITY = ("id", "digest", "stamp")

Columns = dict[str, np.ndarray]


def read_column(path: Path, name: str) -> np.ndarray:
    """Return an array of the store at ``path``. Raises whatever zarr-python does where files were cut short or changed,
    and ValueError where all reads well and is not what was written: a chunk that is gone would read as zeros."""
    array: Any = zarr.open_array(path / "samples" / name, mode="r")
    values = np.asarray(array[:])
    if array.attrs["checksum"] != column_checksum(values):
        raise ValueError("its checksum does not fit")
    return values


def read_columns(path: Path) -> tuple[Columns, list[int] | None]:
    """Return the arrays of the store at ``path`` that can be read, and the rows at which samples were appended."""
    folder = path / "samples"
    columns: Columns = {}
    appended = None
    for file in folder.rglob("zarr.json"):
        name = str(file.parent.relative_to(folder))
        with suppress(Exception):
            columns[name] = read_column(path, name)
    with suppress(CacheError):
        appended = read_about(path)["appended_at"]
    return columns, appended


def read_about(path: Path) -> dict[str, Any]:
    """Return what the store at ``path`` says of its samples: ``rows``, those ``appended_at`` a time, ``columns``."""
    file = path / "samples" / "zarr.json"
    try:
        return unseal(json.loads(file.read_bytes())["attributes"], file)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CacheError(f"{file} is damaged ({error}); run the same cachefuse extract again") from error


def column_checksum(values: np.ndarray) -> int:
    """Return the CRC-32C of an array's shape and values."""
    value = checksum(str(values.shape).encode())
    for start in range(0, len(values), CHUNK_ROWS):
        part = values[start : start + CHUNK_ROWS]
        value = checksum("\0".join((*part.tolist(), "")).encode() if values.dtype.kind == "T" else part, value)
    return value


def has_column(path: Path, name: str) -> bool:
    """Whether the store at ``path`` has an array, be it damaged or lost."""
    with suppress(CacheError):
        return name in read_about(path)["columns"]
    return (path / "samples" / name).is_dir()


def write_samples(folder: Path, columns: Mapping[str, np.ndarray], appended: Sequence[int] = ()) -> None:
    """Write the group anew and have it on the disk; every chunk has a checksum that any Zarr reader verifies, and every
    array one of its own, for what its metadata might come to say."""
    about = {"rows": len(columns["id"]), "appended_at": list(appended), "columns": sorted(columns)}
    group = zarr.open_group(folder, mode="w", attributes=seal(about))
    with zarr.config.set({"array.write_empty_chunks": True}):
        for name, values in columns.items():
            chunks = (min(max(1, len(values)), CHUNK_ROWS), *values.shape[1:])
            array = group.create_array(
                name,
                shape=values.shape,
                chunks=chunks,
                dtype=values.dtype,
                compressors=[ZstdCodec(), Crc32cCodec()],
                attributes={"checksum": column_checksum(values)},
            )
            array[:] = values
    sync_tree(folder)


def replace_samples(
    path: Path, columns: Mapping[str, np.ndarray], appended: Sequence[int], bad_samples: Sequence[dict[str, Any]]
) -> None:
    """Put a whole new group, with the lines of a ledger, in the place of the one of the store at ``path``."""
    folder, new, old = path / "samples", path / ".samples.new", path / ".samples.old"
    write_samples(new, columns, appended)
    append_lines(new / BAD_SAMPLES, bad_samples)
    if folder.exists():
        os.replace(folder, old)
    os.replace(new, folder)
    sync_folder(path)
    shutil.rmtree(old, ignore_errors=True)


def finish_replacing(path: Path) -> None:
    """Complete what was killed: without the old group the new one is whole and only has to take its place."""
    folder, new, old = path / "samples", path / ".samples.new", path / ".samples.old"
    if not folder.exists() and new.exists():
        os.replace(new, folder)
    for left in (new, old):
        shutil.rmtree(left, ignore_errors=True)


def same_columns(old: Columns, new: Columns) -> bool:
    """Whether the store has these columns already; of targets that are scores, those that are NaN stay so."""
    return old.keys() == new.keys() and all(
        old[name].dtype == values.dtype and np.array_equal(old[name], values, equal_nan=values.dtype.kind == "f")
        for name, values in new.items()
    )


def sync_tree(folder: Path) -> None:
    """Have every file under a folder on the disk, and their names."""
    for path in (*folder.rglob("*"), folder):
        if path.is_dir():
            sync_folder(path)
        else:
            with path.open("rb+") as file:
                os.fsync(file.fileno())


def strings(values: list[str] | np.ndarray) -> np.ndarray:
    """Return strings (N,) of any length."""
    return np.array(values).astype(np.dtypes.StringDType())
