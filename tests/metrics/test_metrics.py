import math
from itertools import pairwise

import numpy as np
import pytest
from sklearn import metrics as sk

from cachefuse.errors import ConfigError, DataError
from cachefuse.metrics import METRICS, evaluation_metrics, lower_is_better, main_metric
from cachefuse.metrics.calibration import class_calibration_error, reliability
from cachefuse.metrics.decisions import decide
from cachefuse.metrics.per_class import per_class
from fixtures.messages import naming

AVERAGES = ("micro", "macro", "samples", "weighted")
TASKS = ("multilabel", "multiclass")


def some(samples=200, classes=6, task="multilabel"):
    rng = np.random.default_rng(0)
    scores = rng.random((samples, classes))
    noisy = scores + 0.5 * rng.standard_normal(scores.shape)
    if task == "multiclass":
        return noisy.argmax(1)[:, None] == np.arange(classes), scores, decide(scores, task)
    return (noisy > 0.7).astype(np.int8), scores, scores >= 0.6


def awkward(seed, task="multilabel"):
    """Few rows, equal scores, a class that does not occur, rows and classes for which nothing is predicted."""
    rng = np.random.default_rng(seed)
    samples, classes = int(rng.integers(2, 40)), int(rng.integers(7, 10))
    scores = np.round(rng.random((samples, classes), rng.choice([np.float32, np.float64])), rng.choice([1, 2]))
    noisy = scores + 0.3 * rng.standard_normal(scores.shape)
    noisy[:, rng.integers(classes)] = -9
    if task == "multiclass":
        return (noisy.argmax(1)[:, None] == np.arange(classes)).astype(np.uint8), scores, decide(scores, task)
    predictions = scores >= rng.uniform(0.4, 1.1)
    predictions[:, rng.integers(classes)] = False
    return (noisy > 0.7).astype(np.int8), scores, predictions


def best_recall(targets, scores):
    """The highest recall at a precision of 0.9 or more, in scikit-learn's curve."""
    precision, recall, _ = sk.precision_recall_curve(targets, scores)
    return recall[precision >= 0.9].max()


def guo(targets, scores):
    """Equation 3 of arXiv 1706.04599 as it stands, for scores and targets of any one shape."""
    edges = np.linspace(0, 1, 16)
    error = 0
    for low, high in pairwise(edges):
        inside = (scores > low) & (scores <= high) | ((low == 0) & (scores == 0))
        if inside.any():
            gap = abs(targets[inside].mean() - scores[inside].mean(dtype=np.float64))
            error += inside.sum() / scores.size * gap
    return error


@pytest.mark.parametrize("task", TASKS)
def test_against_scikit_learn(task):
    check_against_scikit_learn(task, *some(task=task))


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("seed", range(25))
@pytest.mark.filterwarnings("ignore:No positive class found in y_true")
@pytest.mark.one_in(2)
def test_against_scikit_learn_on_awkward_problems(task, seed):
    check_against_scikit_learn(task, *awkward(seed, task))


def check_against_scikit_learn(task, targets, scores, predictions):
    for average in AVERAGES:
        expected = sk.f1_score(targets, predictions, average=average, zero_division=0)
        assert METRICS[f"{average}_f1"](targets, scores, predictions) == pytest.approx(expected)
    occur = np.flatnonzero(targets.any(axis=0))
    if not len(occur):
        assert all(math.isnan(METRICS[name](targets, scores, predictions)) for name in ("macro_ap", "recall_at_p90"))
        return
    aps = [sk.average_precision_score(targets[:, c], scores[:, c]) for c in occur]
    assert METRICS["macro_ap"](targets, scores, predictions) == pytest.approx(np.mean(aps))
    expected = sk.average_precision_score(targets, scores, average="micro")
    assert METRICS["micro_ap"](targets, scores, predictions) == pytest.approx(expected)
    recalls = [best_recall(targets[:, c], scores[:, c]) for c in occur]
    assert METRICS["recall_at_p90"](targets, scores, predictions) == pytest.approx(np.mean(recalls), abs=1e-12)
    for name in ("accuracy", "exact_match"):
        expected = sk.accuracy_score(targets, predictions)
        assert METRICS[name](targets, scores, predictions) == pytest.approx(expected)
    if task == "multiclass":
        labels = np.arange(targets.shape[1])
        expected = sk.top_k_accuracy_score(targets.argmax(1), scores, k=5, labels=labels)
        assert METRICS["top5_accuracy"](targets, scores, predictions) == pytest.approx(expected)

    table = per_class(targets, scores, predictions)
    rates = sk.precision_recall_fscore_support(targets, predictions, zero_division=0)
    for name, expected in zip(("precision", "recall", "f1", "support"), rates, strict=True):
        np.testing.assert_allclose(table[name], expected)
    for name, expected in (("ap", aps), ("recall_at_p90", recalls)):
        np.testing.assert_allclose(table[name][occur], expected, atol=1e-12)
        assert np.isnan(np.delete(table[name], occur)).all()


