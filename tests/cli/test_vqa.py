"""Questions about images, as they are typed: datasets, extract, inspect and verify."""

import json

import numpy as np
import pytest
import torch

from cachefuse.data.answers import vqa_accuracy
from cachefuse.store.store import FeatureStore
from fixtures.messages import says

SPLITS = {"train2014": range(1, 13), "val2014": range(13, 17), "test2015": range(17, 20)}
N_QUESTIONS = 4  # about each image


@pytest.fixture
def questions(folder, write_vqa):
    """The answer to a question is its image's colour; the later ones are more at one about it."""

    def ask(image):
        colour = ["red", "green"][image % 2]
        return [(f"What colour is number {k}?", [colour] * (6 + k) + ["a rare one"] * (4 - k)) for k in range(4)]

    return write_vqa(folder, SPLITS, ask)


def test_the_dataset_is_listed(cachefuse, questions):
    rows = {row["name"]: row for row in json.loads(cachefuse("datasets", "--json", "--data-dir", questions).out)}
    assert rows["vqa2"]["data"] is True
    assert rows["vqa2"]["task"] == "vqa"
    assert rows["vqa2"]["rows"] == {"train": 443757, "val": 214354, "test": 447793}
    listed = cachefuse("datasets").out.splitlines()
    (row,) = [line.split() for line in listed if line.startswith("vqa2")]
    assert row == ["vqa2", "vqa", "1,105,904", "train,", "val,", "test", "no"]


def test_extract_keeps_each_image_once(cachefuse, questions, folder, fits):
    extract = ("extract", "--dataset", "vqa2", "--data-dir", questions, "--encoder", "classic")
    first = cachefuse(*extract)
    assert first.code == 0
    assert says(first.err, "vqa2 76 48 16 12 image text")
    assert says(first.err, "48 443,757")
    fits(first.out)
    counts = {row.split()[1]: row.split()[2:4] for row in first.out.splitlines() if row.startswith("classic")}
    assert counts == {"image": ["19", "19"], "text": ["76", "76"]}
    found = json.loads(cachefuse("inspect", "--json").out)
    assert [(view["modality"], view["shape"]) for view in found["views"]] == [
        ("image", [19, 724]),
        ("text", [76, 1024]),
    ]
    assert found["classes"] == ["green", "red", "rare 1"]
    assert found["present"] == {"image": 76, "text": 76}
    assert cachefuse("verify").code == 0
    again = json.loads(cachefuse(*extract, "--json").out)
    assert {group["computed"] for group in again["features"]} == {0}


def test_what_training_will_read(cachefuse, questions, folder):
    cachefuse("extract", "--dataset", "vqa2", "--data-dir", questions, "--encoder", "classic")
    store = FeatureStore(folder / "workspace/cache/vqa2.zarr")
    rows = store.feature_rows("image")
    np.testing.assert_array_equal(rows, np.repeat(np.arange(19), N_QUESTIONS))
    images = store.open_features("classic", "image").rows().index_select(0, torch.from_numpy(rows))
    assert images.shape == (76, 724)
    train = np.flatnonzero(store.splits == "train")
    assert store.targets.shape == (76, 10)
    majority = np.array([np.bincount(row[row >= 0]).argmax() for row in store.targets[train]])
    assert vqa_accuracy(majority, store.targets[train]).mean() == 1
    assert np.isnan(vqa_accuracy(np.zeros(12, int), store.targets[store.splits == "test"])).all()


def test_without_the_data_it_says_how_to_get_it(cachefuse):
    result = cachefuse("extract", "--dataset", "vqa2")
    assert result.code == 1
    assert says(result.err, "vqa2")
    assert says(result.err, "v2_Questions_Train_mscoco.zip")
    assert says(result.err, "v2_Questions_Train_mscoco.zip")


def test_what_reads_one_image_a_sample_says_why_it_can_t(cachefuse, questions):
    cachefuse("extract", "--dataset", "vqa2", "--data-dir", questions, "--encoder", "classic")
    error = cachefuse("align", "--epochs", "1").error
    assert error == "vqa2 has several samples per image, but here each sample needs its own"
