"""A training that reads n-grams beside pooled features: chosen, recorded, loaded, and encoded again for new texts."""

import json
import shutil

import numpy as np
import pytest
import torch
from torch import nn

from cachefuse.data.readers.base import Samples
from cachefuse.errors import CacheError, ConfigError, RunError
from cachefuse.extraction.extract import extract
from cachefuse.feature_spec import FeatureSpec
from cachefuse.fusion import FUSIONS
from cachefuse.fusion.base import Fusion
from cachefuse.fusion.model import FusionModel
from cachefuse.runs.predict import predict_samples, predict_split
from cachefuse.runs.save import load_run, save_run
from cachefuse.runs.train import train_head
from cachefuse.store.store import FeatureStore
from cachefuse.training.config import TrainConfig
from cachefuse.training.selection import load_table, select_features
from fixtures.messages import naming, says
from fixtures.runs import edit


class CountingFusion(Fusion):
    """A bag of n-grams beside the pooled features; it takes the n-grams where there are any."""

    name = "counting"

    def __init__(self, specs, classes, head):
        nn.Module.__init__(self)
        self.specs = dict(specs)
        pooled = {name: spec for name, spec in specs.items() if spec.view == "pooled"}
        self.ngrams = specs.get("text_ngrams")
        if self.ngrams:
            self.bag = nn.EmbeddingBag(self.ngrams.vocabulary, classes, mode="sum")
        self.heads = nn.ModuleDict({name: head(spec.width, classes) for name, spec in pooled.items()})

    @classmethod
    def views(cls, modality, options):
        return ("pooled", "ngrams")

    def forward(self, features, present):
        logits = [head(features[name]) * present[name][:, None] for name, head in self.heads.items()]
        if self.ngrams:
            x, mask = features["text_ngrams"], present["text_ngrams"]
            logits.append(self.bag(x[..., 0], per_sample_weights=(x[..., 1] * mask).float().log1p()))
        return torch.stack(logits).sum(0)


@pytest.fixture
def counting(monkeypatch):
    """The settings of a training with the fusion above."""
    monkeypatch.setitem(FUSIONS, "counting", CountingFusion)
    return TrainConfig(fusion="counting", head="linear", epochs=2, batch_size=16)


@pytest.fixture(scope="module")
def stored(shapes, tmp_path_factory):
    path = tmp_path_factory.mktemp("ngrams") / "small.zarr"
    extract(shapes, ["classic", "lexical"], path, device="cpu")
    return path


@pytest.fixture
def store(stored, store_path):
    return FeatureStore(shutil.copytree(stored, store_path))


def both(modality):
    return ("pooled", "ngrams")


def encoders_of(chosen):
    return {modality: [features.encoder for features in group] for modality, group in chosen.items()}


# Chosen


def test_a_fusion_of_pooled_features_does_not_read_ngrams(store):
    assert encoders_of(select_features(store)) == {"image": ["classic"], "text": ["classic"]}
    run = train_head(store, TrainConfig(head="linear", epochs=1))
    assert run.encoders == (("classic", "image"), ("classic", "text"))


def test_ngrams_are_read_beside_pooled_features(store):
    chosen = select_features(store, views=both)
    assert encoders_of(chosen) == {"image": ["classic"], "text": ["classic", "lexical"]}
    table = load_table(store, chosen, both)
    assert list(table.specs) == ["image", "text", "text_ngrams"]
    ngrams = table.features["text_ngrams"]
    assert table.specs["text_ngrams"] == FeatureSpec("text", "ngrams", 2, ngrams.n_tokens, 2**21)
    assert table.specs["text"].width == 1024
    features, present = table.batch(torch.arange(5))
    assert features["text_ngrams"].shape == (*present["text_ngrams"].shape, 2)


def test_ngrams_are_read_alone(shapes, store, store_path):
    table = load_table(store, select_features(store, views=lambda m: ("ngrams",)), lambda m: ("ngrams",))
    assert list(table.specs) == ["text_ngrams"]
    path = store_path.with_name("alone.zarr")
    extract(shapes, ["lexical"], path, device="cpu")
    alone = FeatureStore(path)
    assert list(load_table(alone, select_features(alone, views=both), both).specs) == ["text_ngrams"]
    with pytest.raises(CacheError, match=naming("n-grams lexical pooled --dataset small --encoder classic")):
        train_head(alone, TrainConfig(head="linear", epochs=1))


