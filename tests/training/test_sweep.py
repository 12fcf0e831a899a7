import csv
import io
import json
import logging
import math
import os
import signal
import statistics
import subprocess
import sys
import time
import xml.etree.ElementTree as ET
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from cachefuse.errors import ConfigError, DataError, TrainingError, UnknownNameError
from cachefuse.training.config import TrainConfig
from cachefuse.training.problem import open_problem
from cachefuse.training.sweep import Experiment, grid, parse_setting, run_sweep, sweep
from cachefuse.training.sweep_files import JOURNAL, only_sweep, read_trials, write_results
from cachefuse.training.sweep_result import SettingResult, SweepResult, Trial
from cachefuse.training.train import train_head
from cachefuse.training.used import used_features

LINEAR = TrainConfig(head="linear", epochs=3, patience=0, batch_size=16, lr=0.01, loss="bce")
MLP = replace(LINEAR, head="mlp", layers=(8,))


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "sweeps" / "one"


def lines(folder):
    return (folder / JOURNAL).read_bytes().splitlines()


def figures(result):
    return [[trial.metrics for trial in setting.trials] for setting in result.settings]


def table(path):
    return list(csv.DictReader(io.StringIO(path.read_text("utf-8"))))


def test_a_grid_is_every_combination():
    assert grid({"loss": ["bce", "asl"], "lr": [1, 2]}) == [
        {"loss": "bce", "lr": 1},
        {"loss": "bce", "lr": 2},
        {"loss": "asl", "lr": 1},
        {"loss": "asl", "lr": 2},
    ]


@pytest.mark.parametrize(
    ("values", "message"),
    [({}, "the grid has no fields"), ({"lr": [1], "loss": []}, "the grid has no values for loss")],
)
def test_an_empty_grid(values, message):
    with pytest.raises(ConfigError, match=message):
        grid(values)


@pytest.mark.parametrize(
    ("given", "parsed"),
    [
        ({"dropout": "0.5", "epochs": "20"}, {"dropout": 0.5, "epochs": 20}),
        ({"lr": "1e-3"}, {"lr": 0.001}),
        ({"layers": "2048-512"}, {"layers": (2048, 512)}),
        ({"layers": [2048, 512]}, {"layers": (2048, 512)}),
        ({"layers": "64"}, {"layers": (64,)}),
        ({"batch_size": "all"}, {"batch_size": 0}),
        ({"batch_size": "256"}, {"batch_size": 256}),
        ({"loss_options": {"gamma": "2", "reduction": "sum"}}, {"loss_options": {"gamma": 2.0, "reduction": "sum"}}),
        ({"fusion": "mixed", "monitor": None}, {"fusion": "mixed", "monitor": None}),
    ],
)
def test_settings_take_text_and_values(given, parsed):
    assert parse_setting(given) == parsed


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"dropout": "x"}, "dropout must be a number. Got 'x' instead"),
        ({"dropout": ""}, "dropout must be a number. Got '' instead"),
        ({"epochs": 1.5}, "epochs must be a whole number. Got 1.5 instead"),
        ({"layers": "8-x"}, "layers must be widths such as 2048-512. Got '8-x' instead"),
        ({"layers": "-8"}, "layers must be widths such as 2048-512. Got '-8' instead"),
        ({"loss": 3}, "loss must be a name. Got 3 instead"),
        (
            {"loss_options": {"gamma": "two"}},
            "loss_options must be a table of numbers, in a --settings file: .* Got {'gamma': 'two'} instead",
        ),
        ({"seed": 3}, "seed can't differ between settings: seeds are given apart"),
        ({"refit": True}, "refit can't differ between settings: models trained on every row have none left"),
        ({"view": "tokens"}, "view can't differ between settings: a sweep reads its features once"),
    ],
)
def test_settings_that_do_not_parse(given, message):
    with pytest.raises(ConfigError, match=message):
        parse_setting(given)


def test_settings_that_are_none():
    with pytest.raises(UnknownNameError, match=r"unknown setting 'droput' \(did you mean 'dropout'\?\)"):
        parse_setting({"droput": 0.5})


@pytest.mark.parametrize(
    ("base", "settings"),
    [
        (LINEAR, grid({"loss": ["bce", "asl"], "lr": [0.01, 0.1]})),
        (replace(LINEAR, folds=3), grid({"fusion": ["sum", "image"], "class_weights": ["none", "balanced"]})),
        (replace(LINEAR, thresholds="class"), [{"thresholds": "none"}, {"lr": 0.1}]),
        (MLP, grid({"dropout": [0.0, 0.5]})),
        (replace(MLP, patience=2, folds=2, members=2), [{"layers": (4,)}, {"layers": (4, 4)}]),
    ],
)
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


