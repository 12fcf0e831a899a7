"""Untrusted HDF5 files: sizes are limited, and no other file is ever opened."""

import math
import os
import posixpath
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path

import h5py

from cachefuse.data.column import TooLong, checked_text
from cachefuse.data.images import MAX_PIXELS, file_fingerprint
from cachefuse.errors import DataError
from cachefuse.files import open_regular
from cachefuse.limits import limits
from cachefuse.printable import listed, printable

MAX_STRING_BYTES = 1 << 28  # of a fixed length
SMALL_FILE = 1 << 20
MAX_CHUNK_BYTES = 1 << 29  # reading one row decompresses at most this
SLICE_BYTES = 1 << 26
SLICE_ROWS = 1 << 16
MAX_HOPS = 8

_HANDLES: dict[tuple[int, Path], tuple[str, h5py.File]] = {}
_HANDLES_LOCK = threading.Lock()


@contextmanager
def open_hdf5(path: Path) -> Iterator[h5py.File]:
    """Open a file for reading. Raises DataError if it is damaged, also for reads inside the block."""
    try:
        with open_regular(path):
            pass  # a regular file: the library opens its path
        with h5py.File(path, "r") as file:
            yield file
    except (OSError, RuntimeError, KeyError) as error:
        raise DataError(f"{path.name}: not a readable HDF5 file: {printable(error)}") from error


def open_shared(path: Path) -> h5py.File:
    """Return this process's handle of a file, a new one after the file has changed.

    It stays open, because opening takes longer than reading a row.
    """
    fingerprint = file_fingerprint(path)
    with _HANDLES_LOCK:
        key = (os.getpid(), path)  # a forked child needs its own handle
        if key not in _HANDLES or _HANDLES[key][0] != fingerprint:
            # Close the old handle first: HDF5 would share its cache of the old content.
            _HANDLES.pop(key, None)
            _HANDLES[key] = fingerprint, h5py.File(path, "r")
        return _HANDLES[key][1]


def find_dataset(file: h5py.File, key: str, hops: int = MAX_HOPS) -> h5py.Dataset:
    """Return the dataset under ``key``. Raises DataError if it is missing, or has data in another file."""
    name = file_name(file)
    steps = [step for step in key.split("/") if step not in ("", ".")]
    node = file
    for i, step in enumerate(steps):
        # Check each link before following it: an external link may open any file.
        link = node.get(step, getlink=True) if isinstance(node, h5py.Group) else None
        if link is None:
            where = "/".join([name, *steps[:i]])
            raise DataError(f"{name}: has no dataset {key!r}; {where} has: {_contents(node)}")
        if isinstance(link, h5py.SoftLink) and hops:
            target = posixpath.join(node.name, link.path, *steps[i + 1 :])
            return find_dataset(file, target, hops - 1)
        if not isinstance(link, h5py.HardLink):
            raise DataError(f"{name}: {key!r} is a link to another file, or an endless one; such links are not allowed")
        node = node[step]
    if not isinstance(node, h5py.Dataset):
        raise DataError(f"{name}: {key!r} is not a dataset; it has: {_contents(node)}")
    _check_dataset(node, name, key)
    return node


def _contents(node: object) -> str:
    return (listed(islice(node, 20)) if isinstance(node, h5py.Group) else "") or "nothing"


def _check_dataset(dataset: h5py.Dataset, name: str, key: str) -> None:
    if dataset.is_virtual or dataset.external:
        raise DataError(f"{name}: {key!r} has its data in other files, which is not allowed")
    if not dataset.shape:
        raise DataError(f"{name}: {key!r} must have one row per sample. Got a single value instead")
    if dataset.shape[0] > limits().rows:
        raise DataError(f"{name}: {key!r} has {dataset.shape[0]:,} rows, over the limit of {limits().rows:,}")
    if dataset.chunks and math.prod(dataset.chunks) * dataset.dtype.itemsize > MAX_CHUNK_BYTES:
        raise DataError(f"{name}: {key!r} is stored in chunks of over {MAX_CHUNK_BYTES:,} bytes")


