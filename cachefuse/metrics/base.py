"""What a metric is: it is defined once, for rows that count several times; its plain value is that of weights 1."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from cachefuse.errors import DataError

Weighted = Callable[[np.ndarray], np.ndarray]  # weights (N, R), how often each row counts -> R figures, (R,)


@dataclass(frozen=True)
class Metric:
    """``metric(targets, scores, predictions) -> float``, all (N, C); NaN without rows.

    ``weighted`` takes the same and returns a function from weights (N, R), how often each row counts in each of R
    resamples, to R figures: those of the rows so repeated. Both raise DataError if the shapes differ, targets are not
    0 or 1, or a score is NaN.
    """

    definition: Callable[[np.ndarray, np.ndarray, np.ndarray], Weighted]

    def __call__(self, targets: np.ndarray, scores: np.ndarray, predictions: np.ndarray) -> float:
        weighted = self.weighted(targets, scores, predictions)
        return float(weighted(np.ones((len(targets), 1)))[0])

    def weighted(self, targets: np.ndarray, scores: np.ndarray, predictions: np.ndarray) -> Weighted:
        targets, scores, predictions = checked(targets, scores, predictions)
        if not len(targets):
            return lambda weights: np.full(weights.shape[1], np.nan)
        return self.definition(targets, scores, predictions)


def checked(targets: np.ndarray, scores: np.ndarray, predictions: np.ndarray) -> tuple[np.ndarray, ...]:
    """Return targets and predictions as bool, and the scores. Raises DataError if they are not what metrics take."""
    if targets.ndim != 2 or not targets.shape == scores.shape == predictions.shape:
        got = ", ".join(str(x.shape) for x in (targets, scores, predictions))
        raise DataError(f"targets, scores and predictions must have one shape, (N, C). Got {got} instead.")
    wrong = targets[(targets != 0) & (targets != 1)]
    if len(wrong):
        raise DataError(f"targets must be 0 or 1. Got {wrong[0]} instead.")
    if np.isnan(scores).any():
        raise DataError("scores must be numbers. Got NaN instead.")
    return targets.astype(bool), scores, predictions.astype(bool)


def divide(a: np.ndarray, b: np.ndarray, otherwise: float) -> np.ndarray:
    """Return a / b, and ``otherwise`` where b is 0."""
    return np.divide(a, b, out=np.full(a.shape, otherwise, np.float64), where=b != 0)


def mean(values: ArrayLike) -> Weighted:
    """Return the mean of one value a row, (N,)."""
    numbers = np.asarray(values, np.float64)
    return lambda weights: numbers @ weights / weights.sum(axis=0)