def test_multiclass_as_scikit_learn_scores_labels():
    targets, scores, predictions = some(task="multiclass")
    truth, guess = targets.argmax(1), predictions.argmax(1)
    assert METRICS["accuracy"](targets, scores, predictions) == pytest.approx(sk.accuracy_score(truth, guess))
    for average in ("micro", "macro", "weighted"):
        expected = sk.f1_score(truth, guess, average=average)
        assert METRICS[f"{average}_f1"](targets, scores, predictions) == pytest.approx(expected)


def test_by_hand():
    targets = np.array([[1, 0, 0], [1, 1, 0], [0, 0, 0], [0, 1, 0]])
    predictions = np.array([[1, 0, 0], [1, 0, 1], [0, 0, 0], [1, 1, 0]], bool)
    scores = np.array([[0.9, 0.1, 0.2], [0.8, 0.4, 0.7], [0.1, 0.5, 0.0], [0.85, 0.6, 0.1]])
    value = {name: metric(targets, scores, predictions) for name, metric in METRICS.items()}
    # True positives 2, 1, 0; false positives 1, 0, 1; false negatives 0, 1, 0.
    assert value["micro_f1"] == pytest.approx(2 * 3 / (2 * 3 + 2 + 1))
    assert value["macro_f1"] == pytest.approx((4 / 5 + 2 / 3 + 0) / 3)
    assert value["weighted_f1"] == pytest.approx((2 * 4 / 5 + 2 * 2 / 3) / 4)
    assert value["samples_f1"] == pytest.approx((1 + 2 / 4 + 0 + 2 / 3) / 4)
    assert value["accuracy"] == 0.5
    assert value["exact_match"] == 0.5
    # Class 0: positives ranked 1st and 3rd; class 1: 1st and 3rd; class 2 has none and is left out.
    assert value["macro_ap"] == pytest.approx((1 + 2 / 3) / 2)
    assert value["recall_at_p90"] == 0.5
    assert value["top5_accuracy"] == 3 / 4  # one sample has no label

    table = per_class(targets, scores, predictions)
    np.testing.assert_allclose(table["precision"], [2 / 3, 1, 0])
    np.testing.assert_allclose(table["recall"], [1, 1 / 2, 0])
    np.testing.assert_allclose(table["f1"], [4 / 5, 2 / 3, 0])
    np.testing.assert_allclose(table["ap"], [(1 + 2 / 3) / 2, (1 + 2 / 3) / 2, np.nan])
    np.testing.assert_allclose(table["recall_at_p90"], [1 / 2, 1 / 2, np.nan])
    assert table["support"].tolist() == [2, 2, 0]


def test_recall_at_p90_reaches_the_precision_exactly():
    targets = np.array([[1]] * 9 + [[0]] + [[1]] * 3 + [[0]])
    scores = np.linspace(1, 0, 14)[:, None]
    metric = METRICS["recall_at_p90"]
    assert metric(targets, scores, scores > 0.5) == 1  # 12 of 13 at the last positive
    scores[9] = 2  # 9 of 10 at the 9th positive, below that before
    assert metric(targets[:10], scores[:10], scores[:10] > 0.5) == 1
    assert metric(targets[:9], -scores[:9], scores[:9] > 0.5) == 1
    targets[1] = 0
    assert metric(targets[:10], scores[:10], scores[:10] > 0.5) == 0


