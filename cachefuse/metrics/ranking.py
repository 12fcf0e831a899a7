"""Ranking metrics: average precision, and recall at a precision."""

from collections.abc import Callable, Iterator, Sequence

import numpy as np

from cachefuse.metrics.base import Weighted, divide, metric

PRECISION = 0.9  # of recall_at_p90

KEPT = 1 << 26  # scores; of more, the sorted steps take too much memory to keep for the next resamples

Steps = Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]  # weights (N, R) -> hits and precision (S, R), see _steps
Figure = Callable[[np.ndarray, np.ndarray], np.ndarray]  # hits and precision (S, R), see _steps -> (R,)


@metric("macro-AP")
def macro_ap(targets: np.ndarray, scores: np.ndarray, predictions: np.ndarray) -> Weighted:
    """Return the mean average precision (mAP) of the classes with positives; NaN if no class has any."""
    return _mean_of_classes(average_precision, targets, scores)


@metric("micro-AP")
def micro_ap(targets: np.ndarray, scores: np.ndarray, predictions: np.ndarray) -> Weighted:
    """Return the average precision over all N * C scores; NaN without positives."""
    steps = _steps(targets, scores)
    return lambda weights: average_precision(*steps(weights))


@metric("R@P90")
def recall_at_p90(targets: np.ndarray, scores: np.ndarray, predictions: np.ndarray) -> Weighted:
    """Return the highest recall at a precision of at least 0.9, averaged over the classes with positives.

    It is 0 for a class that never reaches this precision; NaN if no class has positives.
    """
    return _mean_of_classes(recall_at_precision, targets, scores)


def average_precision(hits: np.ndarray, precision: np.ndarray) -> np.ndarray:
    """Return the sum of precision over the steps of recall, (R,)."""
    return divide((hits * precision).sum(axis=0), hits.sum(axis=0), np.nan)


def recall_at_precision(hits: np.ndarray, precision: np.ndarray) -> np.ndarray:
    """Return the highest recall at a precision of at least 0.9, (R,); 0 if that precision is never reached."""
    reached = np.where(precision >= PRECISION, hits.cumsum(axis=0), 0).max(axis=0, initial=0)
    return divide(reached, hits.sum(axis=0), np.nan)


def class_figures(figures: Sequence[Figure], targets: np.ndarray, scores: np.ndarray) -> Weighted:
    """Return a function from weights (N, R) to K figures of each class, (C, K, R); NaN without positives."""

    def classes() -> Iterator[Steps]:
        return (_steps(targets[:, c : c + 1], scores[:, c : c + 1]) for c in range(targets.shape[1]))

    kept = list(classes()) if targets.size <= KEPT else None

    def of_classes(weights: np.ndarray) -> np.ndarray:
        at = (steps(weights) for steps in kept or classes())
        return np.stack([[figure(hits, precision) for figure in figures] for hits, precision in at])

    return of_classes


def _mean_of_classes(figure: Figure, targets: np.ndarray, scores: np.ndarray) -> Weighted:
    of_classes = class_figures([figure], targets, scores)

    def mean(weights: np.ndarray) -> np.ndarray:
        values = of_classes(weights)[:, 0]  # (C, R)
        return divide(np.nansum(values, axis=0), np.isfinite(values).sum(axis=0), np.nan)

    return mean


def _steps(targets: np.ndarray, scores: np.ndarray) -> Steps:
    """Take the S distinct scores of the positives among all N * C as thresholds: only there does recall grow.

    Return a function from weights (N, R) to the positives that each threshold adds, from the highest down, and the
    precision at it, (S, R). Equal scores share one threshold.
    """
    from scipy.sparse import csr_array

    thresholds = np.unique(scores[targets])
    step = len(thresholds) - np.searchsorted(thresholds, scores, side="right")  # (N, C): the first a score reaches

    def added(pairs: np.ndarray) -> csr_array:
        """Return how many of the ``pairs`` (N, C) each threshold adds in each row, (S, N)."""
        rows = np.repeat(np.arange(len(pairs), dtype=np.int32), pairs.sum(axis=1))
        return csr_array((np.ones(len(rows)), (step[pairs], rows)), shape=(len(thresholds), len(pairs)))

    positives, predicted = added(targets), added(step < len(thresholds))

    def at(weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        hits = positives @ weights
        return hits, divide(hits.cumsum(axis=0), (predicted @ weights).cumsum(axis=0), 0)

    return at
