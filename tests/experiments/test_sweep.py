"""Trials of a sweep: what they are, and what is refused."""

import csv
import io
import logging
import math
import statistics
from dataclasses import replace

import numpy as np
import pytest

from cachefuse.errors import ConfigError, DataError
from cachefuse.experiments.files import JOURNAL
from cachefuse.experiments.settings import grid
from cachefuse.experiments.sweep import Experiment, run_sweep, sweep
from cachefuse.runs.train import train_head
from cachefuse.training.data import open_training_data
from fixtures.messages import naming
from fixtures.sweeps import LINEAR, MLP, lines


def table(path):
    return list(csv.DictReader(io.StringIO(path.read_text("utf-8"))))


@pytest.mark.parametrize(
    ("base", "settings"),
    [
        (LINEAR, grid({"loss": ["bce", "asl"], "lr": [0.01, 0.1]})),
        pytest.param(
            replace(LINEAR, folds=3),
            grid({"fusion": ["sum", "image"], "class_weights": ["none", "balanced"]}),
            marks=pytest.mark.slow,
        ),
        (replace(LINEAR, thresholds="class"), [{"thresholds": "none"}, {"lr": 0.1}]),
        (MLP, grid({"dropout": [0.0, 0.5]})),
        (replace(MLP, patience=2, folds=2, members=2), [{"layers": (4,)}, {"layers": (4, 4)}]),
    ],
)
@pytest.mark.one_in(2)
def test_a_trial_is_what_train_head_says(base, settings, toy_store, folder):
    store = toy_store()
    result = sweep(store, base, settings, folder=folder, seeds=(0, 5))
    assert result.n_done == result.n_trials == 2 * len(settings)
    assert result.metrics == ("micro_f1", "macro_f1", "samples_f1", "macro_ap")
    for own, setting in zip(settings, result.settings, strict=True):
        assert [trial.seed for trial in setting.trials] == [0, 5]
        for trial in setting.trials:
            run = train_head(store, replace(base, **own, seed=trial.seed))
            assert trial.metrics == pytest.approx(run.metrics[result.split], abs=1e-6)
            assert trial.epoch == np.mean([history.best_epoch for history in run.histories])
    assert result.n_rows == run.results[result.split].n_rows
    assert result.split == ("oof" if base.folds else "val")


@pytest.mark.slow
def test_linear_heads_are_trained_together_by_seed(toy_store, folder):
    heard = []
    settings = grid({"lr": [0.01, 0.1], "loss": ["bce", "asl"], "dropout": [0, 0.5]})
    sweep(toy_store(), LINEAR, settings, folder=folder, seeds=(3, 4, 5), on_trial=lambda r: heard.append(r.n_done))
    assert heard == [0, 8, 16, 24]
    heard.clear()
    sweep(toy_store(name="b"), MLP, settings[:3], folder=folder, seeds=(3,), on_trial=lambda r: heard.append(r.n_done))
    assert heard == [0, 1, 2, 3]


def test_more_than_fit_are_trained_in_turns(toy_store, folder, monkeypatch):
    heard = []
    monkeypatch.setattr("cachefuse.training.stack.MAX_FLOATS", 2 * 52 * 3)
    settings = grid({"lr": [0.01, 0.02, 0.03], "fusion": ["sum", "mixed"]})
    sweep(toy_store(), LINEAR, settings, folder=folder, seeds=(0,), on_trial=lambda r: heard.append(r.n_done))
    assert heard == [0, 2, 4, 5, 6]


def test_means_and_spreads(toy_store, folder):
    result = sweep(toy_store(), LINEAR, [{}, {"lr": 0.1}], folder=folder, seeds=range(4))
    for setting in result.settings:
        for metric in result.metrics:
            values = [trial.metrics[metric] for trial in setting.trials]
            assert setting.mean(metric) == pytest.approx(statistics.mean(values))
            assert setting.std(metric) == pytest.approx(statistics.stdev(values))
    assert len({trial.metrics["macro_ap"] for trial in result.settings[0].trials}) > 1
    best = max(result.settings, key=lambda setting: setting.mean("micro_f1"))
    assert result.best == best


def test_one_seed_has_no_spread(toy_store, folder):
    result = sweep(toy_store(), LINEAR, [{}], folder=folder, seeds=(0,))
    assert math.isnan(result.settings[0].std("micro_f1"))
    assert table(folder / "summary.csv")[0]["micro_f1_std"] == ""


def test_the_metric_to_go_by_comes_first(toy_store, folder):
    base = replace(LINEAR, monitor="samples_f1")
    assert sweep(toy_store(), base, [{}], folder=folder, seeds=(0,)).metrics[0] == "samples_f1"


@pytest.mark.parametrize("head", ["linear", pytest.param("mlp", marks=pytest.mark.slow)])
@pytest.mark.slow
def test_what_diverges_is_no_zero(head, toy_store, folder):
    base = replace(LINEAR if head == "linear" else MLP, optimizer="sgd", epochs=20)
    settings = [{"lr": 0.05}, {"lr": 1e5}]
    result = sweep(toy_store(), base, settings, folder=folder, seeds=(0, 1))
    fine, wild = result.settings
    assert (fine.n_diverged, wild.n_diverged) == (0, 2)
    assert math.isnan(wild.mean("micro_f1"))
    assert math.isnan(wild.std("micro_f1"))
    assert all("diverged" in trial.diverged and not trial.metrics for trial in wild.trials)
    assert result.best is fine
    rows = table(folder / "trials.csv")
    assert [row["status"] for row in rows] == ["done", "done", "diverged", "diverged"]
    assert rows[2]["micro_f1"] == rows[2]["epoch"] == ""
    assert "diverged" in rows[2]["message"]
    summary = table(folder / "summary.csv")[1]
    assert (summary["lr"], summary["diverged"], summary["micro_f1_mean"]) == ("100000", "2", "")
    before = lines(folder)
    again = sweep(toy_store(name="again"), base, settings, folder=folder.with_name("two"), seeds=(0, 1))
    assert [s.n_diverged for s in again.settings] == [0, 2]
    assert sweep(store_of(folder, toy_store), base, settings, folder=folder, seeds=(0, 1)).settings[1].n_diverged == 2
    assert lines(folder) == before


