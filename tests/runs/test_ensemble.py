import json
import logging
from dataclasses import replace

import numpy as np
import pytest
import torch
import zarr
from sklearn.metrics import f1_score

from cachefuse.errors import ConfigError, RunError
from cachefuse.metrics.thresholds import choose_thresholds, crossfit_decisions
from cachefuse.runs.ensemble import ensemble
from cachefuse.runs.evaluate import evaluate
from cachefuse.runs.predict import predict_split
from cachefuse.runs.save import load_run, save_run
from cachefuse.runs.tables import StoreTables
from cachefuse.runs.train import train_head
from cachefuse.store.columns import column_checksum, read_column
from cachefuse.store.store import FeatureStore
from cachefuse.training.config import TrainConfig
from cachefuse.training.selection import load_table
from fixtures.messages import naming, says

QUICK = TrainConfig(head="linear", epochs=4, lr=0.03)
FOLDED = replace(QUICK, folds=3)


@pytest.fixture
def store(toy_store):
    return toy_store()


def scores_of(run, store, rows=None):
    rows = np.arange(len(store)) if rows is None else rows
    return run.scores(StoreTables([run], store), torch.from_numpy(rows))


def targets_of(store):
    return load_table(store, {}).targets.numpy()


@pytest.mark.parametrize("members", [(1, 1), (1, 3), (2, 1, 3)])
def test_every_run_counts_the_same(members, store):
    runs = [train_head(store, replace(QUICK, members=n, seed=10 * i)) for i, n in enumerate(members)]
    joined = ensemble(runs, store)
    assert len(joined.members) == sum(members)
    assert sum(member.weight for member in joined.members) == pytest.approx(1)
    expected = np.mean([scores_of(run, store) for run in runs], axis=0)
    np.testing.assert_allclose(scores_of(joined, store), expected, atol=1e-6)


def test_the_runs_own_weights_are_kept_in_proportion(store):
    one = train_head(store, replace(QUICK, members=2))
    uneven = replace(one, members=[replace(m, weight=w) for m, w in zip(one.members, (3.0, 1.0), strict=True)])
    joined = ensemble([uneven, train_head(store, replace(QUICK, seed=5))], store)
    assert [member.weight for member in joined.members] == [0.375, 0.125, 0.5]


@pytest.mark.parametrize(("config", "split"), [(QUICK, "val"), (FOLDED, "oof"), (replace(QUICK, refit=True), "val")])
def test_thresholds_are_chosen_anew_and_measured_on_rows_that_did_not_choose_them(config, split, store):
    runs = [train_head(store, replace(config, fusion=fusion)) for fusion in ("sum", "concat", "text")]
    joined = ensemble(runs, store)
    scores = np.mean([run.held_out.scores for run in runs], axis=0)
    np.testing.assert_allclose(joined.held_out.scores, scores, atol=1e-7)
    assert joined.held_out.split == split
    y = targets_of(store)[joined.held_out.rows]
    np.testing.assert_array_equal(joined.thresholds, choose_thresholds(y, joined.held_out.scores, "micro_f1", False))
    decided = crossfit_decisions(y, joined.held_out.scores, runs[0].held_out.parts, "micro_f1", False)
    assert joined.results[split].metrics["micro_f1"] == f1_score(y, decided, average="micro")
    assert joined.results[split].n_rows == len(y)
    assert list(joined.results) == (["train", "val"] if config is QUICK else [split])


@pytest.mark.parametrize(
    ("own", "asked", "per_class"),
    [("class", None, True), ("auto", "class", True), ("class", "global", False), ("none", None, None)],
)
def test_thresholds_are_of_the_kind_asked_for_or_of_the_first_runs(own, asked, per_class, store):
    first = train_head(store, replace(FOLDED, thresholds=own, threshold_metric="macro_f1"))
    joined = ensemble([first, train_head(store, replace(FOLDED, fusion="concat"))], store, thresholds=asked)
    y = targets_of(store)[joined.held_out.rows]
    expected = [0.5] * 3 if per_class is None else choose_thresholds(y, joined.held_out.scores, "macro_f1", per_class)
    np.testing.assert_array_equal(joined.thresholds, expected)


