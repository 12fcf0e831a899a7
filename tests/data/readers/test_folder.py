import numpy as np
import pytest
from PIL import Image

from cachefuse.data.dataset import load_dataset
from cachefuse.data.manifest import load_manifest
from cachefuse.errors import DataError, MissingDataError
from fixtures.columns import images_of
from fixtures.messages import says

MANIFEST = """
name = "pets"
task = "multiclass"

[reader]
kind = "folder"
"""
SPLITS = 'splits = { train = "train", test = "test" }\n'


def save(path, colour=(200, 100, 50)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (12, 9), colour).save(path)


def load(root, options=""):
    (root / "pets.toml").write_text(MANIFEST + options)
    manifest, folder = load_manifest(str(root / "pets.toml"))
    return load_dataset(manifest, folder)


def test_classes_straight_under_the_root(tmp_path):
    save(tmp_path / "dog/2.PNG", (1, 2, 3))
    save(tmp_path / "cat/b.jpeg")
    save(tmp_path / "cat/A.JPG")
    (tmp_path / "cat/notes.txt").write_text("not an image")
    (tmp_path / "cat/.hidden.jpg").write_text("")
    save(tmp_path / ".cache/c.jpg")
    (tmp_path / "empty").mkdir()
    dataset = load(tmp_path)
    assert dataset.ids == ["cat/A.JPG", "cat/b.jpeg", "dog/2.PNG"]
    assert dataset.splits.tolist() == ["train"] * 3
    assert dataset.classes == ("cat", "dog")
    assert dataset.targets.tolist() == [0, 0, 1]
    assert tuple(dataset.modalities) == ("image",)
    np.testing.assert_array_equal(np.asarray(images_of(dataset)[2].load())[0, 0], [1, 2, 3])


def test_splits_are_sub_folders_and_a_flat_one_is_unlabelled(tmp_path):
    save(tmp_path / "train/dog/1.jpg")
    save(tmp_path / "train/cat/images/deep.JPEG")
    save(tmp_path / "test/1.jpg")
    dataset = load(tmp_path, SPLITS)
    assert dataset.ids == ["train/cat/images/deep.JPEG", "train/dog/1.jpg", "test/1.jpg"]
    assert dataset.splits.tolist() == ["train", "train", "test"]
    assert dataset.classes == ("cat", "dog")
    assert dataset.targets.tolist() == [0, 1, -1]


@pytest.mark.usefixtures("no_links_out")
def test_nothing_outside_the_root_is_read(tmp_path):
    root = tmp_path / "root"
    save(root / "cat/1.jpg")
    save(tmp_path / "outside/secret.jpg")
    (root / "cat/2.jpg").symlink_to(tmp_path / "outside/secret.jpg")
    (root / "cat/3.jpg").symlink_to(root / "cat/1.jpg")
    (root / "dog").symlink_to(tmp_path / "outside")
    dataset = load(root)
    assert dataset.ids == ["cat/1.jpg", "cat/3.jpg"]
    assert says("\n".join(dataset.notes), "2 folder cat/2.jpg")


@pytest.mark.usefixtures("no_links_out")
def test_split_folder_that_is_a_link_out_of_the_root(tmp_path):
    root = tmp_path / "root"
    root.mkdir()
    save(tmp_path / "outside/cat/1.jpg")
    (root / "link").symlink_to(tmp_path / "outside")
    with pytest.raises(DataError, match="folder"):
        load(root, 'splits = { train = "link" }\n')


def test_folder_without_images(tmp_path):
    save(tmp_path / "train/dog/1.jpg")
    (tmp_path / "test").mkdir()
    with pytest.raises(DataError, match="test"):
        load(tmp_path, SPLITS)


def test_missing_split_folder(tmp_path):
    save(tmp_path / "train/dog/1.jpg")
    with pytest.raises(MissingDataError, match="test/"):
        load(tmp_path, SPLITS)


def test_no_labels_at_all(tmp_path):
    save(tmp_path / "1.jpg")
    with pytest.raises(DataError, match="label"):
        load(tmp_path)