def test_a_finished_sweep_trains_nothing_again(toy_store, folder):
    store, settings = toy_store(), grid({"loss": ["bce", "asl"], "layers": ["4", "4-4"]})
    first = sweep(store, MLP, settings, folder=folder, seeds=(0, 1))
    before = (folder / JOURNAL).read_bytes()
    heard = []
    again = sweep(store, MLP, settings, folder=folder, seeds=(0, 1), on_trial=heard.append)
    assert [result.n_done for result in heard] == [8]
    assert (folder / JOURNAL).read_bytes() == before
    assert again == first


def test_only_what_is_new_is_trained(toy_store, folder):
    store = toy_store()
    sweep(store, MLP, [{"lr": 0.1}], folder=folder, seeds=(0, 1))
    result = sweep(store, MLP, [{"lr": 0.2}, {"lr": 0.1}], folder=folder, seeds=(0, 1, 2))
    assert len(lines(folder)) == 2 + 4
    assert result.n_done == 6
    # What is left open and what it comes to are the same.
    sweep(store, replace(MLP, lr=None), [{"loss": "bce", "lr": 0.1}], folder=folder, seeds=(0, 1, 2))
    assert len(lines(folder)) == 6


def relabel(store):
    targets = store.targets.copy()
    targets[45, 0] ^= 1
    return targets


@pytest.mark.parametrize("change", ["targets", "splits", "features", "metrics"])
def test_another_dataset_is_trained_anew(change, make_store, tmp_path, folder):
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(30, 4)).astype(np.float16), rng.integers(0, 2, (30, 3)).astype(np.int8)
    splits, metrics = ["train"] * 20 + ["val"] * 10, ["micro_f1"]
    image = replace(MLP, fusion="image")
    sweep(make_store({"image": x}, y, splits, metrics=metrics), image, [{}], folder=folder, seeds=(0,))
    if change == "targets":
        y[25, 0] ^= 1
    elif change == "splits":
        splits = ["train"] * 21 + ["val"] * 9
    elif change == "features":
        x = x.astype(np.float32)
    else:
        metrics = ["macro_f1"]
    (tmp_path / "made.zarr").rename(tmp_path / "old.zarr")
    other = make_store({"image": x}, y, splits, metrics=metrics)
    result = sweep(other, image, [{}], folder=folder, seeds=(0,))
    assert len(lines(folder)) == 2
    assert list(result.settings[0].trials[0].metrics) == metrics


@pytest.mark.parametrize("cut", [1, 20, 200])
def test_a_torn_last_line_is_run_again(cut, toy_store, folder):
    store, settings = toy_store(), grid({"lr": [0.1, 0.2]})
    first = sweep(store, MLP, settings, folder=folder, seeds=(0, 1))
    whole = (folder / JOURNAL).read_bytes()
    (folder / JOURNAL).write_bytes(whole[:-cut])
    heard = []
    again = sweep(store, MLP, settings, folder=folder, seeds=(0, 1), on_trial=lambda r: heard.append(r.n_done))
    assert heard == ([4] if cut == 1 else [3, 4])  # the last byte only ends the line
    assert figures(again) == figures(first)


def test_lines_of_another_shape_are_passed_over(toy_store, folder):
    store = toy_store()
    sweep(store, MLP, [{}], folder=folder, seeds=(0,))
    good = lines(folder)[0]
    changed = good.replace(b'"seed": 0', b'"seed": 1')
    other = [b"", b"[1]", b"null", b"\xff\xfe", b"{}", changed, good[:-3]]
    (folder / JOURNAL).write_bytes(b"\n".join([*other, good, *other]) + b"\n")
    assert len(list(read_trials(folder))) == 1
    sweep(store, MLP, [{}], folder=folder, seeds=(0,))
    assert len(lines(folder)) == 2 * len(other) + 1


def stop_after(n):
    def on_trial(result):
        if result.n_done == n:
            raise KeyboardInterrupt

    return on_trial


def test_goes_on_after_an_interrupt_between_trials(toy_store, folder):
    store, settings = toy_store(), grid({"lr": [0.1, 0.2, 0.3]})
    with pytest.raises(KeyboardInterrupt):
        sweep(store, MLP, settings, folder=folder, seeds=(0, 1), on_trial=stop_after(4))
    kept = lines(folder)
    assert len(kept) == 4
    assert not (folder / "summary.csv").exists()
    result = sweep(store, MLP, settings, folder=folder, seeds=(0, 1))
    assert lines(folder)[:4] == kept
    assert len(lines(folder)) == 6
    fresh = sweep(store, MLP, settings, folder=folder.with_name("two"), seeds=(0, 1))
    assert figures(fresh) == figures(result)


