"""Pairs of sentences in a store: scores, of which some are absent, and samples of which one sentence can't be used."""

from dataclasses import replace

import numpy as np
import pytest

from cachefuse.data.dataset import load_dataset
from cachefuse.data.manifest import parse_manifest
from cachefuse.errors import ConfigError
from cachefuse.extraction.extract import extract
from cachefuse.extraction.open_store import open_store
from cachefuse.store.store import FeatureStore
from cachefuse.training.config import TrainConfig
from cachefuse.training.data import open_training_data
from cachefuse.training.resolved import resolve_loss
from fixtures.messages import naming


def run(dataset, store_path, *encoders, **options):
    return extract(dataset, encoders or ["toy"], store_path, device="cpu", **options)


def pooled(store_path, modality="image", encoder="toy"):
    return FeatureStore(store_path).open_features(encoder, modality).read()


# What is there is not computed again


def pair_manifest(task="similarity", options="scale = [0, 5]"):
    reader = 'reader = { kind = "sentence_pairs", files = { train = "train.tsv" } }'
    return parse_manifest(f'name = "mine"\ntask = "{task}"\n{options}\n{reader}\n', "mine.toml")


@pytest.fixture
def pairs(tmp_path):
    """Fifty pairs: the second has no score, the fourth no second sentence."""
    lines = [f"one {i}\tthe other {i}\t{'' if i == 1 else i / 10}" for i in range(50)]
    lines[3] = "one 3\t\t0.3"
    (tmp_path / "train.tsv").write_text("\n".join(["sentence1\tsentence2\tscore", *lines]))
    return load_dataset(pair_manifest(), tmp_path)


def test_scores_of_which_some_are_absent_stay_as_they_are(pairs, store_path, tools):
    store = open_store(store_path, pairs)
    assert store.targets.dtype == np.float32
    np.testing.assert_array_equal(store.targets, pairs.targets)
    assert np.flatnonzero(np.isnan(store.targets)).tolist() == [1]
    assert store.manifest == pairs.manifest
    assert store.classes == ()
    before, inode = tools.files(store_path), (store_path / "samples").stat().st_ino
    store = open_store(store_path, pairs)
    np.testing.assert_array_equal(store.targets, pairs.targets)
    assert tools.files(store_path) == before
    assert (store_path / "samples").stat().st_ino == inode, "unchanged samples are not written anew"


def test_scores_that_change_are_brought_up_to_date(pairs, store_path):
    open_store(store_path, pairs)
    targets = pairs.targets.copy()
    targets[[1, 2]] = 4.5, np.nan
    store = open_store(store_path, replace(pairs, targets=targets))
    np.testing.assert_array_equal(store.targets, targets)


def test_a_pair_without_one_of_its_sentences_is_absent(pairs, store_path, toy):
    report = run(pairs, store_path)
    assert report.rows == {("toy", "text"): 100}
    assert [(line.id, line.reason) for line in report.bad] == [("train-4", "has no text")]
    store = FeatureStore(store_path)
    assert store.items("text").tolist() == list(range(0, 101, 2))
    np.testing.assert_array_equal(np.flatnonzero(~store.present("text")), [3])
    np.testing.assert_array_equal(np.flatnonzero(~pooled(store_path, "text").any(axis=1)), [7])
    assert run(pairs, store_path).computed == {("toy", "text"): 0}


@pytest.mark.parametrize(
    "manifest",
    [pair_manifest(), pair_manifest("paraphrase", 'classes = ["0", "1"]')],
    ids=lambda manifest: manifest.task,
)
def test_no_head_is_trained_on_pairs(pairs, store_path, manifest):
    store = open_store(store_path, replace(pairs, manifest=manifest))
    expected = naming(f"{manifest.task} similarity")
    with pytest.raises(ConfigError, match=expected):
        resolve_loss(TrainConfig(), manifest.task)
    with pytest.raises(ConfigError, match=expected):
        open_training_data(store)


# What does not belong to the store is refused
