import errno
import os
import pickle

import numpy as np
import pytest
from PIL import Image

from cachefuse.data.dataset import load_dataset
from cachefuse.data.manifest import load_manifest
from cachefuse.data.readers import cifar
from cachefuse.data.readers.cifar import CLASSES, CifarReader
from cachefuse.errors import BadSampleError, DataError, MissingDataError
from fixtures.columns import images_of
from fixtures.messages import naming

CIFAR10 = {f"data_batch_{i}.bin": [i, 9] for i in range(1, 6)} | {"test_batch.bin": [0]}
CIFAR100 = {"train.bin": [(1, 7), (19, 99)], "test.bin": [(0, 0)]}
NOISE = np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)


def row(labels, image=NOISE):
    """A row as published: the labels, then the red plane, the green one and the blue one."""
    planes = b"".join(image[:, :, channel].tobytes() for channel in range(3))
    return bytes(labels if isinstance(labels, tuple) else (labels,)) + planes


def write(folder, files):
    folder.mkdir(exist_ok=True, parents=True)
    for name, labels in files.items():
        (folder / name).write_bytes(b"".join(row(label, NOISE + i) for i, label in enumerate(labels)))


def load(root, name="cifar10"):
    return load_dataset(load_manifest(name)[0], root)


def read(root, variant="cifar10"):
    return CifarReader(variant=variant).read(root)


@pytest.mark.parametrize("folder", ["", "cifar-10-batches-bin"])
def test_cifar10(tmp_path, folder):
    write(tmp_path / folder, CIFAR10)
    (tmp_path / folder / "readme.html").write_text("")
    dataset = load(tmp_path)
    assert dataset.ids == [f"train-{i:05d}" for i in range(1, 11)] + ["test-00001"]
    assert dataset.splits.tolist() == ["train"] * 10 + ["test"]
    assert dataset.targets.tolist() == [1, 9, 2, 9, 3, 9, 4, 9, 5, 9, 0]
    assert dataset.classes == ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
    np.testing.assert_array_equal(np.asarray(images_of(dataset)[0].load()), NOISE)
    np.testing.assert_array_equal(np.asarray(images_of(dataset)[9].load()), NOISE + 1)
    assert images_of(dataset)[9].load().mode == "RGB"
    assert images_of(dataset)[9].name == f"{tmp_path / folder / 'data_batch_5.bin'}[1]"


@pytest.mark.parametrize("folder", ["", "cifar-100-binary"])
def test_cifar100_learns_the_fine_labels(tmp_path, folder):
    write(tmp_path / folder, CIFAR100)
    dataset = load(tmp_path, "cifar100")
    assert dataset.ids == ["train-00001", "train-00002", "test-00001"]
    assert [dataset.classes[i] for i in dataset.targets] == ["beetle", "worm", "apple"]
    assert len(dataset.classes) == 100
    np.testing.assert_array_equal(np.asarray(images_of(dataset)[1].load()), NOISE + 1)


def test_a_tenth_of_train_is_held_out(tmp_path):
    write(tmp_path, {name: [1] * 40 for name in CIFAR10})
    dataset = load(tmp_path)
    assert 5 <= dataset.splits.tolist().count("val") <= 40
    assert dataset.splits.tolist().count("test") == 40


@pytest.mark.parametrize(("variant", "n"), [("cifar10", 10), ("cifar100", 100)])
def test_built_in_names(variant, n):
    names = CLASSES[variant].split()
    assert len(set(names)) == n
    assert names == sorted(names)


def test_names_of_the_file(tmp_path):
    write(tmp_path, CIFAR10)
    (tmp_path / "batches.meta.txt").write_text("\n".join("abcdefghij") + "\n\n")
    assert load(tmp_path).classes == tuple("abcdefghij")
    (tmp_path / "batches.meta.txt").write_text("\n".join("abcdefghii"))
    with pytest.raises(DataError, match=naming("batches.meta.txt 10 9")):
        load(tmp_path)


def test_folders_of_images(tmp_path):
    for name in ("train/cat/1.png", "train/dog/1.png", "test/dog/2.png"):
        (tmp_path / name).parent.mkdir(parents=True)
        Image.fromarray(NOISE).save(tmp_path / name)
    dataset = load(tmp_path)
    assert dataset.ids == ["train/cat/1.png", "train/dog/1.png", "test/dog/2.png"]
    assert dataset.splits.tolist() == ["train", "train", "test"]
    assert dataset.classes == ("cat", "dog")
    np.testing.assert_array_equal(np.asarray(images_of(dataset)[2].load()), NOISE)


# What is not there, or not to be read


def test_missing(tmp_path):
    with pytest.raises(MissingDataError, match=naming("data_batch_1.bin train/<class>/ test/<class>/")):
        load(tmp_path)
    with pytest.raises(DataError, match=naming("data_batch_1.bin train/")):
        read(tmp_path)
    write(tmp_path / "cifar-10-batches-bin", CIFAR10)
    (tmp_path / "cifar-10-batches-bin/data_batch_3.bin").unlink()
    with pytest.raises(MissingDataError, match=naming("cifar-10-batches-bin/data_batch_3.bin")):
        load(tmp_path)


class Boobytrap:
    def __reduce__(self):
        return os.mkdir, ("executed",)


