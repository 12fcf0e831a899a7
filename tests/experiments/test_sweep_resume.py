"""A sweep that goes on: what is run again, and what never is."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import pytest

from cachefuse.errors import ConfigError
from cachefuse.experiments.files import JOURNAL, only_sweep, read_trials
from cachefuse.experiments.settings import grid
from cachefuse.experiments.sweep import sweep
from cachefuse.store.columns import read_columns, replace_samples
from cachefuse.store.store import FeatureStore
from cachefuse.training.config import TrainConfig
from fixtures.messages import naming
from fixtures.sweeps import LINEAR, MLP, figures, lines


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


def test_trials_with_other_groups_are_trained_again(toy_store, folder):
    store, base = toy_store(), replace(MLP, folds=2)
    sweep(store, base, [{"lr": 0.1}], folder=folder, seeds=(0,))
    for n, names in ((2, [f"group {i // 2}" for i in range(60)]), (3, [f"group {i // 3}" for i in range(60)])):
        columns, appended = read_columns(store.path)
        columns["group"] = np.array(names, np.dtypes.StringDType())
        replace_samples(store.path, columns, appended, [])
        for _ in range(2):
            sweep(FeatureStore(store.path), base, [{"lr": 0.1}], folder=folder, seeds=(0,))
            assert len(lines(folder)) == n


def relabel(store):
    targets = store.targets.copy()
    targets[45, 0] ^= 1
    return targets


@pytest.mark.parametrize("change", ["targets", "splits", "features", "metrics"])
@pytest.mark.one_in(2)
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
@pytest.mark.one_in(3)
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
from cachefuse.store.store import FeatureStore
from cachefuse.training.config import TrainConfig
from cachefuse.experiments.sweep import sweep
base = TrainConfig(head="mlp", layers=(8,), patience=0, batch_size=16)
settings = [{"epochs": epochs} for epochs in (2, 3, 4, 1000000)]
sweep(FeatureStore(Path(sys.argv[1])), base, settings, folder=Path(sys.argv[2]), seeds=(0,))
"""


@pytest.mark.slow
def test_goes_on_after_a_kill(toy_store, folder):
    store = toy_store()
    command = [sys.executable, "-c", SLOW, str(store.path), str(folder)]
    process = subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"})
    try:
        deadline = time.monotonic() + 600
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
    with only_sweep(folder), pytest.raises(ConfigError, match=naming(f"{folder}")):
        sweep(toy_store(), LINEAR, [{}], folder=folder, seeds=(0,))
    sweep(toy_store(name="b"), LINEAR, [{}], folder=folder, seeds=(0,))


@pytest.mark.slow
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


@pytest.mark.parametrize("special", ["pipe", "device", "folder"])
@pytest.mark.parametrize("name", ["trials.jsonl", "trials.csv", "summary.csv"])
def test_special_files_are_replaced_or_named_at_once(special, name, toy_store, folder):
    store, path = toy_store(), folder / name
    folder.mkdir(parents=True)
    if special == "pipe":
        os.mkfifo(path)
    elif special == "device":
        path.symlink_to("/dev/zero")
    else:
        path.mkdir()
    before, _ = signal.signal(signal.SIGALRM, signal.default_int_handler), signal.alarm(60)
    try:
        if name == JOURNAL or special == "folder":
            with pytest.raises((OSError, ConfigError), match=naming(name)):
                sweep(store, MLP, [{}], folder=folder, seeds=(0,))
        else:
            sweep(store, MLP, [{}], folder=folder, seeds=(0,))
            assert path.is_file()
            assert not path.is_symlink()
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def test_a_damaged_line_is_said(toy_store, folder, caplog):
    store = toy_store()
    first = sweep(store, MLP, [{}], folder=folder, seeds=(0, 1))
    journal = bytearray((folder / JOURNAL).read_bytes())
    journal[50] ^= 1
    (folder / JOURNAL).write_bytes(journal)
    again = sweep(store, MLP, [{}], folder=folder, seeds=(0, 1))
    assert figures(again) == figures(first)
    assert str(folder / JOURNAL) in caplog.text
