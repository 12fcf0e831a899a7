"""Two runs on the same rows: differences, tests, and the rows on which they differ."""

import csv
from dataclasses import replace

import numpy as np
import pytest
from scipy.stats import binomtest
from sklearn.metrics import f1_score

import cachefuse
from cachefuse.errors import DataError, RunError
from cachefuse.runs.against import evaluate_against, row_scores, write_differences
from cachefuse.runs.ensemble import ensemble
from cachefuse.runs.evaluate import evaluate
from cachefuse.runs.save import load_run, save_run
from cachefuse.runs.train import train_head
from cachefuse.training.config import TrainConfig
from fixtures.messages import naming, says

QUICK = TrainConfig(head="linear", epochs=3, lr=0.03)


@pytest.fixture(scope="module")
def runs(data):
    """Runs on the same rows by their fusions, and one of folds."""
    changes = {"sum": {}, "text": {"fusion": "text"}, "folds": {"folds": 3}, "other folds": {"folds": 4, "seed": 1}}
    return {name: train_head(data.store, replace(QUICK, **change)) for name, change in changes.items()}


def test_a_difference_is_that_of_two_evaluations(data, runs):
    found = evaluate_against(runs["sum"], runs["text"], data.store, n_resamples=50)
    first, second = (evaluate(runs[name], data.store, n_resamples=0) for name in ("sum", "text"))
    assert (found.n_rows, found.n_groups, found.n_held_out, found.split) == (29, 29, (29, 29), "val")
    assert found.metrics.keys() == first.metrics.keys()
    for name, figure in found.metrics.items():
        assert (figure.run, figure.against) == pytest.approx((first.metrics[name], second.metrics[name]), nan_ok=True)
        assert figure.difference.value == pytest.approx(figure.run - figure.against, nan_ok=True)
    for c, name in enumerate(data.store.classes):
        figure = found.per_class[name]
        expected = (f1_score(x.targets[:, c], x.predictions[:, c], zero_division=0) for x in (first, second))
        assert (figure.run, figure.against) == pytest.approx(tuple(expected))
        assert figure.p_corrected >= figure.difference.p
    right = [(x.targets == x.predictions).all(axis=1) for x in (first, second)]
    only = int((right[0] & ~right[1]).sum()), int((right[1] & ~right[0]).sum())
    exact = found.metrics["exact_match"].difference
    assert exact.test == "exact McNemar"
    assert exact.p == pytest.approx(binomtest(only[0], sum(only)).pvalue if sum(only) else 1)


def test_turned_round_it_is_the_opposite(data, runs):
    one = evaluate_against(runs["sum"], runs["text"], data.store, n_resamples=50)
    other = evaluate_against(runs["text"], runs["sum"], data.store, n_resamples=50)
    for name, figure in one.metrics.items():
        found = other.metrics[name].difference
        assert (-found.value, -found.high, -found.low) == pytest.approx(
            (figure.difference.value, figure.difference.low, figure.difference.high), nan_ok=True
        )
        assert found.p == figure.difference.p


def test_rows_that_differ_come_with_what_each_run_says(data, runs, tmp_path):
    found = evaluate_against(runs["sum"], runs["text"], data.store, n_resamples=5)
    first, second = (evaluate(runs[name], data.store, n_resamples=0) for name in ("sum", "text"))
    differ = (first.predictions != second.predictions).any(axis=1)
    assert {row.id for row in found.rows} == {str(data.store.ids[row]) for row in first.rows[differ]}
    apart = [abs(row.run_score - row.against_score) for row in found.rows]
    assert apart == sorted(apart, reverse=True)
    places = {str(data.store.ids[row]): i for i, row in enumerate(first.rows)}
    for row in found.rows:
        i = places[row.id]
        for names, chosen in (
            (row.truth, first.targets),
            (row.run, first.predictions),
            (row.against, second.predictions),
        ):
            assert list(names) == [data.store.classes[c] for c in np.flatnonzero(chosen[i])]
    write_differences(found, tmp_path / "d.csv")
    written = list(csv.DictReader((tmp_path / "d.csv").read_text().splitlines()))
    assert [line["id"] for line in written] == [row.id for row in found.rows]
    assert written[0]["run"] == "; ".join(found.rows[0].run)


def test_only_rows_held_out_by_both_are_compared(data, runs):
    """One run held out val, the other every fold of train and val: val is common, and neither has seen it."""
    for one, other, n, n_held_out in (
        ("sum", "folds", 29, (29, 89)),
        ("folds", "sum", 29, (89, 29)),
        ("folds", "other folds", 89, (89, 89)),
    ):
        found = evaluate_against(runs[one], runs[other], data.store, n_resamples=5)
        assert (found.n_rows, found.n_held_out) == (n, n_held_out)
    whole = runs["folds"].held_out
    rows = data.labelled("val")
    scores = whole.scores[np.searchsorted(whole.rows, rows)]
    ap = evaluate_against(runs["sum"], runs["folds"], data.store, n_resamples=5).metrics["micro_ap"]
    from sklearn.metrics import average_precision_score

    assert ap.against == pytest.approx(average_precision_score(data.hot[rows].ravel(), scores.ravel()))