@pytest.mark.parametrize(
    ("variant", "name", "archive"),
    [
        ("cifar10", "data_batch_1", "cifar-10-binary.tar.gz"),
        ("cifar10", "batches.meta", "cifar-10-binary.tar.gz"),
        ("cifar10", "cifar-10-batches-py/data_batch_1", "cifar-10-binary.tar.gz"),
        ("cifar10", "cifar-10-python.tar.gz", "cifar-10-binary.tar.gz"),
        ("cifar100", "train", "cifar-100-binary.tar.gz"),
        ("cifar100", "meta", "cifar-100-binary.tar.gz"),
        ("cifar100", "cifar-100-python/train", "cifar-100-binary.tar.gz"),
        ("cifar100", "cifar-100-python.tar.gz", "cifar-100-binary.tar.gz"),
    ],
)
def test_the_python_version_is_refused_and_never_loaded(tmp_path, monkeypatch, variant, name, archive):
    monkeypatch.chdir(tmp_path)
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_bytes(pickle.dumps(Boobytrap()))
    names = naming(f"{name.partition('/')[0]} pickle {archive}")
    with pytest.raises(MissingDataError, match=names):
        load(tmp_path, variant)
    with pytest.raises(DataError, match=names):
        read(tmp_path, variant)
    assert not (tmp_path / "executed").exists()


def test_beside_the_binary_version_pickles_do_no_harm(tmp_path):
    write(tmp_path, CIFAR10)
    (tmp_path / "data_batch_1").write_bytes(b"\x80")
    assert len(load(tmp_path)) == 11


@pytest.mark.usefixtures("no_links_out")
@pytest.mark.parametrize("name", ["data_batch_2.bin", "batches.meta.txt", "cifar-10-batches-bin"])
def test_links_out_of_the_data_folder(tmp_path, name, move_out):
    root = tmp_path / "root"
    write(root / "cifar-10-batches-bin", CIFAR10)
    (root / "cifar-10-batches-bin/batches.meta.txt").write_text("\n".join("abcdefghij"))
    move_out(root / name if name == "cifar-10-batches-bin" else root / "cifar-10-batches-bin" / name)
    with pytest.raises(DataError, match="folder"):
        load(root)


# Files that are damaged


@pytest.mark.parametrize("n_bytes", [0, 1, 3072, 3073 * 2 - 1, 3073 * 2 + 1])
def test_a_file_that_is_no_whole_number_of_rows(tmp_path, n_bytes):
    write(tmp_path, CIFAR10)
    (tmp_path / "data_batch_2.bin").write_bytes(bytes(n_bytes))
    with pytest.raises(DataError, match=naming(f"data_batch_2.bin 3,073 {n_bytes:,}")):
        load(tmp_path)


def test_a_file_that_claims_to_be_huge(tmp_path):
    write(tmp_path, CIFAR10)
    os.truncate(tmp_path / "data_batch_2.bin", 3073 << 30)
    with pytest.raises(DataError, match=naming("data_batch_2.bin 3,073 536,870,912")):
        load(tmp_path)


@pytest.mark.parametrize(
    ("variant", "name", "labels", "message"),
    [
        ("cifar10", "data_batch_2.bin", [0, 10], "data_batch_2.bin 1 label 0 9 10"),
        ("cifar100", "train.bin", [(0, 100)], "train.bin 0 label 99 100"),
        ("cifar100", "test.bin", [(20, 3)], "test.bin 0 label 19 20"),
    ],
)
def test_a_label_out_of_range(tmp_path, variant, name, labels, message):
    write(tmp_path, CIFAR10 if variant == "cifar10" else CIFAR100)
    write(tmp_path, {name: labels})
    with pytest.raises(DataError, match=naming(message)):
        load(tmp_path, variant)


def test_labels_are_read_in_pieces(tmp_path, monkeypatch):
    monkeypatch.setattr(cifar, "ROWS_AT_ONCE", 3)
    write(tmp_path, {name: [i % 10 for i in range(7)] for name in CIFAR10})
    assert read(tmp_path).labels[:7] == [(name,) for name in CLASSES["cifar10"].split()[:7]]


def test_only_the_rows_own_bytes_are_read(tmp_path, monkeypatch):
    write(tmp_path, CIFAR10)
    asked = []
    monkeypatch.setattr(cifar, "read_file", lambda *arguments: asked.append(arguments) or bytes(3072))
    images_of(read(tmp_path))[3].load()
    assert asked == [(str(tmp_path / "data_batch_2.bin"), 3073 + 1, 3072)]


def test_a_file_that_changes_after_it_was_listed(tmp_path):
    write(tmp_path, CIFAR10)
    first, second = images_of(read(tmp_path))[:2]
    fingerprints, digests = (first.fingerprint(), second.fingerprint()), (first.digest(), second.digest())
    assert len({*fingerprints, *digests}) == 4
    os.truncate(tmp_path / "data_batch_1.bin", 3073 + 100)
    first.load()
    with pytest.raises(BadSampleError, match=naming("1")):
        second.load()
    assert first.fingerprint() != fingerprints[0]
    assert first.digest() == digests[0]
    assert second.digest() != digests[1]
    (tmp_path / "data_batch_1.bin").unlink()
    with pytest.raises(BadSampleError, match="file"):
        first.load()
    assert first.digest() == second.digest() != digests[0]


def test_a_disk_that_fails_stops_the_run(tmp_path, monkeypatch):
    write(tmp_path, CIFAR10)
    image = images_of(read(tmp_path))[0]

    def fail(*arguments, **options):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr("builtins.open", fail)
    with pytest.raises(OSError, match="Input/output error"):
        image.digest()
