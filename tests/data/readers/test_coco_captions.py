import json

import numpy as np
import pytest
from PIL import Image

from cachefuse.data.dataset import load_dataset
from cachefuse.data.manifest import load_manifest
from cachefuse.data.readers import coco_captions
from cachefuse.data.readers.coco_captions import CocoCaptionsReader
from cachefuse.errors import BadSampleError, DataError, MissingDataError
from fixtures.columns import images_of, texts_of
from fixtures.messages import naming, says

CAPTIONS = {9: ["A dog.\n", " ", "A brown dog"], 25: ["Two giraffes"], 30: []}


def write(root, split="train", year=2017, captions=CAPTIONS, folder="", **changes):
    """Write a division's annotations, with the fields that COCO has and are not read, and its images."""
    (root / "annotations").mkdir(parents=True, exist_ok=True)
    images = root / folder / f"{split}{year}"
    images.mkdir(parents=True)
    for key in captions:
        Image.new("RGB", (4, 3), (key, 0, 0)).save(images / f"{key:012d}.jpg", quality=95)
    content = {
        "info": {"year": year},
        "licenses": [{"id": 1, "name": "BY"}],
        "images": [
            {"license": 1, "file_name": f"{key:012d}.jpg", "coco_url": "http://", "height": 3, "width": 4, "id": key}
            for key in captions
        ],
        "annotations": [
            {"image_id": key, "id": i, "caption": text}
            for key, texts in captions.items()
            for i, text in enumerate(texts)
        ],
    }
    (root / f"annotations/captions_{split}{year}.json").write_text(json.dumps(content | changes))


def load(root):
    return load_dataset(load_manifest("coco_captions")[0], root)


def read(root):
    return CocoCaptionsReader().read(root)


def test_one_sample_an_image(tmp_path):
    write(tmp_path)
    write(tmp_path, "val", captions={42: ["A cat", "A grey cat"]})
    dataset = load(tmp_path)
    assert dataset.ids == ["9", "25", "30", "42"]
    assert dataset.splits.tolist() == ["train", "train", "train", "val"]
    assert texts_of(dataset) == [("A dog.", "A brown dog"), ("Two giraffes",), (), ("A cat", "A grey cat")]
    assert dataset.classes == ()
    assert images_of(dataset)[1].path == tmp_path / "train2017/000000000025.jpg"
    assert np.abs(np.asarray(images_of(dataset)[3].load(), int)[0, 0] - [42, 0, 0]).max() <= 3


@pytest.mark.parametrize("folder", ["", "images"])
def test_the_division_of_2014(tmp_path, folder):
    write(tmp_path, year=2014, folder=folder)
    write(tmp_path, "val", year=2014, folder=folder, captions={42: ["A cat"]})
    dataset = load(tmp_path)
    assert dataset.splits.tolist() == ["train"] * 3 + ["val"]
    assert images_of(dataset)[3].load().size == (4, 3)


def test_of_both_divisions_that_of_2017_is_taken(tmp_path):
    for year in (2014, 2017):
        write(tmp_path, year=year, captions={year % 100: [f"of {year}"]})
        write(tmp_path, "val", year=year, captions={42: ["A cat"]})
    samples = read(tmp_path)
    assert texts_of(samples) == [("of 2017",), ("A cat",)]
    (note,) = samples.notes
    assert says(note, "2017 2014")


def test_the_division_that_is_whole_is_taken(tmp_path):
    write(tmp_path, "val", year=2017)
    write(tmp_path, year=2014, captions={42: ["A cat"]})
    write(tmp_path, "val", year=2014, captions={43: ["A cat"]})
    assert read(tmp_path).ids == ["42", "43"]


def test_a_split_without_its_folder_is_left_out(tmp_path):
    write(tmp_path)
    write(tmp_path, "val", captions={42: ["A cat"]})
    (tmp_path / "train2017").rename(tmp_path / "elsewhere")
    samples = read(tmp_path)
    assert samples.ids == ["42"]
    (note,) = samples.notes
    assert says(note, "train annotations/captions_train2017.json train2017/")


def test_missing(tmp_path):
    names = "annotations/captions_train2017.json train2017/ annotations/captions_val2017.json"
    with pytest.raises(MissingDataError, match=naming(names)):
        load(tmp_path)
    write(tmp_path)
    (tmp_path / "train2017").rename(tmp_path / "elsewhere")
    with pytest.raises(MissingDataError, match="train2017/"):
        load(tmp_path)
    with pytest.raises(DataError, match=naming("train2017/ annotations/captions_val2017.json val2017/")):
        read(tmp_path)


def test_an_image_file_that_is_absent_is_a_bad_sample(tmp_path):
    write(tmp_path)
    (tmp_path / "train2017/000000000009.jpg").unlink()
    with pytest.raises(BadSampleError, match="file"):
        images_of(read(tmp_path))[0].load()