def test_ngrams_are_no_must(shapes, store_path):
    extract(shapes, ["classic"], store_path, device="cpu")
    store = FeatureStore(store_path)
    chosen = select_features(store, views=both)
    assert encoders_of(chosen) == {"image": ["classic"], "text": ["classic"]}
    assert list(load_table(store, chosen, both).specs) == ["image", "text"]
    with pytest.raises(CacheError, match="no ngrams features"):
        select_features(store, views=lambda m: ("ngrams",))


def test_ngrams_that_were_asked_for_and_are_incomplete_are_an_error(store):
    features = store.open_features("lexical", "text")
    features.forget("ngrams", [3])
    with pytest.raises(CacheError, match=naming("lexical text ngrams 79 80")):
        select_features(FeatureStore(store.path), views=both)
    select_features(FeatureStore(store.path))
    named = select_features(FeatureStore(store.path), ["classic", "lexical"], both)
    with pytest.raises(CacheError, match=naming("lexical text ngrams 79 80")):
        load_table(store, named, both)
    shutil.rmtree(features.path)
    with pytest.raises(CacheError, match=naming("lexical text asked")):
        select_features(FeatureStore(store.path), views=both)


def test_tokens_that_are_missing_are_asked_of_encoders_that_may_have_them(store):
    with pytest.raises(CacheError) as error:
        select_features(store, views=lambda m: ("pooled", "tokens", "ngrams"))
    assert says(str(error.value), "no tokens of image")
    assert not says(str(error.value), "lexical")
    assert not says(str(error.value), "ngrams")


# Trained, saved and used


def test_a_run_reads_the_ngrams_again(shapes, store, counting, tmp_path):
    run = train_head(store, counting)
    assert run.encoders == (("classic", "image"), ("classic", "text"), ("lexical", "text"))
    (ngrams,) = run.features["text_ngrams"]
    assert (ngrams.encoder, ngrams.view, ngrams.width) == ("lexical", "ngrams", 2**21)
    assert [used.encoder for used in run.features["text"]] == ["classic"]
    saved = load_run(save_run(run, tmp_path / "runs"))
    assert saved.features == run.features
    stored = predict_split(saved, store, "test")
    np.testing.assert_array_equal(stored.scores, predict_split(run, store, "test").scores)
    rows = [shapes.ids.index(name) for name in stored.ids]
    raw = Samples(ids=stored.ids, modalities={m: c.take(rows) for m, c in shapes.modalities.items()})
    np.testing.assert_allclose(predict_samples(saved, raw).scores, stored.scores, atol=1e-3)
    images = predict_samples(saved, Samples(ids=stored.ids, modalities={"image": raw.modalities["image"]}))
    assert np.abs(images.scores - stored.scores).max() > 1e-3


def test_ngrams_of_another_hashing_are_refused(shapes, store, counting, tmp_path, monkeypatch):
    run = train_head(store, counting)
    monkeypatch.setattr("cachefuse.encoders.lexical.HASHING", "2")
    with pytest.raises(RunError, match="lexical"):
        predict_samples(run, Samples(ids=["a"], modalities={"text": shapes.modalities["text"].take([0])}))
    other = tmp_path / "other.zarr"
    extract(shapes, ["classic", "lexical"], other, device="cpu")
    with pytest.raises(RunError, match=naming("lexical text")):
        predict_split(run, FeatureStore(other), "test")


def test_a_run_of_wrong_ngrams_is_refused(store, counting, tmp_path):
    folder = save_run(train_head(store, counting), tmp_path / "runs")

    def change(values):
        values["members"][0]["features"]["text_ngrams"][0]["tokens"] = 0

    assert "text_ngrams" in json.dumps(json.loads((folder / "run.json").read_text()))
    edit(folder / "run.json", change)
    with pytest.raises((RunError, ConfigError), match="text_ngrams"):
        load_run(folder)


def test_ngrams_are_not_scaled():
    specs = {"text": FeatureSpec("text", "pooled", 3), "text_ngrams": FeatureSpec("text", "ngrams", 2, 4, 50)}
    model = FusionModel(CountingFusion(specs, 2, nn.Linear))
    assert list(model.standardize) == ["text"]
    ngrams = torch.ones(1, 4, 2, dtype=torch.int64)
    assert model.standardized({"text": torch.zeros(1, 3), "text_ngrams": ngrams})["text_ngrams"] is ngrams