def test_equal_scores_stand_or_fall_together():
    targets = np.array([[1], [0], [1], [0]])
    for scores in (np.full((4, 1), 0.5), np.array([[0.0], [-0.0], [0.0], [-0.0]])):
        for order in ([0, 1, 2, 3], [1, 3, 0, 2], [0, 2, 1, 3]):
            assert METRICS["macro_ap"](targets[order], scores, scores > 1) == 0.5
            assert METRICS["recall_at_p90"](targets[order], scores, scores > 1) == 0


@pytest.mark.parametrize("classes", range(1, 6))
def test_top5_of_at_most_five_classes_is_1(classes):
    targets = np.eye(classes)
    assert METRICS["top5_accuracy"](targets, -targets, targets.astype(bool)) == 1


class TestCalibration:
    @pytest.mark.parametrize("seed", range(10))
    def test_against_the_equation(self, seed):
        targets, scores, predictions = awkward(seed, "multiclass")
        value = METRICS["calibration_error"](targets, scores, predictions)
        assert value == pytest.approx(guo(targets, scores), abs=1e-12)
        top, right = scores.max(axis=1), targets[np.arange(len(targets)), scores.argmax(axis=1)]
        value = METRICS["top_calibration_error"](targets, scores, predictions)
        assert value == pytest.approx(guo(right, top), abs=1e-12)

    def test_bins_end_with_their_upper_edge(self):
        edges = np.linspace(0, 1, 16)[:, None]
        targets = (np.arange(16) == 0)[:, None]
        # 0 and 1/15 share the first bin, each other edge has its own.
        gaps = [1 - 1 / 15, *(k / 15 for k in range(2, 16))]
        assert METRICS["calibration_error"](targets, edges, targets) == pytest.approx(sum(gaps) / 16)

    def test_by_hand(self):
        targets = np.array([[1, 0], [1, 0], [0, 1], [1, 0]])
        scores = np.array([[0.81, 0.19], [0.83, 0.17], [0.82, 0.18], [0.4, 0.6]])
        value = METRICS["top_calibration_error"](targets, scores, scores > 0.5)
        assert value == pytest.approx(3 / 4 * (0.82 - 2 / 3) + 1 / 4 * 0.6)

    def test_probabilities_that_are_true_have_none(self):
        rng = np.random.default_rng(0)
        scores = rng.random((20_000, 10))
        targets = rng.random(scores.shape) < scores
        assert METRICS["calibration_error"](targets, scores, targets) < 0.005
        assert METRICS["calibration_error"](targets, scores**3, targets) > 0.2

    def test_by_class_it_is_that_of_the_class_alone(self):
        targets, scores, predictions = awkward(0, "multiclass")
        columns = [slice(c, c + 1) for c in range(targets.shape[1])]
        alone = [METRICS["calibration_error"](targets[:, c], scores[:, c], predictions[:, c]) for c in columns]
        np.testing.assert_allclose(class_calibration_error(targets, scores), alone, atol=1e-12)

    def test_points_of_a_reliability_curve_by_hand(self):
        targets = np.array([[1, 0], [0, 0], [0, 1]])
        scores = np.array([[0.81, 0.19], [0.83, 0.17], [0.3, 0.7]])
        x, y, counts = reliability(targets, scores, "multilabel")
        np.testing.assert_allclose(x, [0.18, 0.3, 0.7, 0.82])
        np.testing.assert_allclose((y, counts), ([0, 0, 1, 0.5], [2, 1, 1, 2]))
        x, y, counts = reliability(targets, scores, "multiclass")  # the highest of each row
        np.testing.assert_allclose((x, y, counts), ([0.7, 0.82], [1, 0.5], [1, 2]))
        error = METRICS["top_calibration_error"](targets, scores, scores > 0.5)
        assert error == pytest.approx((np.abs(x - y) * counts).sum() / counts.sum())

    @pytest.mark.parametrize("name", ["calibration_error", "top_calibration_error"])
    @pytest.mark.parametrize("scores", [[[0.5, -1e-6]], [[1.5, 0.5]], [[np.inf, 0.5]]])
    def test_scores_that_are_no_probabilities(self, name, scores):
        if name == "top_calibration_error" and scores[0][0] == 0.5:
            scores = [[-0.5, -1.0]]
        with pytest.raises(DataError, match=naming("scores 0 1")):
            METRICS[name](np.array([[1, 0]]), np.array(scores), np.array([[True, False]]))