def test_folds_that_differ_still_hold_out_the_same_rows(store):
    """Each row's scores are by models that have not seen it, whichever fold it was in."""
    runs = [train_head(store, FOLDED), train_head(store, replace(FOLDED, seed=1)), train_head(store, QUICK)]
    assert (runs[0].held_out.parts != runs[1].held_out.parts).any()
    joined = ensemble(runs[:2], store)
    assert (joined.held_out.split, len(joined.held_out.rows)) == ("oof", 52)
    assert {member.fold for member in joined.members} == {None}


def test_comes_back_from_its_directory_and_is_a_run_like_any_other(store, tmp_path):
    runs = [train_head(store, replace(FOLDED, fusion=fusion)) for fusion in ("sum", "mixed", "sum")]
    paths = [save_run(run, tmp_path / "runs") for run in runs]
    joined = ensemble([load_run(path) for path in paths], store)
    path = save_run(joined, tmp_path / "runs")
    assert path.name == "made-ensemble-1"
    loaded = load_run(path)
    assert loaded.sources == ("made-sum-linear-asl-1", "made-mixed-linear-asl-1", "made-sum-linear-asl-2")
    assert loaded.seconds == pytest.approx(sum(run.seconds for run in runs), abs=0.01)
    assert loaded.n_parameters == sum(run.n_parameters for run in runs)
    np.testing.assert_array_equal(scores_of(loaded, store), scores_of(joined, store))
    found = predict_split(loaded, store)
    mean = np.mean([predict_split(run, store).scores for run in runs], axis=0)
    np.testing.assert_allclose(found.scores, mean, atol=1e-6)
    np.testing.assert_array_equal(found.labels, found.scores >= loaded.thresholds)
    measured = evaluate(loaded, store, n_resamples=0)
    assert measured.split == "oof"
    assert {name: measured.metrics[name] for name in joined.results["oof"].metrics} == joined.results["oof"].metrics
    written = json.loads((path / "run.json").read_text())["results"]["oof"]["per_class"]
    assert {name: measured.per_class[name] for name in written} == written
    with pytest.raises(RunError, match="--split"):
        evaluate(loaded, store, without=["image"])
    assert evaluate(loaded, store, "train", without=["image"], n_resamples=0).caution.startswith("run made-ensemble-1")


def test_runs_may_read_different_encoders(store, add_features):
    rng = np.random.default_rng(1)
    add_features(store, "other", "image", rng.normal(size=(60, 4)).astype(np.float16))
    add_features(store, "other", "text", rng.normal(size=(60, 3)).astype(np.float16))
    runs = [
        train_head(store, FOLDED, encoders=["toy"]),
        train_head(store, replace(FOLDED, fusion="image"), encoders=["other"]),
        train_head(store, replace(FOLDED, fusion="text"), encoders=["toy", "other"]),
    ]
    joined = ensemble(runs, store)
    assert {m: [used.encoder for used in group] for m, group in joined.features.items()} == {
        "image": ["toy", "other"], "text": ["toy", "other"],
    }  # fmt: skip
    expected = np.mean([scores_of(run, store) for run in runs], axis=0)
    np.testing.assert_allclose(scores_of(joined, store), expected, atol=1e-6)
    # One of them reads no text at all: without the image, it says the same of every row.
    found = evaluate(joined, store, "train", without=["image"], n_resamples=0)
    assert 0 < found.metrics["macro_ap"] < 1


def warned(runs, store, caplog, **options):
    with caplog.at_level(logging.WARNING):
        joined = ensemble(runs, store, **options)
    assert joined.held_out is None
    return joined, [record.getMessage() for record in caplog.records]


