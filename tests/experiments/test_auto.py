"""The search for the best model: what it tries, how it stops, what it chooses, and what it keeps."""

import csv
import io
import math
from dataclasses import replace

import numpy as np
import pytest
from sklearn.metrics import average_precision_score

from cachefuse.errors import ConfigError
from cachefuse.experiments import halving
from cachefuse.experiments.auto import auto
from cachefuse.experiments.candidates import Candidate, candidates
from cachefuse.report.provenance import settings, train_command
from cachefuse.runs.files import list_runs
from cachefuse.runs.model_card import model_card
from cachefuse.runs.predict import predict_split
from cachefuse.runs.save import load_run, save_run
from cachefuse.training.config import TrainConfig
from cachefuse.training.data import open_training_data
from cachefuse.training.train import train_model
from fixtures.messages import naming, says

N, CLASSES = 90, 3
SPLITS = ["train"] * 60 + ["val"] * 20 + ["test"] * 10
BASE = TrainConfig(folds=3)
FEW = 5  # candidates


@pytest.fixture(autouse=True)
def hurried(monkeypatch):
    """Train small networks for two epochs."""

    def quick(*args):
        for each in candidates(*args):
            fits = (
                {} if each.config.is_solved else {"epochs": 2, "layers": () if each.config.head == "linear" else (8,)}
            )
            yield replace(each, config=replace(each.config, **fits))

    monkeypatch.setattr(halving, "candidates", lambda *args: list(quick(*args)))
    monkeypatch.setattr("cachefuse.experiments.auto.RESAMPLES", 50)


@pytest.fixture
def store(make_store_in, tmp_path):
    return made(make_store_in, tmp_path)


def made(make_store_in, folder, task="multilabel", shuffled=False, **options):
    """Make a store of which the labels follow from its features, but for some noise."""
    rng = np.random.default_rng(0)
    x = {m: rng.normal(size=(N, 5)).astype(np.float16) for m in ("image", "text")}
    signal = np.concatenate(list(x.values()), axis=1) @ rng.normal(size=(10, CLASSES)) + rng.normal(size=(N, CLASSES))
    targets = (signal > 1).astype(np.int8) if task == "multilabel" else signal.argmax(1).astype(np.int32)
    if shuffled:
        targets = targets[rng.permutation(N)]
    return make_store_in(folder, x, targets, SPLITS, task=task, **options)


def search(store, trials=FEW, **options):
    return auto(store, trials=trials, base=options.pop("base", BASE), device="cpu", **options)


def test_the_run_is_the_mean_of_calibrated_models_trained_on_all_rows(store):
    run = search(store)
    board = run.leaderboard
    assert run.name == "made-auto"
    assert sum(entry.weight for entry in board.entries) == pytest.approx(1)
    scores = predict_split(run, store, "test", device="cpu").scores
    mean = np.zeros_like(scores, dtype=float)
    for member in run.members:
        assert member.fold is None
        alone = replace(run, members=[replace(member, calibration=None)])
        own = predict_split(alone, store, "test", device="cpu").scores
        mean += member.weight * member.calibration(own, run.tasks)
    np.testing.assert_allclose(scores, mean, atol=1e-6)


def test_the_leaderboard_says_what_was_done(store):
    seen = []
    run = search(store, on_trial=seen.append)
    board = run.leaderboard
    assert len(board.entries) == FEW < board.n_candidates
    assert [len(each.entries) for each in seen] == sorted(len(each.entries) for each in seen)
    finished = board.finished
    assert {entry.n_folds for entry in board.entries} >= {1, 3}
    assert all(entry.metrics.keys() == run.metrics["oof"].keys() for entry in finished)
    assert board.metrics == pytest.approx(run.metrics["oof"])
    assert all(entry.log_loss >= board.log_loss for entry in finished if not entry.weight)
    rows = list(csv.DictReader(io.StringIO(board.as_csv().decode())))
    assert [row["model"] for row in rows] == ["mix", *(entry.name for entry in board.entries)]
    said = " ".join(board.reasons)
    assert says(said, f"{board.n_candidates} candidates not tried")
    for entry in finished:
        low, high = entry.interval
        assert low <= entry.metrics[board.main] <= high
        assert entry.behind.value == pytest.approx(board.metrics[board.main] - entry.metrics[board.main])


