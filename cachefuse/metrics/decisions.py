"""From scores to predictions, and the metrics of predictions: accuracy and F1."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np

from cachefuse.errors import ConfigError
from cachefuse.metrics import TOP
from cachefuse.metrics.base import Weighted, by_rows, divide, mean, metric

ONE_LABEL = ("multiclass", "vqa")  # tasks in which a row gets one label, the one with the highest score


def decide(scores: np.ndarray, task: str, threshold: float | np.ndarray = 0.5, min_labels: int = 0) -> np.ndarray:
    """Turn scores (N, C) into predictions (N, C) bool.

    Multi-class, and answers to questions: the class with the highest score. Multi-label: the classes whose score
    reaches ``threshold``, a number or (C,); a row with fewer than ``min_labels`` also gets its next highest scores.
    Ties go to the first class. Raises ConfigError for other tasks.
    """
    if task in ONE_LABEL:
        highest: np.ndarray = scores.argmax(axis=1)[:, None] == np.arange(scores.shape[1])
        return highest
    if task != "multilabel":
        tasks = ", ".join((*ONE_LABEL, "multilabel"))
        raise ConfigError(f"task must be one of {tasks} to decide on labels. Got {task!r} instead.")
    chosen = scores >= threshold
    best_first = np.lexsort((-scores, ~chosen))  # along classes: chosen ones first, then by score
    np.put_along_axis(chosen, best_first[:, :min_labels], True, axis=1)
    return chosen


@metric("accuracy")
def accuracy(targets: np.ndarray, scores: np.ndarray, predictions: np.ndarray) -> Weighted:
    """Return the share of samples with every class right (for multi-label: exact match, or subset accuracy)."""
    return mean(by_rows(lambda right, chosen: (right == chosen).all(axis=1), targets, predictions))


exact_match = replace(accuracy, title="exact match")  # its name in multi-label tasks


@metric("VQA accuracy", graded=True)
def vqa_accuracy(targets: np.ndarray, scores: np.ndarray, predictions: np.ndarray) -> Weighted:
    """Return the mean accuracy of the chosen classes, from the accuracies in targets (N, C).

    They are those of the VQA evaluation: min(0.3 n, 1) for an answer that n of ten people gave. Of several answers to
    one question, the best one counts.
    """
    return mean(answer_accuracy(targets, predictions))


def answer_accuracy(targets: np.ndarray, predictions: np.ndarray) -> np.ndarray:
    """Return the accuracy of each row's chosen class, (N,), from accuracies and predictions (N, C)."""
    return by_rows(lambda right, chosen: np.where(chosen, right, 0).max(axis=1), targets, predictions)


@metric("top-5 accuracy")
def top5_accuracy(targets: np.ndarray, scores: np.ndarray, predictions: np.ndarray) -> Weighted:
    """Return the share of samples with a label among the five highest scores.

    Of equal scores the last counts as highest, as in scikit-learn.
    """

    def has_label(targets: np.ndarray, scores: np.ndarray) -> np.ndarray:
        top = scores.argsort(axis=1, kind="stable")[:, -TOP:]
        return np.asarray(np.take_along_axis(targets, top, axis=1).any(axis=1))

    return mean(by_rows(has_label, targets, scores))


@metric("micro-F1")
def micro_f1(targets: np.ndarray, scores: np.ndarray, predictions: np.ndarray) -> Weighted:
    """Return the F1 over all N * C decisions."""
    counts = class_counts(targets, predictions)
    return lambda weights: _f1(*(x.sum(axis=0) for x in counts(weights)))


@metric("macro-F1")
def macro_f1(targets: np.ndarray, scores: np.ndarray, predictions: np.ndarray) -> Weighted:
    """Return the mean F1 of the classes."""
    counts = class_counts(targets, predictions)
    return lambda weights: _f1(*counts(weights)).mean(axis=0)


@metric("weighted-F1")
def weighted_f1(targets: np.ndarray, scores: np.ndarray, predictions: np.ndarray) -> Weighted:
    """Return the mean F1 of the classes, weighted by their positives."""
    counts = class_counts(targets, predictions)

    def figures(weights: np.ndarray) -> np.ndarray:
        hits, predicted, positives = counts(weights)
        return divide((_f1(hits, predicted, positives) * positives).sum(axis=0), positives.sum(axis=0), 0)

    return figures


@metric("samples-F1")
def samples_f1(targets: np.ndarray, scores: np.ndarray, predictions: np.ndarray) -> Weighted:
    """Return the mean F1 of the samples. A sample without labels and predictions counts as 0."""

    def figures(targets: np.ndarray, predictions: np.ndarray) -> np.ndarray:
        return _f1(*(x.sum(axis=1) for x in (targets & predictions, predictions, targets)))

    return mean(by_rows(figures, targets, predictions))


def class_counts(targets: np.ndarray, predictions: np.ndarray) -> Callable[[np.ndarray], list[np.ndarray]]:
    """Return a function from weights (N, R) to true positives, predicted and actual positives, (C, R) each."""
    from scipy.sparse import csr_array

    counted = [csr_array(x.T, dtype=np.float64) for x in (targets & predictions, predictions, targets)]
    return lambda weights: [x @ weights for x in counted]


def _f1(hits: np.ndarray, predicted: np.ndarray, positives: np.ndarray) -> np.ndarray:
    return divide(2 * hits, predicted + positives, 0)