def test_runs_that_held_out_other_rows_are_averaged_in_their_thresholds_too(store, caplog):
    runs = [train_head(store, QUICK), train_head(store, replace(FOLDED, thresholds="class"))]
    joined, (message,) = warned(runs, store, caplog)
    assert says(message, "made-sum-linear-asl oof val thresholds mean")
    np.testing.assert_array_equal(joined.thresholds, (runs[0].thresholds + runs[1].thresholds) / 2)
    assert joined.results == {}  # some of its models were trained on each of the labelled splits
    with pytest.raises(RunError, match=naming("--split train val")):
        evaluate(joined, store)
    caution = evaluate(joined, store, "val", n_resamples=0).caution
    assert "made-ensemble was trained on val rows" in caution


def test_other_labelled_splits_are_measured(make_store, caplog):
    rng = np.random.default_rng(0)
    x = {"image": rng.normal(size=(60, 6)).astype(np.float16)}
    y = (x["image"][:, :3] > 0).astype(np.int8)
    store = make_store(x, y, ["train"] * 40 + ["test"] * 20)
    runs = [train_head(store, replace(QUICK, fusion="image", seed=seed)) for seed in (0, 1)]
    joined, (message,) = warned(runs, store, caplog)
    assert says(message, "made-image-linear-asl")
    assert list(joined.results) == ["train", "test"]
    rows = np.arange(40, 60)
    expected = f1_score(y[rows], scores_of(joined, store, rows) >= 0.5, average="micro")
    assert joined.results["test"].metrics["micro_f1"] == expected


def changed(store, column, row, value):
    """The store with another value in a column of its samples."""
    values = read_column(store.path, column).copy()
    values[row] = value
    array = zarr.open_group(store.path, mode="a")["samples"][column]
    array[:] = values
    array.attrs["checksum"] = column_checksum(values)
    return FeatureStore(store.path)


def test_a_row_that_has_lost_its_label_is_held_out_by_one_run_only(store, caplog):
    before = train_head(store, QUICK)
    store = changed(store, "target", 45, -1)
    _, (message,) = warned([before, train_head(store, replace(QUICK, fusion="text"))], store, caplog)
    assert message.startswith("run made-text-linear-asl held out other rows (val) than run made-sum-linear-asl (val): ")


def test_a_store_whose_splits_changed_has_no_rows_held_out_in_common(store, caplog):
    runs = [train_head(store, replace(QUICK, seed=seed)) for seed in (0, 1)]
    joined, (message,) = warned(runs, changed(store, "split", 0, "val"), caplog)
    assert says(message, "made made-sum-linear-asl")
    assert list(joined.results) == ["train"]


def test_an_ensemble_knows_that_its_runs_may_have_seen_what_is_held_out_now(store, caplog):
    runs = [train_head(store, replace(QUICK, seed=seed)) for seed in (0, 1)]
    store = changed(store, "split", 0, "val")
    joined, _ = warned(runs, store, caplog)
    assert says(evaluate(joined, store, "val", n_resamples=0).caution, "changed")


def test_samples_whose_content_changed_are_no_longer_the_rows_held_out(store, caplog):
    runs = [train_head(store, replace(QUICK, seed=seed)) for seed in (0, 1)]
    _, (message,) = warned(runs, changed(store, "digest", 45, "another"), caplog)
    assert says(message, "made made-sum-linear-asl")


def test_thresholds_where_no_rows_choose_them(store, caplog):
    runs = [train_head(store, QUICK), train_head(store, FOLDED)]
    joined, _ = warned(runs, store, caplog, thresholds="none")
    assert joined.thresholds.tolist() == [0.5] * 3
    for kind in ("global", "class"):
        with pytest.raises(ConfigError, match=naming(f"thresholds {kind}")):
            ensemble(runs, store, thresholds=kind)


