"""Rows that a run has seen, and those that it can not be measured on."""

import logging
from dataclasses import replace

import numpy as np
import pytest
from sklearn.metrics import (
    f1_score,
)

from cachefuse.errors import ConfigError, DataError, RunError, UnknownNameError
from cachefuse.metrics.decisions import decide
from cachefuse.runs.evaluate import evaluate
from cachefuse.runs.predict import predict_split
from cachefuse.runs.train import train_head
from cachefuse.training.config import TrainConfig
from fixtures.messages import naming, says

CLASSES = 7


QUICK = TrainConfig(head="linear", epochs=3, lr=0.03)


@pytest.mark.parametrize(
    ("settings", "split", "seen"),
    [
        ({}, "train", True),
        ({"folds": 3}, "train", True),
        ({"folds": 3}, "val", True),
        ({"refit": True}, "train", True),
        ({"refit": True}, "val", False),
        ({}, "val", False),
        ({"folds": 3}, "dev", False),
    ],
    ids=str,
)
def test_says_that_a_run_was_trained_on_the_rows(settings, split, seen, data):
    run = train_head(data.store, replace(QUICK, **settings))
    found = evaluate(run, data.store, split, n_resamples=0)
    assert (found.caution is not None) == seen
    assert says(found.caution or "", f"made-sum-linear-asl {split}") == seen


@pytest.mark.parametrize(
    ("settings", "options", "error", "message"),
    [
        ({}, {"split": "prod"}, DataError, "made prod train val test dev"),
        ({}, {"split": "oof"}, DataError, "made oof train val test dev"),
        ({"folds": 3}, {"split": "OOF"}, DataError, "OOF"),
        (
            {},
            {"split": "test"},
            DataError,
            "made test train val dev",
        ),
        ({}, {"without": ["audio"]}, UnknownNameError, "audio image text"),
        ({"fusion": "text"}, {"without": ["image"]}, UnknownNameError, "image text"),
        ({"fusion": "text"}, {"without": ["text"]}, ConfigError, "text"),
        ({}, {"without": ["text", "image"]}, ConfigError, "image text"),
        (
            {"refit": True},
            {"without": ["text"]},
            RunError,
            "--split",
        ),
        ({}, {"device": "tpu"}, ConfigError, "device tpu"),
    ],
)
def test_refuses_what_can_not_be_measured(settings, options, error, message, data):
    run = train_head(data.store, replace(QUICK, **settings))
    with pytest.raises(error, match=naming(message)):
        evaluate(run, data.store, **options, n_resamples=0)


def test_a_run_that_held_out_nothing_needs_a_split(data):
    run = replace(train_head(data.store, QUICK), held_out=None)
    with pytest.raises(RunError, match=naming("--split train val dev")):
        evaluate(run, data.store)
    assert evaluate(run, data.store, "dev", n_resamples=0).n_rows == 20


@pytest.mark.parametrize("folds", [0, 3])
def test_rows_that_were_appended_are_noticed(folds, tmp_path, make_data):
    path = tmp_path / "made.zarr"
    run = train_head(make_data(path, n=80).store, replace(QUICK, folds=folds))
    more = make_data(path)
    assert len(more.store) == 120
    for split in (None, "oof") if folds else (None,):
        with pytest.raises(RunError, match=naming("--split train val dev")):
            evaluate(run, more.store, split)
    val = evaluate(run, more.store, "val", n_resamples=0)
    labels = predict_split(run, more.store, "val").labels[np.arange(60, 90) != 85]
    assert val.n_rows == 29
    assert val.metrics["micro_f1"] == f1_score(more.hot[more.labelled("val")], labels, average="micro")
    assert says(val.caution, "made-sum-linear-asl val" if folds else "made-sum-linear-asl changed")
    assert says(evaluate(run, more.store, "dev", n_resamples=0).caution, "made-sum-linear-asl changed")


def test_another_store_is_refused(data):
    run = train_head(data.store, QUICK)
    used = {modality: (replace(group[0], key="0" * 32),) for modality, group in run.members[0].features.items()}
    other = replace(run, members=[replace(run.members[0], features=used)])
    with pytest.raises(RunError, match="store"):
        evaluate(other, data.store)
    with pytest.raises(RunError, match="classes"):
        evaluate(replace(run, classes=("a", "b", "c")), data.store)


def test_min_labels_count_as_in_training(data):
    manifest = data.store.manifest.model_copy(update={"min_labels": 2})
    run = replace(train_head(data.store, QUICK), manifest=manifest, thresholds=np.full(CLASSES, 0.999))
    found = evaluate(run, data.store, "dev", n_resamples=0)
    labels = decide(predict_split(run, data.store, "dev").scores, "multilabel", run.thresholds, 2)
    assert set(labels.sum(axis=1)) == {2}
    assert found.metrics["micro_f1"] == f1_score(data.hot[data.labelled("dev")], labels, average="micro")


def test_nothing_is_logged_and_the_run_stays_as_it_was(data, caplog):
    run = train_head(data.store, QUICK)
    before = run.held_out.scores.copy(), run.thresholds.copy()
    with caplog.at_level(logging.WARNING):
        evaluate(run, data.store, without=["image"], n_resamples=10)
    assert caplog.text == ""
    np.testing.assert_array_equal(before[0], run.held_out.scores)
    np.testing.assert_array_equal(before[1], run.thresholds)
