"""Predictions of raw samples by a fusion of tokens: those of the stored rows, whatever a sample lacks."""

import json
import logging
from dataclasses import replace

import numpy as np
import pytest
import torch

import cachefuse.runs.predict as module
from cachefuse.data.images import FileImage
from cachefuse.data.readers.base import Samples
from cachefuse.encoders import open_encoder
from cachefuse.errors import CacheError, DataError, RunError
from cachefuse.extraction.extract import extract
from cachefuse.extraction.pipeline import encode_prepared
from cachefuse.runs.ensemble import ensemble
from cachefuse.runs.predict import predict_samples, predict_split
from cachefuse.runs.save import load_run, save_run
from cachefuse.runs.tables import StoreTables
from cachefuse.runs.train import train_head
from cachefuse.store.store import FeatureStore
from cachefuse.training.config import TrainConfig
from fixtures.columns import images_of, texts_of
from fixtures.messages import naming, says
from fixtures.runs import reseal, without_checksums

CMA = TrainConfig(
    fusion="cma", fusion_options={"depth": 2, "width": 16, "heads": 2}, head="linear", epochs=3, batch_size=16, lr=0.01
)
SETTINGS = {
    "cma": CMA,
    "pooled": replace(CMA, ablate=("sequence-attention",)),
    "sum": TrainConfig(head="linear", epochs=3),
    "flat": TrainConfig(views="tokens", fusion="concat", head="gmlp", layers=(8,), epochs=2, batch_size=16),
}
TEST = range(60, 72)


@pytest.fixture(scope="module")
def quantised(captioned, token_encoders, tmp_path_factory):
    path = tmp_path_factory.mktemp("quantised") / "shapes.zarr"
    extract(captioned, token_encoders, path, views=("pooled", "tokens"), dtype="int8", device="cpu")
    return FeatureStore(path)


@pytest.fixture(scope="module")
def runs(captioned_store):
    return {name: train_head(captioned_store, config) for name, config in SETTINGS.items()}


def samples_of(dataset, rows, image=True, text=True):
    return Samples(
        ids=[dataset.ids[row] for row in rows],
        modalities={m: c.take(rows) for m, c in dataset.modalities.items() if {"image": image, "text": text}[m]},
    )


def stored_scores(run, store, rows, gone=()):
    """The scores of stored rows, as if they lacked some modalities."""
    return run.scores(StoreTables([run], store, "cpu", gone), torch.tensor(list(rows)))


def test_raw_samples_score_as_their_stored_tokens(runs, captioned_store, captioned, tmp_path):
    run = load_run(save_run(runs["cma"], tmp_path / "runs"))
    assert {name: [used.tokens for used in group] for name, group in run.features.items()} == {
        "image": [0], "image_tokens": [4], "text": [0], "text_tokens": [14],
    }  # fmt: skip
    stored = predict_split(run, captioned_store, "test")
    np.testing.assert_array_equal(stored.scores, predict_split(runs["cma"], captioned_store, "test").scores)
    raw = predict_samples(run, samples_of(captioned, TEST))
    assert raw.ids == stored.ids
    assert np.ptp(stored.scores, axis=0).max() > 0.01  # the rows differ by more than what follows allows
    np.testing.assert_allclose(raw.scores, stored.scores, atol=1e-3)
    backwards = predict_samples(run, samples_of(captioned, TEST[::-1]))
    np.testing.assert_allclose(backwards.scores, stored.scores[::-1], atol=1e-3)


@pytest.mark.slow
def test_a_sample_alone_scores_as_among_others(runs, captioned):
    """Its text is padded to no other's length."""
    together = predict_samples(runs["cma"], samples_of(captioned, TEST)).scores
    for i in (0, 5, 11):
        alone = predict_samples(runs["cma"], samples_of(captioned, [TEST[i]])).scores
        np.testing.assert_allclose(alone[0], together[i], atol=1e-4)


@pytest.mark.slow
def test_a_run_on_quantised_tokens_takes_raw_samples(quantised, captioned):
    """Which are not quantised: their scores are as near as int8 is."""
    run = train_head(quantised, CMA)
    stored = predict_split(run, quantised, "test").scores
    raw = predict_samples(run, samples_of(captioned, TEST)).scores
    np.testing.assert_allclose(raw, stored, atol=5e-3)
    assert np.abs(raw - stored).max() > 1e-6
    assert np.ptp(stored, axis=0).max() > 0.05