def test_a_split_that_neither_has_seen(data, runs):
    found = evaluate_against(runs["sum"], runs["folds"], data.store, "dev", n_resamples=5)
    assert (found.n_rows, found.split) == (20, "dev")
    expected = evaluate(runs["folds"], data.store, "dev", n_resamples=0).metrics
    assert {name: figure.against for name, figure in found.metrics.items()} == pytest.approx(expected, nan_ok=True)


@pytest.mark.parametrize(
    ("one", "other", "split", "error", "message"),
    [
        ("sum", "sum", None, RunError, "made-sum-linear-asl itself"),
        ("sum", "folds", "val", RunError, "made-sum-linear-asl val --split"),
        ("sum", "text", "train", RunError, "train --split"),
        ("sum", "text", "test", DataError, "test"),
        ("sum", "text", "prod", DataError, "prod"),
    ],
)
def test_rows_that_one_has_seen_are_refused(one, other, split, error, message, data, runs):
    with pytest.raises(error, match=naming(message)):
        evaluate_against(runs[one], runs[other], data.store, split, n_resamples=5)


def test_without_common_rows_there_is_nothing_to_compare(data, runs):
    held_out = runs["text"].held_out
    other = replace(runs["text"], held_out=replace(held_out, rows=held_out.rows - 60), name="moved")
    with pytest.raises(RunError, match=naming("made-sum-linear-asl moved")):
        evaluate_against(runs["sum"], other, data.store, n_resamples=5)
    with pytest.raises(RunError, match=naming("none held-out")):
        evaluate_against(runs["sum"], replace(other, held_out=None, name="none"), data.store, n_resamples=5)
    with pytest.raises(RunError, match=naming("old changed")):
        evaluate_against(runs["sum"], replace(runs["text"], split_digest="0", name="old"), data.store, n_resamples=5)
    with pytest.raises(RunError, match=naming("old changed")):
        evaluate_against(
            runs["sum"], replace(runs["text"], split_digest="0", name="old"), data.store, "dev", n_resamples=5
        )


def test_runs_of_other_data_are_refused(data, multiclass, runs):
    with pytest.raises(RunError, match=naming("other dataset")):
        evaluate_against(runs["sum"], replace(runs["text"], dataset="there", name="other"), data.store, n_resamples=5)
    with pytest.raises(RunError, match=naming("classes")):
        evaluate_against(runs["sum"], train_head(multiclass.store, QUICK), data.store, n_resamples=5)


def test_an_ensemble_and_a_refitted_run_have_held_out_rows_of_their_own(data, runs):
    joined = ensemble([runs["sum"], runs["text"]], data.store)
    refitted = train_head(data.store, replace(QUICK, refit=True))
    for one in (joined, refitted):
        found = evaluate_against(one, runs["sum"], data.store, n_resamples=5)
        assert found.n_rows == 29
    assert all(figure.difference.value == 0 for figure in found.metrics.values())  # scored before it was refitted
    assert all(figure.difference.p == 1 for figure in found.metrics.values())
    assert not found.rows
    with pytest.raises(RunError, match=naming("made-ensemble train")):
        evaluate_against(joined, runs["folds"], data.store, "train", n_resamples=5)
    mixed = ensemble([runs["sum"], runs["folds"]], data.store)
    with pytest.raises(RunError, match=naming("made-ensemble held-out")):
        evaluate_against(mixed, runs["sum"], data.store, n_resamples=5)


def test_saved_runs_and_one_of_many_classes(multiclass, tmp_path):
    paths = [save_run(train_head(multiclass.store, replace(QUICK, fusion=f)), tmp_path) for f in ("sum", "text")]
    one, other = map(load_run, paths)
    heard = []
    found = cachefuse.evaluate_against(
        one, other, multiclass.store, n_resamples=20, on_progress=lambda *step: heard.append(step)
    )
    assert found.metrics["accuracy"].difference.test == "exact McNemar"
    assert found.metrics["macro_f1"].difference.test == "paired bootstrap"
    assert all(len(row.run) == len(row.against) == 1 for row in found.rows)
    assert heard[-1][0] == heard[-1][1]
    assert [done for done, _ in heard] == sorted(done for done, _ in heard)
    assert says(str(found.as_dict()["n_differ"]), str(len(found.rows)))
    with pytest.raises(RunError, match=naming("itself")):
        evaluate_against(one, load_run(paths[0]), multiclass.store)


def test_how_right_a_row_is(data):
    from cachefuse.metrics.tasks import TaskSlice

    targets = np.array([[1, 1, 0, 1, 0], [0, 0, 0, -1, -1], [0, 1, 0, 0, 1]])
    predictions = np.array([[1, 0, 0, 1, 0], [0, 0, 0, 1, 0], [0, 0, 1, 1, 0]], bool)
    tasks = TaskSlice("a", "multilabel", slice(0, 3)), TaskSlice("b", "multiclass", slice(3, 5))
    assert row_scores(targets, predictions, tasks) == pytest.approx([(2 / 3 + 1) / 2, 1, 0])
    graded = np.array([[0.3, 0.9, 0]])
    chosen = np.array([[True, False, False]])
    assert row_scores(graded, chosen, [TaskSlice("", "vqa", slice(0, 3))]) == pytest.approx([0.3])