@pytest.mark.parametrize("base", [LINEAR, MLP])
def test_an_interrupted_trial_is_not_kept(base, toy_store, folder):
    settings = [{"lr": 0.1, "epochs": 2}, {"lr": 0.2, "epochs": 2}, {"epochs": 10**6}, {"epochs": 10**6, "lr": 0.3}]

    def interrupt(*_):
        raise KeyboardInterrupt

    def on_trial(result):
        if result.n_done == 2:
            signal.setitimer(signal.ITIMER_REAL, 0.3)

    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        with pytest.raises(KeyboardInterrupt):
            sweep(toy_store(), base, settings, folder=folder, seeds=(0,), on_trial=on_trial)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert [json.loads(line)["settings"]["epochs"] for line in lines(folder)] == [2, 2]


SLOW = """
import sys
from pathlib import Path
from cachefuse.cache.store import FeatureStore
from cachefuse.training.config import TrainConfig
from cachefuse.training.sweep import sweep
base = TrainConfig(head="mlp", layers=(8,), patience=0, batch_size=16)
settings = [{"epochs": epochs} for epochs in (2, 3, 4, 1000000)]
sweep(FeatureStore(Path(sys.argv[1])), base, settings, folder=Path(sys.argv[2]), seeds=(0,))
"""


def test_goes_on_after_a_kill(toy_store, folder):
    store = toy_store()
    command = [sys.executable, "-c", SLOW, str(store.path), str(folder)]
    process = subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"})
    try:
        deadline = time.monotonic() + 60
        while not (folder / JOURNAL).is_file() or len(lines(folder)) < 3:
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.02)
    finally:
        process.kill()
        process.wait()
    kept = lines(folder)
    settings = [{"epochs": epochs} for epochs in (2, 3, 4, 5)]
    base = TrainConfig(head="mlp", layers=(8,), patience=0, batch_size=16)
    result = sweep(store, base, settings, folder=folder, seeds=(0,))
    assert lines(folder)[:3] == kept
    assert len(lines(folder)) == 4
    assert [setting.trials[0].epoch for setting in result.settings] == [2, 3, 4, 5]


def test_two_at_once_do_not_share_a_folder(toy_store, folder):
    with only_sweep(folder), pytest.raises(ConfigError, match=f"another sweep is at work in {folder}; wait until"):
        sweep(toy_store(), LINEAR, [{}], folder=folder, seeds=(0,))
    sweep(toy_store(name="b"), LINEAR, [{}], folder=folder, seeds=(0,))


@pytest.mark.parametrize("head", ["linear", "mlp"])
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
    from cachefuse.cache.store import FeatureStore

    return FeatureStore(folder.parent.parent / "made.zarr")


def made_up(*figures, published=None, metric="micro_f1"):
    trials = tuple(
        Trial("k", seed, {} if math.isnan(x) else {metric: x}, 1, 0.5, "it diverged" if math.isnan(x) else "")
        for seed, x in enumerate(figures)
    )
    return SettingResult({"lr": 0.1 * len(figures), "layers": (8, 4)}, LINEAR, trials, published)


def made_result(*settings):
    return SweepResult("made: a <title> & $x^2$", ("lr", "layers"), ("micro_f1",), "val", 1234, (0, 1), settings)


def test_one_seed_that_diverges_spoils_the_mean():
    setting = made_up(0.5, math.nan)
    assert setting.n_diverged == 1
    assert math.isnan(setting.mean("micro_f1"))
    with pytest.raises(TrainingError, match="trials of every setting diverged; take a lower lr"):
        _ = made_result(setting).best


