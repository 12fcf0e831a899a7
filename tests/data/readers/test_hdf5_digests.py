import errno
import os

import h5py
import numpy as np
import pytest

from cachefuse.data.readers import hdf5
from cachefuse.data.readers.hdf5 import ArrayImage

IMAGES = np.random.default_rng(0).integers(0, 256, (3, 6, 5, 3), np.uint8)


@pytest.fixture
def path(tmp_path):
    return write(tmp_path / "train.h5", IMAGES)


def write(path, values, **options):
    with h5py.File(path, "w") as file:
        file.create_dataset("pixels", data=values, **options)
    return path


def edited(row):
    images = IMAGES.copy()
    images[row, 0, 0, 0] ^= 1
    return images


def later(path):
    """Set a file's time as a later edit would, whatever the clock's grain."""
    os.utime(path, ns=(0, path.stat().st_mtime_ns + 1_000_000))


def sources(path, n=3):
    return [ArrayImage(path, "pixels", row) for row in range(n)]


def fingerprints(path):
    return [source.fingerprint() for source in sources(path)]


def digests(path):
    return [source.digest() for source in sources(path)]


def replace_file(path):
    new = write(path.with_name("new.h5"), edited(1))
    os.utime(new, ns=(0, path.stat().st_mtime_ns + 1_000_000))
    new.replace(path)


def patch_bytes(path):
    with h5py.File(path, "r") as file:
        offset = file["pixels"].id.get_offset() + IMAGES[0].nbytes
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(bytes([IMAGES[1, 0, 0, 0] ^ 1]))
    later(path)


def rewrite_in_place(path):
    """Everything lies elsewhere in the file now: what HDF5 keeps of the old content would be wrong."""
    new = write(path.with_name("new.h5"), edited(1), chunks=(1, 6, 5, 3), compression="gzip", shuffle=True)
    path.write_bytes(new.read_bytes())
    later(path)


@pytest.mark.parametrize("change", [replace_file, patch_bytes, rewrite_in_place])
def test_an_edited_row_is_noticed_by_the_process_that_read_the_old_one(path, change, n_open):
    old_stamps, old_digests, size = fingerprints(path), digests(path), path.stat().st_size
    assert len(set(old_stamps)) == len(set(old_digests)) == 3
    change(path)
    assert (path.stat().st_size == size) == (change is not rewrite_in_place)
    assert not set(fingerprints(path)) & set(old_stamps)
    assert [new != old for new, old in zip(digests(path), old_digests, strict=True)] == [False, True, False]
    np.testing.assert_array_equal(np.asarray(ArrayImage(path, "pixels", 1).load()), edited(1)[1])
    assert n_open(path) == 1


def test_a_changed_file_is_closed_before_it_is_opened_again(path, n_open):
    for _ in range(5):
        replace_file(path)
        digests(path)
        assert n_open(path) == 1


def test_touching_changes_only_the_stamps(path):
    old_stamps, old_digests = fingerprints(path), digests(path)
    later(path)
    assert not set(fingerprints(path)) & set(old_stamps)
    assert digests(path) == old_digests


def test_digests_are_of_the_values_alone(path, tmp_path):
    expected = digests(path)
    (tmp_path / "folder").mkdir()
    packed = write(tmp_path / "folder/other.h5", IMAGES, chunks=(2, 6, 5, 3), compression="gzip")
    assert digests(packed) == expected
    again = write(tmp_path / "again.h5", IMAGES[[1, 1, 0]])
    assert digests(again) == [expected[1], expected[1], expected[0]]


class Int32Image(ArrayImage):
    DTYPE = "int32"


class Uint32Image(ArrayImage):
    DTYPE = "uint32"


def test_shape_and_dtype_are_in_the_digest(tmp_path):
    rows = []
    for kind, shape in enumerate([(3, 4, 6), (3, 6, 4), (4, 6, 3), (6, 4, 3)]):
        path = write(tmp_path / f"{kind}.h5", np.zeros((1, *shape), np.uint8))
        rows.append(ArrayImage(path, "pixels", 0))
    for image in (Int32Image, Uint32Image):
        path = write(tmp_path / f"{image.DTYPE}.h5", np.zeros((1, 3, 2, 3), image.DTYPE))
        rows.append(image(path, "pixels", 0))
    assert len({row.digest() for row in rows}) == 6


def test_what_can_not_be_read_has_a_digest_until_it_can(path):
    expected = digests(path)
    content = path.read_bytes()
    path.unlink()
    absent = fingerprints(path), digests(path)
    assert len(set(absent[1])) == 1
    path.write_bytes(b"not hdf5")
    broken = fingerprints(path), digests(path)
    assert not set(broken[0]) & set(absent[0])
    path.write_bytes(content)
    assert not set(fingerprints(path)) & {*absent[0], *broken[0]}
    assert digests(path) == expected
    assert not set(expected) & {*absent[1], *broken[1]}
    assert ArrayImage(path, "pixels", 3).digest() == ArrayImage(path, "none", 0).digest() == absent[1][0]


def test_a_failing_machine_is_neither_a_digest_nor_a_bad_sample(path, monkeypatch):
    def fail(*_):
        raise OSError(errno.EIO, "Input/output error")

    source = ArrayImage(path, "pixels", 0)
    monkeypatch.setattr(hdf5, "open_shared", fail)
    for read in (source.digest, source.load):
        with pytest.raises(OSError, match="Input/output error"):
            read()
    monkeypatch.setattr(os, "stat", fail)
    with pytest.raises(OSError, match="Input/output error"):
        source.fingerprint()
