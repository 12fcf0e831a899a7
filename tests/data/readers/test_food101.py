import numpy as np
import pytest
from PIL import Image

from cachefuse.data.dataset import load_dataset
from cachefuse.data.manifest import load_manifest
from cachefuse.errors import BadSampleError, DataError, MissingDataError
from fixtures.columns import images_of, texts_of
from fixtures.messages import naming, says

TRAIN = """\
apple_pie_0.jpg,"Apple Pie, the ""classic"" one",apple_pie
apple_pie_1.jpg,Grandma's apple pie | Crème fraîche,apple_pie
waffles_7.jpg,Waffles,waffles
"""
TEST = "waffles_9.jpg,Belgian waffles,waffles\n"


def write(folder, train=TRAIN, test=TEST):
    (folder / "texts").mkdir()
    (folder / "texts/train_titles.csv").write_text(train, encoding="utf-8")
    (folder / "texts/test_titles.csv").write_text(test, encoding="utf-8")
    for split, dish, file in (
        ("train", "apple_pie", "apple_pie_0"),
        ("train", "waffles", "waffles_7"),
        ("test", "waffles", "waffles_9"),
    ):
        path = folder / "images" / split / dish / f"{file}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (12, 9), (200, 100, 50)).save(path, quality=95)


def load(folder):
    manifest, _ = load_manifest("food101")
    return load_dataset(manifest, folder)


def test_food101_in_its_true_layout(tmp_path):
    write(tmp_path)
    dataset = load(tmp_path)
    assert dataset.ids == [
        "train/apple_pie_0.jpg",
        "train/apple_pie_1.jpg",
        "train/waffles_7.jpg",
        "test/waffles_9.jpg",
    ]
    assert set(dataset.splits[:3]) <= {"train", "val"}
    assert dataset.splits[3] == "test"
    assert dataset.classes == ("apple_pie", "waffles")
    assert dataset.targets.tolist() == [0, 0, 1, 1]
    assert texts_of(dataset)[0] == ('Apple Pie, the "classic" one',)
    assert texts_of(dataset)[1] == ("Grandma's apple pie | Crème fraîche",)
    assert says("\n".join(dataset.notes), "3 67,971")
    pixels = np.asarray(images_of(dataset)[3].load(), int)
    assert pixels.shape == (9, 12, 3)
    assert np.abs(pixels - [200, 100, 50]).max() <= 3


def test_absent_and_broken_images_are_bad_samples(tmp_path):
    write(tmp_path)
    (tmp_path / "images/train/waffles/waffles_7.jpg").write_text("<html>not found</html>")
    dataset = load(tmp_path)
    with pytest.raises(BadSampleError, match="file"):
        images_of(dataset)[1].load()
    with pytest.raises(BadSampleError, match="image"):
        images_of(dataset)[2].load()


def test_names_that_leave_the_folder_are_not_opened(tmp_path):
    root = tmp_path / "food"
    root.mkdir()
    write(root, test="../../../../secret.jpg,title,waffles\n")
    Image.new("RGB", (4, 4)).save(tmp_path / "secret.jpg")
    with pytest.raises(BadSampleError, match="folder"):
        images_of(load(root))[3].load()


def test_val_is_a_small_part_of_train(tmp_path):
    rows = "".join(f"waffles_{i}.jpg,title {i},waffles\n" for i in range(2000))
    write(tmp_path, train=rows)
    dataset = load(tmp_path)
    assert 100 < (dataset.splits == "val").sum() < 200
    assert (dataset.splits == "test").sum() == 1


def test_row_with_too_few_columns(tmp_path):
    write(tmp_path, test="waffles_9.jpg,Belgian waffles\n")
    with pytest.raises(DataError, match=naming("test_titles.csv")):
        load(tmp_path)


def test_missing_titles(tmp_path):
    with pytest.raises(MissingDataError, match=naming("texts/train_titles.csv")):
        load(tmp_path)