def test_better_is_said_only_where_the_paired_test_holds(store):
    board = search(store).leaderboard
    best = max(board.finished, key=lambda entry: entry.metrics[board.main])
    chosen = [replace(entry, weight=0.5) for entry in board.finished[:2]]

    def told(p, value=0.1):
        apart = replace(best.behind, p=p, value=value)
        entries = [replace(entry, behind=apart) for entry in chosen]
        return " ".join(replace(board, entries=tuple(entries)).reasons)

    assert says(told(0.01), "is better than")
    assert says(told(0.01, -0.1), "is worse than")
    assert says(told(0.2), "do not show that it is better")
    alone = [
        replace(entry, weight=float(entry is not best))
        for entry in board.finished
        if entry in (best, board.finished[-1])
    ]
    assert says(" ".join(replace(board, entries=alone).reasons), f"best single model by it, {best.name}")


def test_it_comes_back_from_its_folder(store, tmp_path):
    run = search(store)
    loaded = load_run(save_run(run, tmp_path))
    assert loaded.leaderboard == run.leaderboard or repr(loaded.leaderboard) == repr(run.leaderboard)
    ours, theirs = (predict_split(each, store, "test", device="cpu") for each in (run, loaded))
    np.testing.assert_array_equal(ours.scores, theirs.scores)
    assert (loaded.path / "leaderboard.csv").read_bytes() == run.leaderboard.as_csv()
    [listed] = list_runs(tmp_path)
    assert (listed.split, listed.settings) == ("oof", {})
    assert says(model_card(loaded), "How it was found")
    assert [name for name, _ in settings(loaded)] == [entry.name for entry in run.leaderboard.chosen]
    assert train_command(loaded) == "cachefuse auto --dataset made --encoder toy --trials 5 --folds 3"


def test_the_same_trials_give_the_same_run(store, tmp_path):
    files = [save_run(search(store), tmp_path / name) for name in "ab"]
    for name in ("model.safetensors", "held_out.safetensors"):
        assert (files[0] / name).read_bytes() == (files[1] / name).read_bytes()


def test_it_goes_on_after_an_interruption(store, tmp_path, monkeypatch):
    whole, n = search(store), 0

    def stops(*args, **options):
        nonlocal n
        n += 1
        if n == 5:
            raise KeyboardInterrupt
        return train_model(*args, **options)

    monkeypatch.setattr(halving, "train_model", stops)
    with pytest.raises(KeyboardInterrupt):
        search(store, folder=tmp_path / "trials")
    resumed = search(store, folder=tmp_path / "trials")
    n_trials = sum(entry.n_folds for entry in whole.leaderboard.entries)
    assert n == 5 + n_trials - 4 + len(resumed.members)  # the four before are not repeated
    assert (
        save_run(resumed, tmp_path / "a").joinpath("model.safetensors").read_bytes()
        == save_run(whole, tmp_path / "b").joinpath("model.safetensors").read_bytes()
    )
    assert [replace(e, seconds=0, ms_per_item=0) for e in resumed.leaderboard.chosen] == [
        replace(e, seconds=0, ms_per_item=0) for e in whole.leaderboard.chosen
    ]


def test_damaged_scores_are_computed_again(store, tmp_path):
    whole = search(store, folder=tmp_path / "trials")
    file = sorted((tmp_path / "trials" / "held_out").iterdir())[0]
    file.write_bytes(file.read_bytes()[:-3])
    again = search(store, folder=tmp_path / "trials")
    np.testing.assert_array_equal(again.held_out.scores, whole.held_out.scores)


def test_the_time_bounds_what_is_tried(store):
    """The first candidate is always trained: so a run comes out of any budget."""
    run = auto(store, minutes=1e-6, base=BASE, device="cpu")
    assert [entry.n_folds for entry in run.leaderboard.entries] == [3]
    more = auto(store, minutes=0.5, base=BASE, device="cpu").leaderboard
    assert more.seconds <= 30
    assert len(more.entries) > 2


def test_bounds_are_kept(store):
    free = search(store)
    sizes = sorted(entry.size_mb for entry in free.leaderboard.entries)
    for bound in (1.5 * sizes[0], sizes[1], 1.1 * free.size_mb):
        small = search(store, max_size_mb=bound)
        assert small.size_mb <= bound
        assert says(" ".join(small.leaderboard.reasons), f"within {bound:g} MB")
    with pytest.raises(ConfigError, match=naming("no candidate within smallest")):
        search(store, max_size_mb=1e-6)
    with pytest.raises(ConfigError, match=naming("no candidate within smallest fastest")):
        search(store, max_ms=1e-9)


def test_a_model_that_cannot_fit_takes_no_time(store):
    """The size of the first candidate, a network, is known before it is trained."""
    sizes = {entry.name: entry.size_mb for entry in search(store).leaderboard.entries}
    bound = 0.95 * next(size for name, size in sizes.items() if name.startswith("sum-mlp"))
    assert min(sizes.values()) < bound
    board = auto(store, minutes=1e-6, base=BASE, device="cpu", max_size_mb=bound).leaderboard
    assert not any(entry.name.startswith("sum-mlp") for entry in board.entries)
    assert len(board.finished) == 1


