"""Calibrated runs: how held-out rows stay honest, and what a run keeps, loads and predicts."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from cachefuse.errors import ConfigError, RunError
from cachefuse.metrics import METRICS
from cachefuse.metrics.calibrators import fit_calibration
from cachefuse.metrics.decisions import decide
from cachefuse.metrics.thresholds import choose_thresholds
from cachefuse.runs.ensemble import ensemble
from cachefuse.runs.evaluate import evaluate
from cachefuse.runs.measured import measure
from cachefuse.runs.predict import predict_split
from cachefuse.runs.save import load_run, save_run
from cachefuse.runs.tables import StoreTables
from cachefuse.runs.train import train_head
from cachefuse.store.store import FeatureStore
from cachefuse.training.config import TrainConfig
from cachefuse.training.data import open_training_data
from fixtures.messages import naming
from fixtures.runs import edit

QUICK = TrainConfig(head="linear", epochs=4, lr=0.03, calibrate="temperature")


@pytest.fixture
def store(toy_store):
    return toy_store()


@pytest.mark.parametrize(
    "settings", [{}, {"folds": 3}, {"thresholds": "class"}, {"calibrate": "isotonic", "members": 2}]
)
def test_no_held_out_row_helps_to_calibrate_or_decide_itself(settings, store):
    config = replace(QUICK, **settings)
    run = train_head(store, config)
    held_out, measured = run.held_out, measure(run, store, None)
    targets, tasks = store.targets[held_out.rows], run.tasks
    assert len(np.unique(held_out.parts)) > 2
    for part in np.unique(held_out.parts):
        own = held_out.parts == part
        calibration = fit_calibration(config.calibrate, targets[~own], held_out.scores[~own], tasks)
        others, expected = (calibration(held_out.scores[rows], tasks) for rows in (~own, own))
        thresholds = choose_thresholds(targets[~own], others, "micro_f1", config.thresholds == "class")
        np.testing.assert_array_equal(measured.scores[own], expected)
        np.testing.assert_array_equal(measured.predictions[own], decide(expected, "multilabel", thresholds))
    np.testing.assert_array_equal(measured.raw_scores, held_out.scores)


def test_new_rows_use_what_all_held_out_rows_say(store):
    run, plain = (
        train_head(store, replace(QUICK, members=2)),
        train_head(store, replace(QUICK, members=2, calibrate="none")),
    )
    raw = predict_split(plain, store).scores
    targets = store.targets[run.held_out.rows]
    np.testing.assert_array_equal(run.held_out.scores, plain.held_out.scores)
    calibration = fit_calibration("temperature", targets, run.held_out.scores, run.tasks)
    found = predict_split(run, store)
    np.testing.assert_array_equal(found.scores, calibration(raw, run.tasks))
    calibrated = calibration(run.held_out.scores, run.tasks)
    np.testing.assert_array_equal(run.thresholds, choose_thresholds(targets, calibrated, "micro_f1", False))
    np.testing.assert_array_equal(found.labels, found.scores >= run.thresholds)
    assert plain.calibration is None


@pytest.mark.parametrize("kind", ["temperature", "isotonic"])
@pytest.mark.parametrize("task", ["multilabel", "multiclass"])
def test_a_saved_run_predicts_and_evaluates_the_same(kind, task, toy_store, tmp_path, monkeypatch):
    monkeypatch.setattr("cachefuse.metrics.calibrators.FEWEST", 3)
    store = toy_store(task)
    run = train_head(store, replace(QUICK, calibrate=kind))
    assert bool(run.calibration.steps) == (kind == "isotonic")
    loaded = load_run(save_run(run, tmp_path / "runs"))
    np.testing.assert_array_equal(predict_split(loaded, store).scores, predict_split(run, store).scores)
    assert evaluate(loaded, store, n_resamples=0).metrics == evaluate(run, store, n_resamples=0).metrics
    again = save_run(train_head(store, replace(QUICK, calibrate=kind)), tmp_path / "again")
    assert load_run(again).calibration.as_dict() == run.calibration.as_dict()


def test_a_run_of_before_there_was_calibration_opens(store, tmp_path):
    path = save_run(train_head(store, replace(QUICK, calibrate="none")), tmp_path)

    def older(values):
        del values["calibration"], values["config"]["calibrate"]

    edit(path / "run.json", older)
    assert load_run(path).calibration is None
    assert load_run(path).config.calibrate == "none"


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"slopes": [1.0, 1.0]}, "calibration slope 3"),
        ({"slopes": [1.0, 0.0, 1.0]}, "calibration.slopes.1"),
        ({"biases": [0.0, None, 0.0]}, "calibration.biases.1"),
        ({"steps": {"3": [[0.5], [0.5]]}}, "calibration 3"),
        ({"steps": {"0": [[0.5, 0.4], [0.1, 0.2]]}}, "calibration.steps.0 ascending"),
        ({"steps": {"0": [[0.4, 0.5], [0.2, 0.1]]}}, "calibration.steps.0 ascending"),
        ({"steps": {"0": [[0.4, 0.5], [0.2]]}}, "calibration.steps.0 length"),
        ({"steps": {"0": [[], []]}}, "calibration.steps.0"),
        ({"steps": {"0": [[0.4, 0.5], [0.2, 1.1]]}}, "calibration.steps.0"),
    ],
)
def test_a_wrong_calibration_is_named(change, named, store, tmp_path):
    path = save_run(train_head(store, QUICK), tmp_path)
    edit(path / "run.json", lambda values: values["calibration"].update(change))
    with pytest.raises(RunError, match=naming(f"run.json {named}")):
        load_run(path)


def test_without_a_modality_held_out_rows_keep_their_maps(store):
    run = train_head(store, replace(QUICK, folds=3))
    without = measure(run, store, None, ["image"])
    tables = StoreTables([run], store, without=["image"])
    np.testing.assert_array_equal(without.raw_scores, run.held_out_scores(tables))
    data = open_training_data(store)
    np.testing.assert_array_equal(without.scores, run.held_out.decided(data, run.config, without.raw_scores)[0])
    assert not np.array_equal(without.scores, without.raw_scores)


@pytest.mark.parametrize("second", ["temperature", "none"])
def test_an_ensemble_is_calibrated_after_the_mean(second, store, tmp_path):
    runs = [train_head(store, QUICK), train_head(store, replace(QUICK, seed=1, calibrate=second))]
    joined = ensemble(runs, store)
    mean = np.mean([run.held_out.scores for run in runs], axis=0, dtype=np.float32)
    expected = fit_calibration("temperature", store.targets[joined.held_out.rows], mean, joined.tasks)
    assert joined.calibration.as_dict() == expected.as_dict()
    raw = np.mean([run.raw_scores(StoreTables([run], store), torch.arange(60)) for run in runs], axis=0)
    found = load_run(save_run(joined, tmp_path)).scores(StoreTables([joined], store), torch.arange(60))
    np.testing.assert_allclose(found, expected(raw, joined.tasks), rtol=1e-4)


def test_an_ensemble_needs_rows_to_calibrate_on(store):
    runs = [train_head(store, QUICK), train_head(store, replace(QUICK, folds=3, calibrate="none"))]
    with pytest.raises(ConfigError, match=naming("calibrated held out")):
        ensemble(runs, store)


def test_one_label_a_row_keeps_its_class(toy_store):
    store = toy_store("multiclass")
    run, plain = train_head(store, QUICK), train_head(store, replace(QUICK, calibrate="none"))
    found, before = predict_split(run, store), predict_split(plain, store)
    np.testing.assert_array_equal(found.labels, before.labels)
    assert len(np.unique(run.calibration.slopes)) == 1
    np.testing.assert_allclose(found.scores.sum(axis=1), 1, rtol=1e-5)
    assert not np.array_equal(measure(run, store, None).scores, run.held_out.scores)  # val has parts to cross-fit


def test_too_few_rows_to_calibrate_are_refused_before_training(toy_store_in, tmp_path, monkeypatch):
    monkeypatch.setattr("cachefuse.training.train.train_model", None)
    store = toy_store_in(tmp_path)
    few = replace(open_training_data(store), name="few")
    few.table.splits[few.table.splits == "val"] = "dev"
    from cachefuse.training.train import train_models

    with pytest.raises(ConfigError, match=naming("few 0 calibrate --folds")):
        train_models(few, few.resolve(QUICK))


@pytest.mark.parametrize("kind", ["temperature", "isotonic"])
def test_scores_of_asl_become_probabilities_on_rows_not_used(kind, extracted):
    store = FeatureStore(extracted)
    run = train_head(store, TrainConfig(epochs=15, folds=3, calibrate=kind))
    rows, tables = torch.from_numpy(np.flatnonzero(store.splits == "test")), StoreTables([run], store)
    held_out = measure(run, store, None)
    targets = store.targets[held_out.rows]
    before, after = (
        METRICS["calibration_error"](targets, scores, scores > 0.5) for scores in (held_out.raw_scores, held_out.scores)
    )
    assert run.config.loss == "asl"
    assert after < before / 2
    raw, found = run.raw_scores(tables, rows), run.scores(tables, rows)
    assert (np.argsort(raw, axis=0) == np.argsort(found, axis=0)).mean() > 0.99