@pytest.mark.parametrize("lacks", ["image", "text"])
@pytest.mark.parametrize("name", ["cma", "pooled"])
@pytest.mark.one_in(2)
def test_samples_without_a_modality_score_as_stored_rows_without_it(name, lacks, runs, captioned_store, captioned):
    run = runs[name]
    raw = predict_samples(run, samples_of(captioned, TEST, image=lacks != "image", text=lacks != "text"))
    np.testing.assert_allclose(raw.scores, stored_scores(run, captioned_store, TEST, [lacks]), atol=1e-3)
    assert np.abs(raw.scores - stored_scores(run, captioned_store, TEST)).max() > 0.01


def test_samples_that_lack_one_or_the_other_or_both(runs, captioned_store, captioned, tmp_path, caplog):
    """Beside whole ones: what one sample lacks is no other's loss."""
    run, samples = runs["cma"], samples_of(captioned, TEST)
    for i in (1, 4, 7):
        images_of(samples)[i] = FileImage(tmp_path / "gone.png")
    for i in (2, 4, 8):
        texts_of(samples)[i] = ()
    with caplog.at_level(logging.WARNING, logger="cachefuse"):
        found = predict_samples(run, samples).scores
    assert says(caplog.text, "3 12 image")
    assert says(caplog.text, "3 12 text")
    for i, row in enumerate(TEST):
        gone = {1: ["image"], 2: ["text"], 4: ["image", "text"], 7: ["image"], 8: ["text"]}.get(i, [])
        np.testing.assert_allclose(found[i], stored_scores(run, captioned_store, [row], gone)[0], atol=1e-3)
    assert np.isfinite(found).all()


def test_samples_of_no_use_are_refused(runs, captioned, tmp_path):
    with pytest.raises(DataError, match=naming("image text")):
        predict_samples(runs["cma"], samples_of(captioned, TEST, image=False, text=False))
    samples = samples_of(captioned, [60], text=False)
    images_of(samples)[0] = FileImage(tmp_path / "gone.png")
    with pytest.raises(DataError, match=naming("image text")):
        predict_samples(runs["cma"], samples)


@pytest.fixture
def encoded(monkeypatch):
    """Which views were asked of which encoder, and which encoders were opened."""
    seen, opened = [], []

    def spy(tower, window, views, size):
        seen.append((tower.modality, tuple(views)))
        return encode_prepared(tower, window, views, size)

    monkeypatch.setattr(module, "encode_prepared", spy)
    monkeypatch.setattr(module, "open_encoder", lambda *args, **known: opened.append(1) or open_encoder(*args, **known))
    return seen, opened


@pytest.mark.parametrize(
    ("name", "views"),
    [("cma", ("pooled", "tokens")), ("pooled", ("pooled",)), ("sum", ("pooled",)), ("flat", ("tokens",))],
)
@pytest.mark.one_in(2)
def test_each_sample_passes_an_encoder_once_for_all_views(name, views, runs, captioned, encoded):
    predict_samples(runs[name], samples_of(captioned, range(60, 63)))
    assert encoded[0] == [("image", views), ("text", views)]
    assert len(encoded[1]) == 2


def test_an_encoder_is_not_opened_for_what_no_sample_has(runs, captioned, encoded):
    predict_samples(runs["cma"], samples_of(captioned, range(60, 63), text=False))
    assert encoded[0] == [("image", ("pooled", "tokens"))]
    assert len(encoded[1]) == 1


def test_more_samples_than_a_window_keep_their_places(runs, captioned_store, captioned):
    rows = [*range(72), *range(10)]
    found = predict_samples(runs["cma"], samples_of(captioned, rows)).scores
    np.testing.assert_allclose(found, stored_scores(runs["cma"], captioned_store, rows), atol=2e-3)


# Ensembles


@pytest.fixture(scope="module")
def joined(runs, captioned_store, tmp_path_factory):
    """A mean of runs that read pooled features, tokens beside them, and tokens side by side in their place."""
    run = ensemble([runs["cma"], runs["sum"], runs["flat"]], captioned_store)
    return load_run(save_run(run, tmp_path_factory.mktemp("joined")))


