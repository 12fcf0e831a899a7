"""The arrays of a store's samples on disk: written whole, read with their checksums."""

import json
import os
import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np
import zarr
from zarr.codecs import Crc32cCodec, ZstdCodec

from cachefuse.errors import CacheError
from cachefuse.files import JsonObject, read_bounded, sync_folder
from cachefuse.store.format import MAX_METADATA, append_lines, check_regular, checksum, seal, unseal

BAD_SAMPLES = "bad.jsonl"
CHUNK_ROWS = 1 << 16  # read and written at a time, so that a million ids are never in memory twice
KIND = "kind/"  # in the name of a column: a kind of samples, such as the type of a question
IDENTITY = ("id", "digest", "stamp")

Columns = dict[str, np.ndarray]


def read_column(path: Path, name: str) -> np.ndarray:
    """Return an array of the store at ``path``.

    Raises zarr-python's errors if files are cut short or changed, OSError if one is not regular, and ValueError if the
    checksum is wrong: zarr-python reads a missing chunk as zeros.
    """
    check_regular(path / "samples" / name)
    array = zarr.open_array(path / "samples" / name, mode="r", zarr_format=3)
    with suppress(CacheError):
        if array.shape[0] > read_about(path)["rows"] + 1:  # before memory is taken for so many
            raise ValueError(f"it has {array.shape[0]:,} rows")
    values = np.asarray(array[:])
    if array.attrs.get("checksum") != column_checksum(values):
        raise ValueError("its checksum does not fit")
    return values


def read_columns(path: Path) -> tuple[Columns, list[int] | None]:
    """Return the arrays of the store at ``path`` that are readable, and the rows at which samples were appended."""
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


def read_about(path: Path) -> JsonObject:
    """Return what the store at ``path`` notes on its samples: ``rows``, ``appended_at`` (rows), ``columns`` (names)."""
    file = path / "samples" / "zarr.json"
    try:
        return unseal(json.loads(read_bounded(file, MAX_METADATA))["attributes"], file)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CacheError(f"{file} is damaged ({error}); run the same cachefuse extract again") from error


def column_checksum(values: np.ndarray) -> int:
    """Return the CRC-32C of an array's shape and values."""
    value = checksum(str(values.shape).encode())
    for start in range(0, len(values), CHUNK_ROWS):
        chunk = values[start : start + CHUNK_ROWS]
        value = checksum("\0".join((*chunk.tolist(), "")).encode() if values.dtype.kind == "T" else chunk, value)
    return value


def n_listed(path: Path, modality: str) -> int:
    """Return how many samples without a usable ``modality`` the store at ``path`` lists at least."""
    with suppress(Exception):  # zarr-python raises many kinds of errors on changed metadata
        folder = path / "samples" / "present" / modality
        check_regular(folder)
        array = zarr.open_array(folder, mode="r", zarr_format=3)
        return int(str(array.attrs.get("listed", 0)))
    return 0


def has_column(path: Path, name: str) -> bool:
    """Whether the store at ``path`` has an array, even one that is damaged or lost."""
    with suppress(CacheError):
        return name in read_about(path)["columns"]
    return (path / "samples" / name).is_dir()


def write_samples(
    folder: Path,
    columns: Mapping[str, np.ndarray],
    appended: Sequence[int] = (),
    bad_samples: Sequence[JsonObject] = (),
) -> None:
    """Write a new group, with its list of bad samples, and flush it to disk.

    Every chunk has a checksum that any Zarr reader verifies. Every array has its own too, in case its metadata changes.
    """
    attributes = {"rows": len(columns["id"]), "appended_at": list(appended), "columns": sorted(columns)}
    group = zarr.open_group(folder, mode="w", attributes=seal(attributes))
    n_bad = Counter(f"present/{line['modality']}" for line in bad_samples)
    with zarr.config.set({"array.write_empty_chunks": True}):
        for name, values in columns.items():
            listed = {"listed": n_bad[name]} if n_bad[name] else {}
            chunks = (min(max(1, len(values)), CHUNK_ROWS), *values.shape[1:])
            array = group.create_array(
                name,
                shape=values.shape,
                chunks=chunks,
                dtype=values.dtype,
                compressors=[ZstdCodec(), Crc32cCodec()],
                attributes={"checksum": column_checksum(values), **listed},
            )
            array[:] = values
    append_lines(folder / BAD_SAMPLES, bad_samples)
    sync_tree(folder)


def replace_samples(
    path: Path, columns: Mapping[str, np.ndarray], appended: Sequence[int], bad_samples: Sequence[JsonObject]
) -> None:
    """Replace the samples of the store at ``path``, and its list of bad samples, in one step."""
    folder, new, old = path / "samples", path / ".samples.new", path / ".samples.old"
    write_samples(new, columns, appended, bad_samples)
    if folder.exists():
        os.replace(folder, old)
    os.replace(new, folder)
    sync_folder(path)
    shutil.rmtree(old, ignore_errors=True)


def finish_replacing(path: Path) -> None:
    """Complete ``replace_samples`` if it was killed. If the old group has gone, the new one is complete."""
    folder, new, old = path / "samples", path / ".samples.new", path / ".samples.old"
    if not folder.exists() and new.exists():
        os.replace(new, folder)
    for leftover in (new, old):
        shutil.rmtree(leftover, ignore_errors=True)


def same_columns(old: Columns, new: Columns) -> bool:
    """Whether two sets of columns are equal. NaN equals NaN, as in targets that are scores."""
    return old.keys() == new.keys() and all(
        old[name].dtype == values.dtype and np.array_equal(old[name], values, equal_nan=values.dtype.kind == "f")
        for name, values in new.items()
    )


def sync_tree(folder: Path) -> None:
    """Flush every file under a folder to disk, and the folders that name them."""
    for path in (*folder.rglob("*"), folder):
        if path.is_dir():
            sync_folder(path)
        else:
            with path.open("rb+") as file:
                os.fsync(file.fileno())


def strings(values: list[str] | np.ndarray) -> np.ndarray:
    """Return strings (N,) of any length."""
    return np.array(values).astype(np.dtypes.StringDType())
