"""A shard that is written as a stream is what zarr-python would have written, and is there whole or not at all."""

import errno
import os
from pathlib import Path

import numpy as np
import pytest
import zarr

from cachefuse.extraction.extract import extract
from cachefuse.store.format import checksum
from cachefuse.store.shard import ShardWriter, check_index, chunk_rows, padded_rows, shard_bytes, shard_index
from cachefuse.store.views import declare_shards

EMPTY = 2**64 - 1  # what stands in the index for an inner chunk that was left out

SHAPES = [
    # rows of the shard, rows written, shape of a row, dtype
    (1, 1, (4,), "<f2"),
    (64, 64, (7,), "<f2"),
    (64, 5, (7,), "<f2"),
    (64, 0, (7,), "<f2"),
    (63, 63, (3,), "<f4"),
    (17, 17, (5,), "|i1"),
    (100, 99, (1,), "<f2"),
    (32, 20, (3, 5), "<f2"),
    (32, 32, (3, 5), "|i1"),
    (64, 64, (), "<f2"),
    (50, 21, (), "<f2"),
    (4096, 4000, (3,), "<f4"),
]


def random_rows(n, row_shape, dtype, seed=0):
    rng = np.random.default_rng(seed)
    return rng.integers(-100, 100, (n, *row_shape)).astype(dtype)


def write_shard(folder, rows, shard_rows, sizes=None):
    """Declare an array of one shard, and write rows to it, ``sizes`` at a time; return the shard's path."""
    declare_shards(folder, len(rows), shard_rows, rows.shape[1:], rows.dtype)
    path = folder.joinpath("c", *("0" for _ in rows.shape))
    with ShardWriter(folder / ".shard.partial") as writer:
        start = 0
        for size in sizes or [len(rows)]:
            writer.append(rows[start : start + size])
            start += size
        assert writer.n_rows == start == len(rows)
        size = writer.finish(path, shard_rows, rows.dtype.itemsize * int(np.prod(rows.shape[1:])))
        assert writer.crc == checksum(rows)
    assert size == path.stat().st_size
    return path