@pytest.mark.parametrize("name", METRICS)
def test_a_better_model_is_higher_or_lower(name):
    targets = np.eye(8)[np.random.default_rng(0).integers(8, size=200)]
    good, bad = 0.1 + 0.8 * targets, 0.9 - 0.8 * targets
    value, other = (METRICS[name](targets, scores, scores > 0.5) for scores in (good, bad))
    assert (value < other) if lower_is_better(name) else (value > other)


def test_a_metric_of_one_of_several_tasks_is_as_high_or_low():
    assert lower_is_better("color.calibration_error")
    assert not lower_is_better("color.accuracy")
    assert not lower_is_better("mean")


@pytest.mark.parametrize("task", TASKS)
def test_evaluation_metrics_have_values(task):
    names = evaluation_metrics(task, 7)
    assert len(set(names)) == len(names)
    assert not any(math.isnan(METRICS[name](*some(task=task))) for name in names)
    assert ("exact_match" in names) == (task == "multilabel")
    assert ("accuracy" in names) == (task == "multiclass")


def test_top5_is_shown_where_it_can_tell_something():
    assert "top5_accuracy" in evaluation_metrics("multiclass", 6)
    assert "top5_accuracy" not in evaluation_metrics("multiclass", 5)


def test_evaluation_metrics_of_another_task():
    with pytest.raises(ConfigError, match="retrieval"):
        evaluation_metrics("retrieval", 7)


@pytest.mark.parametrize("measure", [METRICS["macro_f1"], METRICS["macro_f1"].weighted, per_class])
class TestInputs:
    def test_shapes_differ(self, measure):
        targets, scores, predictions = some()
        with pytest.raises(DataError, match=naming("200 6 1")):
            measure(targets, scores, predictions[:1])
        with pytest.raises(DataError, match=naming("200")):
            measure(targets[:, 0], scores[:, 0], predictions[:, 0])

    @pytest.mark.parametrize("value", [-1, 2])
    def test_targets_that_are_neither_0_nor_1(self, measure, value):
        targets, scores, predictions = some()
        targets[3, 2] = value
        with pytest.raises(DataError, match=naming(f"targets 0 1 {value}")):
            measure(targets, scores, predictions)

    def test_scores_that_are_no_numbers(self, measure):
        targets, scores, predictions = some()
        scores[3, 2] = np.nan
        with pytest.raises(DataError, match=naming("scores NaN")):
            measure(targets, scores, predictions)


def test_no_positives():
    targets, scores = np.zeros((4, 3), np.int8), np.random.default_rng(0).random((4, 3))
    for predictions in (scores >= 0.5, np.zeros((4, 3), bool)):
        for average in AVERAGES:
            assert METRICS[f"{average}_f1"](targets, scores, predictions) == 0
        assert math.isnan(METRICS["macro_ap"](targets, scores, predictions))
        assert math.isnan(METRICS["micro_ap"](targets, scores, predictions))
        assert math.isnan(METRICS["recall_at_p90"](targets, scores, predictions))
    assert METRICS["accuracy"](targets, scores, np.zeros((4, 3), bool)) == 1


@pytest.mark.parametrize("classes", [1, 3])
def test_an_empty_split_has_no_score(classes):
    empty = np.zeros((0, classes))
    for metric in METRICS.values():
        assert math.isnan(metric(empty, empty, empty.astype(bool)))
    table = per_class(empty, empty, empty.astype(bool))
    assert table["support"].tolist() == [0] * classes
    for name in ("precision", "recall", "f1", "ap", "recall_at_p90"):
        assert np.isnan(table[name]).tolist() == [True] * classes