@pytest.mark.slow
def test_an_ensemble_over_tokens_and_pooled_features_is_the_mean_of_its_runs(joined, runs, captioned_store, captioned):
    every = [runs[name] for name in ("cma", "sum", "flat")]
    stored = predict_split(joined, captioned_store, "test")
    np.testing.assert_allclose(
        stored.scores, np.mean([predict_split(run, captioned_store, "test").scores for run in every], axis=0), atol=1e-6
    )
    raw = predict_samples(joined, samples_of(captioned, TEST)).scores
    np.testing.assert_allclose(raw, stored.scores, atol=1e-3)
    np.testing.assert_allclose(
        raw, np.mean([predict_samples(run, samples_of(captioned, TEST)).scores for run in every], axis=0), atol=1e-4
    )


def test_two_runs_are_enough(runs, captioned_store, captioned):
    two = ensemble([runs["cma"], runs["sum"]], captioned_store)
    expected = np.mean([predict_split(runs[name], captioned_store, "test").scores for name in ("cma", "sum")], axis=0)
    np.testing.assert_allclose(predict_samples(two, samples_of(captioned, TEST)).scores, expected, atol=1e-3)


def test_an_ensemble_encodes_each_sample_once(joined, captioned, encoded):
    predict_samples(joined, samples_of(captioned, range(60, 63)))
    assert encoded[0] == [("image", ("pooled", "tokens")), ("text", ("pooled", "tokens"))]
    assert len(encoded[1]) == 2


@pytest.mark.parametrize("lacks", ["image", "text"])
def test_an_ensemble_of_samples_without_a_modality(lacks, joined, captioned_store, captioned):
    raw = predict_samples(joined, samples_of(captioned, TEST, image=lacks != "image", text=lacks != "text"))
    np.testing.assert_allclose(raw.scores, stored_scores(joined, captioned_store, TEST, [lacks]), atol=1e-3)


# What does not fit


def test_a_store_whose_tokens_were_made_otherwise_is_refused(runs, captioned, token_encoders, tmp_path):
    extract(
        captioned, token_encoders, tmp_path / "other.zarr", views=("pooled", "tokens"), dtype="float32", device="cpu"
    )
    with pytest.raises(RunError, match=r"hf:\S+ \(image\)"):
        predict_split(runs["cma"], FeatureStore(tmp_path / "other.zarr"), "test")


def test_a_store_that_has_no_tokens_is_refused(runs, captioned, token_encoders, tmp_path):
    extract(captioned, token_encoders, tmp_path / "pooled.zarr", views=("pooled",), device="cpu")
    store = FeatureStore(tmp_path / "pooled.zarr")
    # The same features, as far as they go: a run that reads pooled ones predicts.
    assert predict_split(runs["sum"], store, "test").scores.shape == (12, 11)
    with pytest.raises(CacheError, match=naming("tokens image extract")):
        predict_split(runs["cma"], store, "test")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokens": 0}, "image_tokens"),
        ({"tokens": -4}, "image_tokens"),
        ({"width": 31}, "weights"),
        ({"view": "pooled"}, "pooled image image image_tokens"),
        ({"view": "patches"}, "image_tokens pooled tokens ids flat"),
        ({"modality": "text"}, "tokens text text_tokens image_tokens"),
        ({"modality": None}, "run.json members.0.features.image_tokens.0.modality"),
    ],
    ids=str,
)
def test_tokens_edited_into_nonsense_are_refused(change, message, runs, tmp_path):
    path = save_run(runs["cma"], tmp_path / "runs")
    values = json.loads((path / "run.json").read_text())
    values["members"][0]["features"]["image_tokens"][0].update(change)
    (path / "run.json").write_text(json.dumps(values))
    reseal(path)
    with pytest.raises(RunError, match=naming(message)):
        load_run(path)


@pytest.mark.parametrize("name", SETTINGS)
def test_a_run_that_does_not_say_modality_and_view_is_read_by_its_names(name, runs, captioned_store, tmp_path):
    path = save_run(runs[name], tmp_path / "runs")
    values = json.loads((path / "run.json").read_text())
    for group in values["members"][0]["features"].values():
        for one in group:
            del one["modality"], one["view"]
            if not one["tokens"]:
                del one["tokens"]
    (path / "run.json").write_text(json.dumps(values))
    without_checksums(path)
    old = load_run(path)
    assert old.features == runs[name].features
    expected = predict_split(runs[name], captioned_store, "test").scores
    np.testing.assert_array_equal(predict_split(old, captioned_store, "test").scores, expected)
