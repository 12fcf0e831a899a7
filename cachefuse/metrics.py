"""Classification metrics: ``metric(targets, scores, predictions) -> float``; and the step from scores to predictions.

Targets (N, C) are 0 or 1 (one-hot for multi-class), scores (N, C) are higher for likelier labels, predictions (N, C)
are bool. All C classes count, whether or not they occur. What is not defined for want of positives counts as 0, an
average over nothing is NaN. Importing this module imports no scikit-learn.
"""

from collections.abc import Callable

import numpy as np

from cachefuse.errors import ConfigError


def micro_f1(targets: np.ndarray, scores: np.ndarray, predictions: np.ndarray) -> float:
    """Return the F1 over all N * C decisions together."""
    return _f1(targets, predictions, "micro")


def macro_f1(targets: np.ndarray, scores: np.ndarray, predictions: np.ndarray) -> float:
    """Return the mean F1 of the classes."""
    return _f1(targets, predictions, "macro")


def samples_f1(targets: np.ndarray, scores: np.ndarray, predictions: np.ndarray) -> float:
    """Return the mean F1 of the samples; a sample with no labels and none predicted counts as 0."""
    return _f1(targets, predictions, "samples")


def weighted_f1(targets: np.ndarray, scores: np.ndarray, predictions: np.ndarray) -> float:
    """Return the mean F1 of the classes, weighted by their positives."""
    return _f1(targets, predictions, "weighted")


def macro_ap(targets: np.ndarray, scores: np.ndarray, predictions: np.ndarray) -> float:
    """Return the mean average precision (mAP) of the classes with at least one positive; NaN if there are none."""
    aps = [_ap(targets[:, c], scores[:, c]) for c in np.flatnonzero(targets.any(axis=0))]
    return float(np.mean(aps)) if aps else float("nan")


def micro_ap(targets: np.ndarray, scores: np.ndarray, predictions: np.ndarray) -> float:
    """Return the average precision over all N * C scores together; NaN if there are no positives."""
    return _ap(targets.ravel(), scores.ravel())


def accuracy(targets: np.ndarray, scores: np.ndarray, predictions: np.ndarray) -> float:
    """Return the share of samples with every class right (for multi-label: the subset accuracy)."""
    from sklearn.metrics import accuracy_score

    return float(accuracy_score(targets, predictions)) if len(targets) else float("nan")


METRICS: dict[str, Callable[[np.ndarray, np.ndarray, np.ndarray], float]] = {
    "accuracy": accuracy,
    "macro_ap": macro_ap,
    "macro_f1": macro_f1,
    "micro_ap": micro_ap,
    "micro_f1": micro_f1,
    "samples_f1": samples_f1,
    "weighted_f1": weighted_f1,
}


def per_class(targets: np.ndarray, scores: np.ndarray, predictions: np.ndarray) -> dict[str, np.ndarray]:
    """Return each class's precision, recall, f1, ap and support (its number of positives), all (C,).

    The average precision is NaN for a class without positives; all but the support are NaN without samples.
    """
    from sklearn.metrics import precision_recall_fscore_support

    classes = targets.shape[1]
    precision = recall = f1 = np.full(classes, np.nan)
    if len(targets):
        rates = precision_recall_fscore_support(*_multilabel(targets, predictions), average=None, zero_division=0)
        precision, recall, f1 = (rate[:classes] for rate in rates[:3])
    return {
        "precision": precision,
        "recall": recall,
        "f1": f1,
        "ap": np.array([_ap(targets[:, c], scores[:, c]) for c in range(classes)]),
        "support": targets.sum(axis=0, dtype=np.int64),
    }


def decide(scores: np.ndarray, task: str, threshold: float | np.ndarray = 0.5, min_labels: int = 0) -> np.ndarray:
    """Turn scores (N, C) into predictions (N, C) bool.

    Multi-class: the class with the highest score. Multi-label: the classes whose score reaches ``threshold``, one for
    all or (C,); a row left with fewer than ``min_labels`` takes its next highest scores as well. Ties go to the class
    that comes first. Raises ConfigError for another task.
    """
    if task == "multiclass":
        return scores.argmax(axis=1)[:, None] == np.arange(scores.shape[1])
    if task != "multilabel":
        raise ConfigError(f"task must be 'multiclass' or 'multilabel' to decide on labels. Got {task!r} instead.")
    chosen = scores >= threshold
    best_first = np.lexsort((-scores, ~chosen))  # along the classes: the chosen, then the others, each by score
    np.put_along_axis(chosen, best_first[:, :min_labels], True, axis=1)
    return chosen


def _f1(targets: np.ndarray, predictions: np.ndarray, average: str) -> float:
    from sklearn.metrics import f1_score

    if not len(targets):
        return float("nan")
    return float(f1_score(*_multilabel(targets, predictions), average=average, zero_division=0))


def _ap(targets: np.ndarray, scores: np.ndarray) -> float:
    from sklearn.metrics import average_precision_score

    return float(average_precision_score(targets, scores)) if targets.any() else float("nan")


def _multilabel(*labels: np.ndarray) -> tuple[np.ndarray, ...]:
    # scikit-learn takes a single column for a binary problem, whose negatives are a class too. The same column twice
    # is multi-label, with the same precision, recall and F1 under every average.
    return tuple(np.repeat(x, 2, axis=1) if x.shape[1] == 1 else x for x in labels)