def test_captions_of_unknown_images_are_counted(tmp_path):
    write(tmp_path, annotations=[{"image_id": key, "caption": "a"} for key in (9, 77, 77, 78)])
    samples = read(tmp_path)
    assert texts_of(samples) == [("a",), (), ()]
    assert says("\n".join(samples.notes), "3 captions_train2017.json 77")


def test_ids_may_be_strings_and_odd_unicode_can_be_encoded(tmp_path):
    images = [{"id": "a\ud800", "file_name": "x\ud800.jpg"}]
    write(tmp_path, images=images, annotations=[{"image_id": "a\ud800", "caption": "\udfff dog"}])
    samples = read(tmp_path)
    assert samples.ids == ["a?"]
    assert texts_of(samples) == [("? dog",)]
    with pytest.raises(BadSampleError, match="file"):
        images_of(samples)[0].load()


def test_an_image_that_is_listed_twice(tmp_path):
    write(tmp_path, images=[{"id": key, "file_name": "a.jpg"} for key in (9, "9")])
    with pytest.raises(DataError, match=naming("id 9 2")):
        load(tmp_path)


def test_an_image_of_both_splits(tmp_path):
    write(tmp_path)
    write(tmp_path, "val", captions={25: ["Two giraffes"]})
    with pytest.raises(DataError, match=naming("id 25 2")):
        load(tmp_path)


# What could lead out of the folder


@pytest.mark.parametrize(
    "name", ["../secret.jpg", "/etc/passwd", "a/b.jpg", "..\\secret.jpg", "..", ".", "", "a\0.jpg", 3, None, ["a.jpg"]]
)
def test_a_file_name_that_is_a_path(tmp_path, name):
    write(tmp_path, images=[{"id": 9, "file_name": "a.jpg"}, {"id": 10, "file_name": name}])
    with pytest.raises(DataError, match=naming("captions_train2017.json image 2 file_name")):
        read(tmp_path)


@pytest.mark.usefixtures("no_links_out")
def test_links_out_of_the_data_folder_are_not_followed(tmp_path):
    root = tmp_path / "root"
    write(root)
    (tmp_path / "secret.jpg").write_bytes((root / "train2017/000000000009.jpg").read_bytes())
    (root / "train2017/000000000009.jpg").unlink()
    (root / "train2017/000000000009.jpg").symlink_to(tmp_path / "secret.jpg")
    (root / "train2017/000000000025.jpg").unlink()
    (root / "train2017/000000000025.jpg").symlink_to("000000000030.jpg")
    samples = read(root)
    assert images_of(samples)[0] is None
    assert images_of(samples)[1].load().size == (4, 3)
    assert any(says(note, "1 train2017/000000000009.jpg") for note in samples.notes)


@pytest.mark.usefixtures("no_links_out")
@pytest.mark.parametrize("name", ["train2017", "annotations", "annotations/captions_train2017.json"])
def test_folders_and_files_that_are_links_out_of_the_data_folder(tmp_path, name, move_out):
    root = tmp_path / "root"
    write(root)
    move_out(root / name)
    with pytest.raises(DataError, match="folder"):
        read(root)


# Files that are otherwise


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "JSON"),
        (b'{"images": [', "JSON"),
        (b'{"images": "\xff"}', "JSON utf-8"),
        (b"[" * 100_000, "JSON"),
        (b"\x80\x04\x95pickle", "JSON"),
        (b"[]", "JSON images"),
        (b"{}", "JSON images"),
        (b'{"images": [], "annotations": {}}', "JSON annotations"),
        (b'{"images": [3], "annotations": []}', "JSON images"),
        (
            b'{"images": [{"file_name": "a.jpg"}], "annotations": []}',
            "image 1 id",
        ),
        (
            b'{"images": [{"id": true, "file_name": "a"}], "annotations": []}',
            "image 1 id",
        ),
        (b'{"images": [], "annotations": [{"caption": "a"}]}', "annotation 1 image_id"),
        (b'{"images": [], "annotations": [{"image_id": 1}]}', "annotation 1 caption None"),
        (b'{"images": [], "annotations": [{"image_id": 1.5, "caption": ""}]}', "annotation 1 image_id"),
    ],
)
def test_files_that_are_not_of_coco(tmp_path, data, message):
    write(tmp_path)
    (tmp_path / "annotations/captions_train2017.json").write_bytes(data)
    with pytest.raises(DataError, match=naming(f"captions_train2017.json {message}")) as caught:
        read(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_file_that_is_too_large_is_not_read(tmp_path, monkeypatch):
    write(tmp_path)
    monkeypatch.setattr(coco_captions, "MAX_JSON_BYTES", 100)
    with pytest.raises(DataError, match=naming("captions_train2017.json 100 COCO")):
        read(tmp_path)
