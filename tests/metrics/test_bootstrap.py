import math
import tracemalloc

import numpy as np
import pytest
from sklearn import metrics as sk

from cachefuse.errors import ConfigError, DataError
from cachefuse.metrics import METRICS, evaluation_metrics
from cachefuse.metrics.bootstrap import bootstrap_intervals
from cachefuse.metrics.decisions import decide
from cachefuse.metrics.tasks import bind_metrics
from fixtures.messages import naming

TASKS = ("multilabel", "multiclass")


def made(samples=40, classes=7, task="multilabel", seed=0, decimals=1):
    """Rounded scores, so that many are equal, and one class that never occurs."""
    rng = np.random.default_rng(seed)
    scores = np.round(rng.random((samples, classes)), decimals)
    noisy = scores + 0.3 * rng.standard_normal(scores.shape)
    noisy[:, 2] = -9
    if task == "multiclass":
        return noisy.argmax(1)[:, None] == np.arange(classes), scores, decide(scores, task)
    return noisy > 0.8, scores, scores >= 0.7


def intervals_of(targets, scores, predictions, names, *args, **options):
    return bootstrap_intervals(targets, scores, predictions, bind_metrics(names), *args, **options)


@pytest.mark.parametrize("name", METRICS)
@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("seed", range(5))
def test_weights_are_repeated_rows(name, task, seed):
    rng = np.random.default_rng(seed)
    data = made(int(rng.integers(2, 30)), task=task, seed=seed)
    weights = rng.integers(4, size=(len(data[0]), 6))
    weights[0] = np.maximum(weights[0], 1)
    weights[:, 0], weights[:, 1] = 1, np.eye(len(weights))[0]  # as they are; the first row alone
    figures = METRICS[name].weighted(*data)(weights.astype(float))
    assert figures.shape == (6,)
    assert figures[0] == pytest.approx(METRICS[name](*data), nan_ok=True)
    for figure, times in zip(figures, weights.T, strict=True):
        repeated = METRICS[name](*(np.repeat(x, times, axis=0) for x in data))
        assert figure == pytest.approx(repeated, abs=1e-12, nan_ok=True)


@pytest.mark.parametrize("name", METRICS)
@pytest.mark.parametrize("task", TASKS)
def test_a_few_rows_or_classes_at_a_time_give_the_same(name, task, monkeypatch):
    data = made(task=task)
    weights = np.random.default_rng(0).integers(1, 4, size=(40, 6)).astype(float)
    expected = METRICS[name].weighted(*data)(weights)
    monkeypatch.setattr("cachefuse.metrics.base.AT_ONCE", 24)  # three rows
    monkeypatch.setattr("cachefuse.metrics.ranking.KEPT", 0)
    figures = METRICS[name].weighted(*data)
    for _ in range(2):
        np.testing.assert_array_equal(figures(weights), expected)


@pytest.mark.parametrize("seed", range(5))
def test_weights_are_those_of_scikit_learn(seed):
    targets, scores, predictions = data = made(30, task="multiclass", seed=seed)
    weights = np.random.default_rng(seed).integers(4, size=30).astype(float)
    truth = targets.argmax(axis=1)
    labels = np.arange(targets.shape[1])
    occur = np.flatnonzero(weights @ targets)
    expected = {
        "accuracy": sk.accuracy_score(targets, predictions, sample_weight=weights),
        "macro_ap": np.mean(
            [sk.average_precision_score(targets[:, c], scores[:, c], sample_weight=weights) for c in occur]
        ),
        "micro_ap": sk.average_precision_score(targets, scores, average="micro", sample_weight=weights),
        "top5_accuracy": sk.top_k_accuracy_score(truth, scores, k=5, labels=labels, sample_weight=weights),
    }
    for average in ("micro", "macro", "samples", "weighted"):
        expected[f"{average}_f1"] = sk.f1_score(
            targets, predictions, average=average, sample_weight=weights, zero_division=0
        )
    for name, value in expected.items():
        assert METRICS[name].weighted(*data)(weights[:, None])[0] == pytest.approx(value), name


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("level", [0.5, 0.95])
@pytest.mark.one_in(2)
def test_against_metrics_of_rows_drawn_again(task, level):
    data = made(25, task=task)
    intervals = intervals_of(*data, METRICS, n_resamples=70, seed=3, level=level)
    assert list(intervals) == list(METRICS)
    for name, metric in METRICS.items():
        rng = np.random.default_rng(3)
        draws = [rng.integers(25, size=25) for _ in range(70)]
        values = [metric(*(x[rows] for x in data)) for rows in draws]
        ends = np.quantile(values, [0.5 - level / 2, 0.5 + level / 2])
        figure = metric(*data)
        assert intervals[name] == pytest.approx((np.fmin(ends[0], figure), np.fmax(ends[1], figure))), name
        assert [type(end) for end in intervals[name]] == [float, float]