def image_column(file: h5py.File, key: str, dtype: str) -> h5py.Dataset:
    """Return a dataset of images, (N, H, W, 3) or (N, 3, H, W). Raises DataError for other data."""
    dataset = find_dataset(file, key)
    shape = dataset.shape
    if len(shape) != 4 or 3 not in (shape[1], shape[3]) or 0 in shape[1:] or dataset.dtype != dtype:
        raise DataError(
            f"{file_name(file)}: {key!r} must be {dtype} images of shape (N, H, W, 3) or (N, 3, H, W). "
            f"Got {dataset.dtype} of shape {shape} instead"
        )
    if math.prod(shape[1:]) // 3 > MAX_PIXELS:
        raise DataError(
            f"{file_name(file)}: {key!r} has images of {shape[1:]}, over the limit of {MAX_PIXELS:,} pixels"
        )
    return dataset


def read_strings(dataset: h5py.Dataset, encoding: str) -> list[str]:
    """Read strings as ``read_texts`` does. Raises DataError for one that is over the limit of texts."""
    texts = read_texts(dataset, encoding)
    for row, text in enumerate(texts):
        if isinstance(text, TooLong):
            raise DataError(f"{file_name(dataset.file)}: {dataset.name.lstrip('/')!r} row {row} {text}")
    return [text for text in texts if isinstance(text, str)]


def read_texts(dataset: h5py.Dataset, encoding: str) -> list[str | TooLong]:
    """Read strings or whole numbers of shape (N,) or (N, 1) as N stripped strings.

    A row that is not valid in ``encoding`` is read as latin-1, which has a character for every byte.
    """
    name, dtype = f"{file_name(dataset.file)}: {dataset.name.lstrip('/')!r}", dataset.dtype
    if dtype.kind not in "Siu" and h5py.check_string_dtype(dtype) is None:
        raise DataError(f"{name} must hold strings or whole numbers. Got {dtype} instead")
    if dataset.shape[1:] not in ((), (1,)):
        raise DataError(f"{name} must have shape (N,) or (N, 1). Got {dataset.shape} instead")
    if dtype.itemsize > MAX_STRING_BYTES:
        raise DataError(f"{name} has strings of {dtype.itemsize:,} bytes; the limit is {MAX_STRING_BYTES:,}")
    # Slices limit the memory. They are small for strings of variable length, whose sizes are unknown before.
    few = os.path.getsize(dataset.file.filename) > SMALL_FILE
    most = (16 if few else 256) if dtype.kind == "O" else max(1, min(SLICE_ROWS, SLICE_BYTES // dtype.itemsize))
    texts: list[str | TooLong] = []
    step = most
    while len(texts) < len(dataset):
        values = dataset[len(texts) : len(texts) + step].ravel().tolist()
        read = [_text(value, encoding) for value in values]
        # After a long one, others may follow.
        step = 1 if any(isinstance(text, TooLong) for text in read) else min(most, 2 * step)
        texts += read
        del values
    return texts


def _text(value: bytes | str | int, encoding: str) -> str | TooLong:
    if isinstance(value, bytes) and len(value) > 2 * limits().text_bytes:
        value = value.strip(b" \t\r\n\0")
        if len(value) > 2 * limits().text_bytes:
            return TooLong(len(value))
    return checked_text(_decode(value, encoding).strip(" \t\r\n\0"))


def _decode(value: bytes | str | int, encoding: str) -> str:
    if not isinstance(value, bytes):
        return str(value)
    try:
        return value.decode(encoding)
    except UnicodeDecodeError:
        return value.decode("latin-1")


def file_name(file: h5py.File) -> str:
    """Return the file's name without its folder, for messages."""
    return Path(file.filename).name