def random_sizes(n, seed):
    rng = np.random.default_rng(seed)
    cuts = np.sort(rng.integers(0, n + 1, 6))  # two at one place give a batch of no rows
    return np.diff([0, *cuts, n]).tolist()


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("shard_rows", "n", "row_shape", "dtype"), SHAPES)
def test_zarr_python_reads_what_was_appended_in_batches_of_any_size(tmp_path, shard_rows, n, row_shape, dtype, seed):
    rows = random_rows(n, row_shape, dtype, seed)
    write_shard(tmp_path / "array", rows, shard_rows, random_sizes(n, seed))
    read = zarr.open_array(tmp_path / "array", mode="r")
    assert read.dtype == np.dtype(dtype)
    np.testing.assert_array_equal(read[:], rows)
    for row in {0, n // 2, n - 1} if n else ():
        np.testing.assert_array_equal(read[row], rows[row])


# Of a shard with fewer rows zarr-python leaves out the inner chunks that have none.
FULL = [case for case in SHAPES if case[1] > padded_rows(case[0]) - chunk_rows(case[0])]


@pytest.mark.parametrize(("shard_rows", "n", "row_shape", "dtype"), FULL)
@pytest.mark.parametrize("kind", ["random", "zeros"])
def test_the_bytes_are_those_of_a_shard_by_zarr_python(tmp_path, shard_rows, n, row_shape, dtype, kind):
    rows = random_rows(n, row_shape, dtype) if kind == "random" else np.zeros((n, *row_shape), dtype)
    path = write_shard(tmp_path / "ours", rows, shard_rows)
    with zarr.config.set({"array.write_empty_chunks": True}):
        theirs = zarr.create_array(
            tmp_path / "theirs",
            shape=rows.shape,
            shards=(padded_rows(shard_rows), *row_shape),
            chunks=(chunk_rows(shard_rows), *row_shape),
            dtype=rows.dtype,
            compressors=None,
            fill_value=0,
        )
        theirs[:] = rows
    assert path.read_bytes() == (tmp_path / "theirs" / path.relative_to(tmp_path / "ours")).read_bytes()
    declared = [(tmp_path / name / "zarr.json").read_bytes() for name in ("ours", "theirs")]
    assert declared[0] == declared[1]


def test_a_shard_is_one_run_of_rows_then_padding_then_the_index(tmp_path):
    rows = random_rows(21, (3,), "<f2")
    data = write_shard(tmp_path, rows, 50).read_bytes()
    assert (chunk_rows(50), padded_rows(50)) == (4, 52)
    assert data[: rows.nbytes] == rows.tobytes()
    assert not any(data[rows.nbytes : 52 * 6])
    index = np.frombuffer(data[52 * 6 : -4], "<u8").reshape(13, 2)
    np.testing.assert_array_equal(index[:, 0], np.arange(13) * 24)
    assert set(index[:, 1].tolist()) == {24}
    assert len(data) == shard_bytes(50, 6)


# The index


def reordered(data, rows, row_bytes):
    """A shard with its inner chunks the other way round, and an index that says so."""
    size, n = chunk_rows(rows) * row_bytes, padded_rows(rows) // chunk_rows(rows)
    chunks = [data[i * size : (i + 1) * size] for i in range(n)]
    index = np.array([[(n - 1 - i) * size, size] for i in range(n)], "<u8").tobytes()
    return b"".join(reversed(chunks)) + index + checksum(index).to_bytes(4, "little")


def without_chunk(data, rows, row_bytes, left_out):
    """A shard whose index says that one inner chunk is empty."""
    entries = len(shard_index(rows, row_bytes)) - 4
    index = np.frombuffer(data[-entries - 4 : -4], "<u8").reshape(-1, 2).copy()
    index[left_out] = EMPTY
    return data[: -entries - 4] + index.tobytes() + checksum(index.tobytes()).to_bytes(4, "little")


def test_an_index_as_it_was_written_is_whole(tmp_path):
    path = write_shard(tmp_path, random_rows(64, (3,), "<f2"), 64)
    assert check_index(path, 64, 6) == "whole"


def test_another_valid_index_is_foreign(tmp_path):
    rows = random_rows(64, (3,), "<f2")
    path = write_shard(tmp_path, rows, 64)
    data = path.read_bytes()
    path.write_bytes(reordered(data, 64, 6))
    assert check_index(path, 64, 6) == "foreign"
    np.testing.assert_array_equal(zarr.open_array(tmp_path, mode="r")[:], rows)
    path.write_bytes(without_chunk(data, 64, 6, 15))
    assert check_index(path, 64, 6) == "foreign"
    assert not zarr.open_array(tmp_path, mode="r")[60:].any()  # a reader would take it for zeros


def test_an_index_with_any_bit_changed_is_damaged(tmp_path):
    path = write_shard(tmp_path, random_rows(4, (3,), "<f2"), 4)
    data, n = path.read_bytes(), len(shard_index(4, 6))
    for bit in range(8 * n):
        changed = bytearray(data)
        changed[len(data) - n + bit // 8] ^= 1 << bit % 8
        path.write_bytes(changed)
        assert check_index(path, 4, 6) == "damaged"


@pytest.mark.parametrize("left", [0, 1, 4, 20])
def test_a_shard_cut_short_is_damaged(tmp_path, left):
    path = write_shard(tmp_path, random_rows(4, (3,), "<f2"), 4)
    path.write_bytes(path.read_bytes()[:left])
    assert check_index(path, 4, 6) == "damaged"


# Whole or not at all


def there(folder):
    return sorted(path.name for path in folder.rglob("*") if path.is_file())


def test_nothing_is_left_of_a_shard_that_an_error_interrupts(tmp_path):
    def interrupted():
        with ShardWriter(tmp_path / ".shard.partial") as writer:
            writer.append(random_rows(8, (3,), "<f2"))
            assert there(tmp_path) == [".shard.partial"]
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert there(tmp_path) == []


class FullDisk:
    """A file on a disk that is full at one of the calls."""

    def __init__(self, file, call):
        self._file, self._call = file, call

    def __getattr__(self, name):
        if name == self._call:
            raise OSError(errno.ENOSPC, "No space left on device")
        return getattr(self._file, name)


@pytest.mark.parametrize("call", ["write", "truncate", "flush", "fileno", "close", "fsync", "replace"])
@pytest.mark.parametrize("begun", [b"", b"what was there before"])
def test_a_disk_that_is_full_leaves_what_was_there(tmp_path, monkeypatch, call, begun):
    path = tmp_path / "c" / "0" / "0"
    if begun:
        path.parent.mkdir(parents=True)
        path.write_bytes(begun)

    def full(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    def write():
        with ShardWriter(tmp_path / ".shard.partial") as writer:
            writer.append(random_rows(8, (3,), "<f2"))
            writer.finish(path, 8, 6)

    with (tmp_path / ".shard.partial").open("wb") as file, monkeypatch.context() as patch:
        if call in ("fsync", "replace"):
            patch.setattr(os, call, full)
        patch.setattr(Path, "open", lambda *_: FullDisk(file, call))
        with pytest.raises(OSError, match="No space left on device"):
            write()
    assert there(tmp_path) == (["0"] if begun else [])
    assert not begun or path.read_bytes() == begun


def test_a_shard_appears_in_its_place_only_when_it_is_whole_and_on_the_disk(tmp_path, monkeypatch):
    path, synced, replaced = tmp_path / "c" / "0" / "0", [], []
    fsync, replace = os.fsync, os.replace

    def note_fsync(file):
        synced.append(os.fstat(file).st_size)
        fsync(file)

    def note_replace(source, target):
        if target == path:
            assert synced[0] == source.stat().st_size == shard_bytes(8, 6)
            assert not path.exists()
            replaced.append(len(synced))
        replace(source, target)

    monkeypatch.setattr("os.fsync", note_fsync)
    monkeypatch.setattr("os.replace", note_replace)
    with ShardWriter(tmp_path / ".shard.partial") as writer:
        writer.append(random_rows(8, (3,), "<f2"))
        writer.finish(path, 8, 6)
    assert len(synced) > replaced[0]  # the folder's new name after the file
    assert there(tmp_path) == ["0"]


# Other readers


@pytest.mark.slow
def test_tensorstore_reads_every_array_of_a_store(shapes, tmp_path, toy):
    tensorstore = pytest.importorskip("tensorstore")
    n_arrays = 0
    for name, dtype in (("plain", "float16"), ("quantised", "int8")):
        store = tmp_path / f"{name}.zarr"
        extract(shapes, ["toy"], store, views=("pooled", "tokens"), device="cpu", dtype=dtype, batch_size=16)
        for file in (store / "features").rglob("zarr.json"):
            array = zarr.open(file.parent, mode="r")
            if isinstance(array, zarr.Array):
                spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": str(file.parent)}}
                read = tensorstore.open(spec, read=True).result().read().result()
                np.testing.assert_array_equal(read, array[:])
                assert read.dtype == array.dtype
                assert np.any(read)
                n_arrays += 1
    # pooled, tokens (two blocks where they are ragged) and offsets; scales beside quantised tokens
    assert n_arrays == (2 + 4) + (3 + 6)