def test_the_files(tmp_path):
    paper = (0.86, 0.001)
    result = made_result(
        made_up(0.5, 0.7, published=paper), made_up(), made_up(0.4, math.nan, published=(math.nan,) * 2)
    )
    write_results(result, tmp_path)
    rows = table(tmp_path / "summary.csv")
    assert rows[0] == {
        "lr": "0.2", "layers": "8-4", "trials": "2", "diverged": "0", "seconds": "0.5", "paper": "0.86",
        "micro_f1_mean": "0.6", "micro_f1_std": str(statistics.stdev([0.5, 0.7])), "paper_std": "0.001",
    }  # fmt: skip
    assert [row["trials"] for row in rows] == ["2", "0", "2"]
    assert [row["paper"] for row in rows] == ["0.86", "", ""]
    image = Image.open(tmp_path / "sweep.png")
    assert image.size[0] >= 1000
    assert image.convert("L").getextrema() == (0, 255) or image.convert("L").getextrema()[0] < 60
    assert ET.parse(tmp_path / "sweep.svg").getroot().tag.endswith("svg")
    assert "diverged" in (tmp_path / "sweep.svg").read_text("utf-8")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    write_results(result, tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_plot_of_nothing_but_failures(tmp_path):
    write_results(made_result(made_up(math.nan, math.nan)), tmp_path)
    assert (tmp_path / "sweep.png").stat().st_size > 1000


@pytest.mark.parametrize(
    ("base", "settings", "seeds", "message"),
    [
        (
            LINEAR,
            [],
            (0,),
            "a sweep needs at least one setting and one seed, no seed twice. Got 0 settings and seeds 0",
        ),
        (LINEAR, [{}], (), "Got 1 settings and no seeds instead"),
        (LINEAR, [{}], (1, 1), "Got 1 settings and seeds 1, 1 instead"),
        (LINEAR, [{}, {"dropout": 2}], (0,), "dropout must be at least 0 and below 1. Got 2.0 instead"),
        (LINEAR, [{}, {"layers": (8,)}], (0,), "head 'linear' has no hidden layers"),
        (LINEAR, [{}, {"loss": "ce"}], (0,), "loss 'ce' is for one label a row"),
        (LINEAR, [{}, {"loss_options": {"gamma": 2.0}}], (0,), "loss 'bce' has no option 'gamma'"),
        (
            LINEAR,
            [{}, {"loss": "asl", "loss_options": {"clip": 2}}],
            (0,),
            "gamma_positive must be at least 0 and clip",
        ),
        (replace(LINEAR, folds=53), [{}], (0,), "folds must be from 2 to the number of rows, 52. Got 53 instead"),
        (LINEAR, [{}, {"folds": 3}], (0,), "folds can't differ between settings: all trials are to be measured on the"),
        (LINEAR, [{}], (0, -1), "seed must be between 0 and"),
        (replace(LINEAR, refit=True), [{}], (0,), "a sweep does without refit: models trained on every row have none"),
        (replace(MLP, layers=None), [{}, {"head": "gmlp", "layers": (7,)}], (0,), "they must be even"),
    ],
)
def test_settings_that_do_not_fit_are_refused_before_training(base, settings, seeds, message, toy_store, folder):
    with pytest.raises(ConfigError, match=message):
        sweep(toy_store(), base, settings, folder=folder, seeds=seeds)
    assert not folder.exists()


def test_without_rows_to_measure_on(make_store, folder):
    x, y = np.random.default_rng(0).normal(size=(20, 3)).astype(np.float16), np.eye(20, 2, dtype=np.int8)
    store, image = make_store({"image": x}, y, ["train"] * 20), replace(LINEAR, fusion="image")
    with pytest.raises(ConfigError, match="made has no labelled validation rows to measure trials on; take --folds 5"):
        sweep(store, image, [{}], folder=folder, seeds=(0,))
    folded = sweep(store, replace(image, folds=4), [{}], folder=folder, seeds=(0,))
    assert (folded.n_done, folded.split, folded.n_rows) == (1, "oof", 20)
    with pytest.raises(ConfigError, match="fusion 'text' needs text features"):
        sweep(store, replace(image, folds=2), [{"fusion": "text"}], folder=folder, seeds=(0,))


def test_other_content_or_labels_are_other_trials(toy_store, folder):
    def trained(**columns):
        store = toy_store()
        vars(store).update(columns)
        found = []
        sweep(store, LINEAR, [{}], folder=folder, seeds=(0,), on_trial=lambda result: found.append(result.n_done))
        return found == [0, 1]

    store = toy_store()
    refreshed, unlabelled = store.digests.copy(), store.targets.copy()
    refreshed[3], unlabelled[50] = "another", -1
    none = unlabelled.copy()
    none[50] = 0
    assert trained()
    assert not trained()
    assert trained(digests=refreshed)
    assert trained(targets=unlabelled)
    assert trained(targets=none)
    assert not trained(targets=unlabelled)


def test_without_rows_to_train_on(make_store, folder):
    x, y = np.zeros((4, 3), np.float16), np.eye(4, 2, dtype=np.int8)
    with pytest.raises(DataError, match="made has no labelled rows in its 'train' split"):
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
    problem, chosen = open_problem(store)
    used = used_features(chosen, problem.widths)
    experiment = Experiment(LINEAR, [{"lr": 0.1}, {"lr": 0.2}], "a title", [(0.5, 0.1), None])
    result = run_sweep(store, problem, used, experiment, folder, (0,))
    assert (result.title, [setting.published for setting in result.settings]) == ("a title", [(0.5, 0.1), None])
    assert sorted(path.name for path in folder.iterdir() if path.name[0] != ".") == [JOURNAL]


def test_multi_class(toy_store, folder):
    store = toy_store("multiclass")
    result = sweep(store, LINEAR, grid({"loss": ["ce", "bce"], "lr": [0.1, 0.2]}), folder=folder, seeds=(0,))
    assert result.fields == ("loss", "lr")
    for setting in result.settings:
        run = train_head(store, setting.config)
        assert setting.trials[0].metrics == pytest.approx(run.metrics["val"], abs=1e-6)
