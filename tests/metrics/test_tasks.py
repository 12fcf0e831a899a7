"""Metrics of several tasks: each over the rows that have its label, and their mean."""

from dataclasses import replace

import numpy as np
import pytest
from sklearn.metrics import accuracy_score, f1_score

from cachefuse.errors import UnknownNameError
from cachefuse.metrics import METRICS, headline, metric_title
from cachefuse.metrics.bootstrap import bootstrap_intervals
from cachefuse.metrics.per_class import per_class, per_task_class
from cachefuse.metrics.tasks import TaskSlice, bind_metrics, decide_tasks
from fixtures.messages import naming

COLOR, TAGS = TaskSlice("color", "multiclass", slice(0, 3)), TaskSlice("tags", "multilabel", slice(3, 5), 1)
TASKS = (COLOR, TAGS)
N = 200


@pytest.fixture(scope="module")
def decided():
    """Targets of which a third of the colors and half of the tags are missing, scores, and predictions."""
    rng = np.random.default_rng(0)
    targets = np.concatenate([np.eye(3, dtype=np.int8)[rng.integers(3, size=N)], rng.integers(2, size=(N, 2))], axis=1)
    targets = targets.astype(np.int8)
    targets[rng.random(N) < 1 / 3, :3] = -1
    targets[rng.random(N) < 1 / 2, 3:] = -1
    scores = (0.5 * rng.random((N, 5)) + 0.4 * (targets > 0)).astype(np.float32)
    return targets, scores, decide_tasks(scores, TASKS, np.array([0.5, 0.5, 0.5, 0.6, 0.3]))


def test_decisions_are_each_tasks_own(decided):
    _, scores, predictions = decided
    assert (predictions[:, :3].sum(1) == 1).all()
    assert (predictions[:, :3].argmax(1) == scores[:, :3].argmax(1)).all()
    tags = scores[:, 3:] >= [0.6, 0.3]
    np.testing.assert_array_equal(predictions[tags.any(1), 3:], tags[tags.any(1)])
    assert (predictions[~tags.any(1), 3:].sum(1) == 1).all()
    assert decide_tasks(np.array([[0.4, 0.3, 0.2, 0.5, 0.4]]), TASKS).tolist() == [[True, False, False, True, False]]


def test_a_metric_counts_the_rows_that_have_the_label(decided):
    targets, _, predictions = decided
    named = bind_metrics(("mean", "color.accuracy", "color.macro_f1", "tags.micro_f1"), TASKS)
    found = {name: metric(*decided) for name, metric in named.items()}
    rows = targets[:, 0] >= 0
    truth, given = targets[rows, :3].argmax(1), predictions[rows, :3].argmax(1)
    assert found["color.accuracy"] == pytest.approx(accuracy_score(truth, given))
    assert found["color.macro_f1"] == pytest.approx(f1_score(truth, given, average="macro"))
    rows = targets[:, 3] >= 0
    assert found["tags.micro_f1"] == pytest.approx(f1_score(targets[rows, 3:], predictions[rows, 3:], average="micro"))
    assert found["mean"] == pytest.approx((found["color.accuracy"] + found["tags.micro_f1"]) / 2)
    by_class = per_task_class(*decided, TASKS)
    of_tags = per_class(*TAGS.own(*decided))
    assert all((by_class[name][3:] == values).all() for name, values in of_tags.items())
    assert by_class["support"].tolist() == (targets > 0).sum(0).tolist()


def test_intervals_are_those_of_the_resampled_rows(decided):
    metrics = bind_metrics(("mean", "tags.macro_f1"), TASKS)
    found = bootstrap_intervals(*decided, metrics, n_resamples=50, seed=3)
    rng = np.random.default_rng(3)
    figures = []
    for _ in range(50):
        rows = rng.integers(N, size=N)
        figures.append(metrics["tags.macro_f1"](*(x[rows] for x in decided)))
    assert found["tags.macro_f1"] == pytest.approx(tuple(np.quantile(figures, [0.025, 0.975])))


def test_a_task_that_no_row_has_is_left_out_of_the_mean(decided):
    targets, scores, predictions = (x.copy() for x in decided)
    targets[:, 3:] = -1
    metrics = bind_metrics(("mean", "color.accuracy", "tags.micro_f1"), TASKS)
    found = {name: metric(targets, scores, predictions) for name, metric in metrics.items()}
    assert np.isnan(found["tags.micro_f1"])
    assert found["mean"] == found["color.accuracy"]
    assert np.isnan(metrics["mean"](np.full_like(targets, -1), scores, predictions))
    few = targets[:30].copy()
    few[0, 3:] = 1  # most resamples lack the one row
    intervals = bootstrap_intervals(few, scores[:30], predictions[:30], metrics, n_resamples=20)
    assert not np.isnan(intervals["mean"]).any()


def test_names_of_metrics():
    assert bind_metrics(("accuracy",), (replace(COLOR, name=""),)) == {"accuracy": METRICS["accuracy"]}
    with pytest.raises(UnknownNameError, match=naming("f1 accuracy")):
        bind_metrics(["f1"])
    with pytest.raises(UnknownNameError, match=naming("color.accuracy")):
        METRICS["color.accuracy"]
    with pytest.raises(UnknownNameError, match=naming("colour color")):
        bind_metrics(("colour.accuracy",), TASKS)
    with pytest.raises(UnknownNameError, match="acuracy"):
        bind_metrics(("color.acuracy",), TASKS)
    assert headline(["mean", "color.accuracy", "color.macro_f1", "tags.micro_f1", "tags.macro_f1"]) == [
        "mean", "color.accuracy", "tags.micro_f1",
    ]  # fmt: skip
    assert headline(["accuracy", "macro_f1"]) == ["accuracy", "macro_f1"]
    assert (metric_title("color.recall_at_p90"), metric_title("mean")) == ("color R@P90", "mean")