@pytest.mark.parametrize("folds", [2, 5])
def test_models_that_grow_with_their_rows_keep_the_bound(store, folds):
    """With few folds a kernel is much larger on all rows."""
    base = replace(BASE, folds=folds)
    kernel = next(e for e in search(store, base=base).leaderboard.entries if e.name == "kernel-ridge-bce")
    small = search(store, base=base, max_size_mb=1.02 * kernel.size_mb)
    assert small.size_mb <= 1.02 * kernel.size_mb


def test_shuffled_labels_give_chance(make_store_in, tmp_path):
    """Nothing leaks from the rows that are measured: not through halving, calibration or weights."""
    store, gaps = made(make_store_in, tmp_path, shuffled=True), []
    for seed in range(3):
        run = search(store, base=replace(BASE, seed=seed))
        truth = store.targets[run.held_out.rows]
        ap = np.mean([average_precision_score(truth[:, c], run.held_out.scores[:, c]) for c in range(CLASSES)])
        gaps.append(ap - truth.mean())
    assert abs(np.mean(gaps)) < 0.12


def test_rows_of_the_test_split_change_nothing(make_store_in, tmp_path):
    """Its labels, where it has some, do not take part in any choice."""
    runs = []
    for name in ("a", "b"):
        rng = np.random.default_rng(0)
        x = {"image": rng.normal(size=(N, 5)).astype(np.float16)}
        targets = (x["image"][:, :CLASSES] > 0.3).astype(np.int8)
        if name == "b":
            targets[80:] = 1 - targets[80:]
        runs.append(search(make_store_in(tmp_path / name, x, targets, SPLITS)))
    np.testing.assert_array_equal(runs[0].held_out.scores, runs[1].held_out.scores)
    assert [m.weight for m in runs[0].members] == [m.weight for m in runs[1].members]
    assert runs[0].metrics["test"] != runs[1].metrics["test"]


def test_settings_of_a_model_have_no_effect(store):
    scores = [search(store, trials=2, base=base).held_out.scores for base in (BASE, replace(BASE, epochs=1, lr=1.0))]
    np.testing.assert_array_equal(*scores)


def test_multiclass(make_store_in, tmp_path):
    run = search(made(make_store_in, tmp_path, "multiclass"))
    np.testing.assert_allclose(run.held_out.scores.sum(1), 1, atol=1e-5)
    assert run.leaderboard.main == "accuracy"


def test_groups_stay_together(make_store_in, tmp_path):
    store = made(make_store_in, tmp_path, groups=[f"g{i // 5}" for i in range(N)])
    held_out = search(store).held_out
    parts = {}
    for row, part in zip(held_out.rows, held_out.parts, strict=True):
        assert parts.setdefault(row // 5, part) == part


def test_a_candidate_that_diverges_is_told(store, monkeypatch):
    broken = Candidate(replace(BASE, fusion="sum", lr=1e6, optimizer="sgd", epochs=3, refit=True))
    monkeypatch.setattr(halving, "candidates", lambda *args: [*candidates(*args)[:1], broken])
    board = search(store, trials=3).leaderboard
    assert next(entry for entry in board.entries if entry.problem).weight == 0
    assert says(" ".join(board.reasons), "1 diverged")


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"trials": 0}, "trials at least 1"),
        ({"minutes": 0.0, "trials": None}, "minutes above 0"),
        ({"minutes": math.nan, "trials": None}, "minutes above 0"),
        ({"max_size_mb": -1.0}, "max-size-mb above 0"),
        ({"max_ms": 0.0}, "max-ms above 0"),
        ({"base": TrainConfig()}, "folds at least 2"),
    ],
)
def test_a_budget_that_is_none_is_refused(store, given, named):
    with pytest.raises(ConfigError, match=naming(named)):
        search(store, **given)


def test_candidates_differ_and_begin_with_the_default(store):
    found = candidates(store, replace(BASE, refit=True))
    assert [each.config.fusion for each in found[:2]] == ["sum", "kernel"]
    opened = [each.open(store, "cpu") for each in found]
    names = [each.name(config) for each, (_, config) in zip(found, opened, strict=True)]
    assert len(set(names)) == len(names)
    alone = [each for each in found if each.modality]
    assert {each.modality for each in alone} == {"image", "text"}
    assert all(len(each.open(store, "cpu")[0].specs) == 1 for each in alone)
    assert open_training_data(store).specs.keys() == opened[1][0].specs.keys()