def test_one_class():
    targets = np.array([[1], [1], [0], [0], [0]])
    predictions = np.array([[1], [0], [1], [0], [0]], bool)
    scores = np.array([[0.9], [0.3], [0.7], [0.2], [0.1]])
    value = {name: metric(targets, scores, predictions) for name, metric in METRICS.items()}
    assert value == pytest.approx(
        {
            "accuracy": 3 / 5,
            "calibration_error": (0.1 + 0.7 + 0.7 + 0.2 + 0.1) / 5,  # a bin each
            "exact_match": 3 / 5,
            "macro_ap": (1 + 2 / 3) / 2,
            "macro_f1": 1 / 2,
            "micro_ap": (1 + 2 / 3) / 2,
            "micro_f1": 1 / 2,
            "recall_at_p90": 1 / 2,
            "samples_f1": 1 / 5,
            "top5_accuracy": 2 / 5,
            "top_calibration_error": (0.1 + 0.7 + 0.7 + 0.2 + 0.1) / 5,
            "vqa_accuracy": 1 / 5,
            "weighted_f1": 1 / 2,
        }
    )
    table = per_class(targets, scores, predictions)
    assert {name: column.tolist() for name, column in table.items() if name != "ap"} == {
        "precision": [0.5],
        "recall": [0.5],
        "f1": [0.5],
        "recall_at_p90": [0.5],
        "support": [2],
    }


def test_one_sample():
    one = np.array([[1, 0, 1]])
    for name in METRICS:
        expected = pytest.approx(2 / 3) if name == "macro_f1" else int(not lower_is_better(name))
        assert METRICS[name](one, one.astype(float), one.astype(bool)) == expected


def test_metrics_return_plain_floats():
    for metric in METRICS.values():
        assert type(metric(*some())) is float


class TestDecide:
    def test_multiclass_takes_the_first_best(self):
        scores = np.array([[0.1, 0.9, 0.0], [0.4, 0.2, 0.4], [-3, -1, -2]])
        assert decide(scores, "multiclass").tolist() == [[0, 1, 0], [1, 0, 0], [0, 1, 0]]

    def test_multilabel_reaches_the_threshold(self):
        scores = np.array([[0.5, 0.49, 0.9], [0.1, 0.2, 0.3]])
        assert decide(scores, "multilabel").tolist() == [[1, 0, 1], [0, 0, 0]]
        assert decide(scores, "multilabel", threshold=0.2).tolist() == [[1, 1, 1], [0, 1, 1]]
        per_class = np.array([0.6, 0.2, 0.9])
        assert decide(scores, "multilabel", threshold=per_class).tolist() == [[0, 1, 1], [0, 1, 0]]

    def test_min_labels_fill_up_from_the_top(self):
        scores = np.array([[0.6, 0.1, 0.7, 0.8], [0.1, 0.3, 0.2, 0.3], [0.9, 0.0, 0.0, 0.0]])
        assert decide(scores, "multilabel", min_labels=1).tolist() == [[1, 0, 1, 1], [0, 1, 0, 0], [1, 0, 0, 0]]
        assert decide(scores, "multilabel", min_labels=2).tolist() == [[1, 0, 1, 1], [0, 1, 0, 1], [1, 1, 0, 0]]
        assert decide(scores, "multilabel", min_labels=9).all()

    def test_min_labels_count_what_a_class_threshold_let_in(self):
        scores = np.array([[0.8, 0.3, 0.6]])
        threshold = np.array([0.9, 0.2, 0.9])
        assert decide(scores, "multilabel", threshold, min_labels=1).tolist() == [[0, 1, 0]]
        assert decide(scores, "multilabel", threshold, min_labels=2).tolist() == [[1, 1, 0]]

    @pytest.mark.parametrize("task", ["multiclass", "multilabel"])
    def test_shape_and_dtype(self, task):
        for samples in (0, 1, 5):
            predictions = decide(np.zeros((samples, 3), np.float16), task, min_labels=1)
            assert predictions.shape == (samples, 3)
            assert predictions.dtype == bool

    def test_leaves_the_scores_alone(self):
        scores = np.array([[0.2, 0.1]])
        decide(scores, "multilabel", min_labels=1)
        assert scores.tolist() == [[0.2, 0.1]]

    def test_unknown_task(self):
        with pytest.raises(ConfigError, match="retrieval"):
            decide(np.zeros((1, 2)), "retrieval")


def test_a_model_is_preferred_by_the_first_metric_that_is_higher_for_a_better_one():
    assert main_metric(("calibration_error", "macro_ap", "micro_f1")) == "macro_ap"
    assert main_metric(("calibration_error",)) == "accuracy"