@pytest.mark.parametrize("chunk", [1, 90, 1000])
def test_chunks_make_no_difference(monkeypatch, chunk):
    data = made()
    names = evaluation_metrics("multilabel", 7)
    expected = intervals_of(*data, names, n_resamples=65)
    monkeypatch.setattr("cachefuse.metrics.bootstrap.CHUNK", chunk)
    for name, interval in intervals_of(*data, names, n_resamples=65).items():
        assert interval == pytest.approx(expected[name], rel=1e-12)


def test_a_seed_gives_the_same_intervals_whatever_else_is_asked_for():
    data = made()
    both = intervals_of(*data, ["macro_f1", "micro_ap"], n_resamples=50, seed=1)
    assert both["micro_ap"] == intervals_of(*data, ["micro_ap"], n_resamples=50, seed=1)["micro_ap"]
    assert both["micro_ap"] != intervals_of(*data, ["micro_ap"], n_resamples=50, seed=2)["micro_ap"]


def test_the_interval_of_a_share_is_that_of_the_normal_approximation():
    right = np.arange(1000) % 10 < 7  # an accuracy of 0.7
    targets = np.stack([right, ~right], axis=1)
    scores = np.tile([0.9, 0.1], (1000, 1))
    for level, z in ((0.95, 1.960), (0.68, 0.994)):
        low, high = intervals_of(targets, scores, scores > 0.5, ["accuracy"], 4000, level=level)["accuracy"]
        half = z * math.sqrt(0.7 * 0.3 / 1000)
        assert (low, high) == pytest.approx((0.7 - half, 0.7 + half), abs=0.003)


@pytest.mark.parametrize("samples", [0, 1])
def test_too_few_rows(samples):
    data = (x[:samples] for x in made())
    intervals = intervals_of(*data, METRICS, n_resamples=5)
    assert list(intervals) == list(METRICS)
    assert np.isnan(list(intervals.values())).all()


def test_undefined_metrics():
    _, scores, predictions = made()
    targets = np.zeros(scores.shape, bool)
    intervals = intervals_of(targets, scores, predictions, ["macro_ap", "recall_at_p90", "macro_f1"], 20)
    assert np.isnan([intervals["macro_ap"], intervals["recall_at_p90"]]).all()
    assert intervals["macro_f1"] == (0, 0)


def test_resamples_in_which_a_metric_is_undefined_are_left_out():
    targets = np.arange(10)[:, None] == 3  # about a third of the resamples have no positive
    scores = np.linspace(0, 1, 10)[:, None]
    low, high = intervals_of(targets, scores, scores > 0.5, ["macro_ap"], 200)["macro_ap"]
    assert 0 < low < METRICS["macro_ap"](targets, scores, scores > 0.5) < high < 1


def test_progress():
    heard = []
    intervals_of(*made(), ["accuracy", "micro_f1"], n_resamples=100, on_progress=lambda *step: heard.append(step))
    assert heard == [(64, 200), (100, 200), (164, 200), (200, 200)]


def test_memory_does_not_grow_with_the_resamples():
    data = made(4000, 30, decimals=6)

    def peak(n_resamples):
        tracemalloc.start()
        intervals_of(*data, ["macro_f1", "micro_ap", "calibration_error"], n_resamples)
        size = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return size

    assert peak(64 * 5) < 1.1 * peak(64)


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"n_resamples": 0}, ConfigError, "n_resamples 1 0"),
        ({"level": 0}, ConfigError, "level 0 1"),
        ({"level": 1.0}, ConfigError, "level 0 1 1.0"),
        ({"level": 95}, ConfigError, "level 0 1 95"),
        ({"level": math.nan}, ConfigError, "level 0 1 nan"),
        ({"scores": np.full((40, 7), np.nan)}, DataError, "scores"),
    ],
)
def test_each_problem_is_named(options, kind, message):
    targets, scores, predictions = made()
    settings = {"targets": targets, "scores": scores, "predictions": predictions, "names": ["macro_f1"], **options}
    with pytest.raises(kind, match=naming(message)):
        intervals_of(**settings)