def store_of(folder, toy_store):
    from cachefuse.store.store import FeatureStore

    return FeatureStore(folder.parent.parent / "made.zarr")


@pytest.mark.parametrize(
    ("base", "settings", "seeds", "message"),
    [
        (
            LINEAR,
            [],
            (0,),
            "settings seeds 0",
        ),
        (LINEAR, [{}], (), "settings seeds 1"),
        (LINEAR, [{}], (1, 1), "settings seeds 1"),
        (LINEAR, [{}, {"dropout": 2}], (0,), "dropout 0 1 2.0"),
        (LINEAR, [{}, {"layers": (8,)}], (0,), "head linear layers"),
        (LINEAR, [{}, {"loss": "ce"}], (0,), "loss ce"),
        (LINEAR, [{}, {"loss_options": {"gamma": 2.0}}], (0,), "loss bce gamma"),
        (
            LINEAR,
            [{}, {"loss": "asl", "loss_options": {"clip": 2}}],
            (0,),
            "gamma_positive 0",
        ),
        (replace(LINEAR, folds=53), [{}], (0,), "folds 2 52 53"),
        (LINEAR, [{}, {"folds": 3}], (0,), "folds"),
        (LINEAR, [{}], (0, -1), "seed 0"),
        (replace(LINEAR, refit=True), [{}], (0,), "refit"),
        (replace(MLP, layers=None), [{}, {"head": "gmlp", "layers": (7,)}], (0,), "even"),
    ],
)
def test_settings_that_do_not_fit_are_refused_before_training(base, settings, seeds, message, toy_store, folder):
    with pytest.raises(ConfigError, match=naming(message)):
        sweep(toy_store(), base, settings, folder=folder, seeds=seeds)
    assert not folder.exists()


def test_without_rows_to_measure_on(make_store, folder):
    x, y = np.random.default_rng(0).normal(size=(20, 3)).astype(np.float16), np.eye(20, 2, dtype=np.int8)
    store, image = make_store({"image": x}, y, ["train"] * 20), replace(LINEAR, fusion="image")
    with pytest.raises(ConfigError, match=naming("--folds 5")):
        sweep(store, image, [{}], folder=folder, seeds=(0,))
    folded = sweep(store, replace(image, folds=4), [{}], folder=folder, seeds=(0,))
    assert (folded.n_done, folded.split, folded.n_rows) == (1, "oof", 20)
    with pytest.raises(ConfigError, match=naming("fusion text")):
        sweep(store, replace(image, folds=2), [{"fusion": "text"}], folder=folder, seeds=(0,))


def test_without_rows_to_train_on(make_store, folder):
    x, y = np.zeros((4, 3), np.float16), np.eye(4, 2, dtype=np.int8)
    with pytest.raises(DataError, match="train"):
        sweep(
            make_store({"image": x}, y, ["val"] * 4), replace(LINEAR, fusion="image"), [{}], folder=folder, seeds=(0,)
        )


def test_a_warning_is_heard_once(make_store, folder, caplog):
    x, y = np.random.default_rng(0).normal(size=(30, 3)).astype(np.float16), np.zeros((30, 2), np.int8)
    y[:, 0] = np.arange(30) % 2
    store = make_store({"image": x}, y, ["train"] * 20 + ["val"] * 10)
    with caplog.at_level(logging.WARNING):
        sweep(store, replace(MLP, fusion="image"), grid({"lr": [0.1, 0.2]}), folder=folder, seeds=(0, 1))
        assert [record.getMessage()[:32] for record in caplog.records] == ["class 'class 1' never occurs in "]
        caplog.clear()
        train_head(store, replace(MLP, fusion="image"))
    assert len(caplog.records) == 1


def test_a_problem_is_opened_once_for_many_sweeps(toy_store, folder):
    store = toy_store()
    data = open_training_data(store)
    experiment = Experiment(LINEAR, [{"lr": 0.1}, {"lr": 0.2}], "a title", [(0.5, 0.1), None])
    result = run_sweep(store, data, experiment, folder, (0,))
    assert (result.title, [setting.published for setting in result.settings]) == ("a title", [(0.5, 0.1), None])
    assert sorted(path.name for path in folder.iterdir() if path.name[0] != ".") == [JOURNAL]


def test_multi_class(toy_store, folder):
    store = toy_store("multiclass")
    result = sweep(store, LINEAR, grid({"loss": ["ce", "bce"], "lr": [0.1, 0.2]}), folder=folder, seeds=(0,))
    assert result.fields == ("loss", "lr")
    for setting in result.settings:
        run = train_head(store, setting.config)
        assert setting.trials[0].metrics == pytest.approx(run.metrics["val"], abs=1e-6)
