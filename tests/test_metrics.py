import math

import numpy as np
import pytest
from sklearn import metrics as sk

from cachefuse.errors import ConfigError
from cachefuse.metrics import METRICS, decide, per_class

AVERAGES = ("micro", "macro", "samples", "weighted")


def some(samples=200, classes=6, task="multilabel"):
    rng = np.random.default_rng(0)
    scores = rng.random((samples, classes))
    noisy = scores + 0.5 * rng.standard_normal(scores.shape)
    if task == "multiclass":
        return noisy.argmax(1)[:, None] == np.arange(classes), scores, decide(scores, task)
    return (noisy > 0.7).astype(np.int8), scores, scores >= 0.6


@pytest.mark.parametrize("task", ["multilabel", "multiclass"])
def test_against_scikit_learn(task):
    targets, scores, predictions = some(task=task)
    for average in AVERAGES:
        expected = sk.f1_score(targets, predictions, average=average, zero_division=0)
        assert METRICS[f"{average}_f1"](targets, scores, predictions) == pytest.approx(expected)
    for average in ("micro", "macro"):
        expected = sk.average_precision_score(targets, scores, average=average)
        assert METRICS[f"{average}_ap"](targets, scores, predictions) == pytest.approx(expected)
    assert METRICS["accuracy"](targets, scores, predictions) == pytest.approx(sk.accuracy_score(targets, predictions))


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
    # Class 0: positives ranked 1st and 3rd; class 1: 1st and 3rd; class 2 has none and is left out.
    assert value["macro_ap"] == pytest.approx((1 + 2 / 3) / 2)

    table = per_class(targets, scores, predictions)
    np.testing.assert_allclose(table["precision"], [2 / 3, 1, 0])
    np.testing.assert_allclose(table["recall"], [1, 1 / 2, 0])
    np.testing.assert_allclose(table["f1"], [4 / 5, 2 / 3, 0])
    np.testing.assert_allclose(table["ap"], [(1 + 2 / 3) / 2, (1 + 2 / 3) / 2, np.nan])
    assert table["support"].tolist() == [2, 2, 0]


def test_no_positives():
    targets, scores = np.zeros((4, 3), np.int8), np.random.default_rng(0).random((4, 3))
    for predictions in (scores >= 0.5, np.zeros((4, 3), bool)):
        for average in AVERAGES:
            assert METRICS[f"{average}_f1"](targets, scores, predictions) == 0
        assert math.isnan(METRICS["macro_ap"](targets, scores, predictions))
        assert math.isnan(METRICS["micro_ap"](targets, scores, predictions))
    assert METRICS["accuracy"](targets, scores, np.zeros((4, 3), bool)) == 1


@pytest.mark.parametrize("classes", [1, 3])
def test_an_empty_split_has_no_score(classes):
    empty = np.zeros((0, classes))
    for metric in METRICS.values():
        assert math.isnan(metric(empty, empty, empty.astype(bool)))
    table = per_class(empty, empty, empty.astype(bool))
    assert table["support"].tolist() == [0] * classes
    for name in ("precision", "recall", "f1", "ap"):
        assert np.isnan(table[name]).tolist() == [True] * classes


def test_one_class():
    targets = np.array([[1], [1], [0], [0], [0]])
    predictions = np.array([[1], [0], [1], [0], [0]], bool)
    scores = np.array([[0.9], [0.3], [0.7], [0.2], [0.1]])
    value = {name: metric(targets, scores, predictions) for name, metric in METRICS.items()}
    assert value == pytest.approx(
        {
            "accuracy": 3 / 5,
            "macro_ap": (1 + 2 / 3) / 2,
            "macro_f1": 1 / 2,
            "micro_ap": (1 + 2 / 3) / 2,
            "micro_f1": 1 / 2,
            "samples_f1": 1 / 5,
            "weighted_f1": 1 / 2,
        }
    )
    table = per_class(targets, scores, predictions)
    assert {name: column.tolist() for name, column in table.items() if name != "ap"} == {
        "precision": [0.5],
        "recall": [0.5],
        "f1": [0.5],
        "support": [2],
    }


def test_one_sample():
    one = np.array([[1, 0, 1]])
    for name in METRICS:
        expected = pytest.approx(2 / 3) if name == "macro_f1" else 1
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
        with pytest.raises(ConfigError, match=r"'multiclass' or 'multilabel' to decide on labels\. Got 'retrieval'"):
            decide(np.zeros((1, 2)), "retrieval")