def test_multi_class_runs(toy_store):
    store = toy_store("multiclass")
    runs = [train_head(store, replace(FOLDED, loss=loss)) for loss in ("ce", "bce")]
    joined = ensemble(runs, store)
    assert joined.thresholds.tolist() == [0.5] * 3
    right = joined.held_out.scores.argmax(1) == store.targets[joined.held_out.rows]
    assert joined.results["oof"].metrics["accuracy"] == pytest.approx(right.mean())
    with pytest.raises(ConfigError, match="thresholds"):
        ensemble(runs, store, thresholds="class")


def test_an_ensemble_may_be_a_member_of_another(store):
    a, b, c = (train_head(store, replace(FOLDED, seed=seed)) for seed in range(3))
    joined = ensemble([ensemble([a, b], store), c], store)
    held_out = (a.held_out.scores + b.held_out.scores) / 4 + c.held_out.scores / 2
    np.testing.assert_allclose(joined.held_out.scores, held_out, atol=1e-6)
    np.testing.assert_allclose(
        scores_of(joined, store), (scores_of(a, store) + scores_of(b, store)) / 4 + scores_of(c, store) / 2, atol=1e-6
    )


def test_the_runs_stay_as_they_were(store):
    runs = [train_head(store, replace(FOLDED, seed=seed)) for seed in (0, 1)]
    before = [(run.held_out.scores.copy(), run.thresholds.copy(), scores_of(run, store)) for run in runs]
    ensemble(runs, store)
    for run, (held_out, thresholds, scores) in zip(runs, before, strict=True):
        np.testing.assert_array_equal(run.held_out.scores, held_out)
        np.testing.assert_array_equal(run.thresholds, thresholds)
        np.testing.assert_array_equal(scores_of(run, store), scores)
        assert [member.fold for member in run.members] == [0, 1, 2]


def test_needs_two_different_runs(store, tmp_path):
    run = train_head(store, QUICK)
    for runs in ([], [run]):
        with pytest.raises(RunError, match=naming(f"2 {len(runs)}")):
            ensemble(runs, store)
    other = train_head(store, replace(QUICK, seed=1))
    with pytest.raises(RunError, match="made-sum-linear-asl"):
        ensemble([run, other, run], store)
    path = save_run(run, tmp_path / "runs")
    with pytest.raises(RunError, match="made-sum-linear-asl-1"):
        ensemble([load_run(path), load_run(path.parent / ".." / "runs" / path.name)], store)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dataset": "other"}, "b other a made"),
        ({"classes": ("x", "y", "z")}, "b a classes"),
        ({"task": "multiclass"}, "b multiclass a multilabel"),
    ],
    ids=str,
)
def test_refuses_runs_that_do_not_go_together(change, message, store):
    a, b = (replace(train_head(store, replace(QUICK, seed=seed)), name="ab"[seed]) for seed in (0, 1))
    if "task" in change:
        change = {"manifest": b.manifest.model_copy(update=change)}
    with pytest.raises(RunError, match=naming(message)):
        ensemble([a, replace(b, **change)], store)


def test_refuses_a_store_that_they_were_not_trained_on(store, toy_store, tmp_path):
    runs = [replace(train_head(store, replace(QUICK, seed=seed)), name="ab"[seed]) for seed in (0, 1)]
    with pytest.raises(RunError, match=naming("made other")):
        ensemble(runs, toy_store(name="other"))
    used = {"image": (replace(runs[1].features["image"][0], encoder="gone"),)}
    lost = replace(runs[1], members=[replace(runs[1].members[0], features=used)])
    with pytest.raises(RunError, match=naming("b gone image")):
        ensemble([runs[0], lost], store)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"thresholds": "best"}, "thresholds"), ({"device": "tpu"}, "device tpu")],
)
def test_refuses_settings_that_do_not_exist(options, message, store):
    runs = [train_head(store, replace(QUICK, seed=seed)) for seed in (0, 1)]
    with pytest.raises(ConfigError, match=naming(message)):
        ensemble(runs, store, **options)
