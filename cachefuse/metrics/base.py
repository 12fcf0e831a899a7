"""What a metric is: it is defined once, for rows that count several times; its plain value is that of weights 1."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from cachefuse.errors import DataError

AT_ONCE = 1 << 24  # numbers in the arrays that a metric makes of rows
RIGHT = 1  # the target of a label that is wholly right; one of questions may be so in part
Weighted = Callable[[np.ndarray], np.ndarray]  # weights (N, R), how often each row counts -> R figures, (R,)
Definition = Callable[[np.ndarray, np.ndarray, np.ndarray], Weighted]


@dataclass(frozen=True)
class Metric:
    """``metric(targets, scores, predictions) -> float``, all (N, C); NaN without rows.

    ``weighted`` takes the same and returns a function from weights (N, R), how often each row counts in each of R
    resamples, to R figures: those of the rows so repeated. Both raise DataError if the shapes differ, targets are not
    from 0 to 1, or a score is NaN.

    The ``definition`` gets targets and predictions as bool, and at least one row. Where a label may be right in part,
    only a ``graded`` metric sees how far; for the others it counts where it is wholly so. Tables call it ``title``.
    """

    definition: Definition
    title: str = ""
    graded: bool = False
    lower_is_better: bool = False

    def __call__(self, targets: np.ndarray, scores: np.ndarray, predictions: np.ndarray) -> float:
        weighted = self.weighted(targets, scores, predictions)
        return float(weighted(np.ones((len(targets), 1)))[0])

    def weighted(self, targets: np.ndarray, scores: np.ndarray, predictions: np.ndarray) -> Weighted:
        right, scores, predictions = checked(targets, scores, predictions)
        if not len(targets):
            return lambda weights: np.full(weights.shape[1], np.nan)
        return self.definition(targets if self.graded else right, scores, predictions)


def metric(title: str, *, graded: bool = False, lower_is_better: bool = False) -> Callable[[Definition], Metric]:
    """Make a function the definition of a metric: see ``Metric``."""
    return lambda definition: Metric(definition, title, graded, lower_is_better)


def checked(targets: np.ndarray, scores: np.ndarray, predictions: np.ndarray) -> tuple[np.ndarray, ...]:
    """Return as bool which targets are wholly right, the scores, and the predictions as bool.

    Raises DataError if they are not what metrics take.
    """
    if targets.ndim != 2 or not targets.shape == scores.shape == predictions.shape:
        got = ", ".join(str(x.shape) for x in (targets, scores, predictions))
        raise DataError(f"targets, scores and predictions must have one shape, (N, C). Got {got} instead.")
    if not (targets.min(initial=0) >= 0 and targets.max(initial=1) <= 1):  # neither holds of NaN
        raise DataError(f"targets must be from 0 to 1. Got {targets[~((targets >= 0) & (targets <= 1))][0]} instead.")
    if np.isnan(scores.min(initial=0)):
        raise DataError("scores must be numbers. Got NaN instead.")
    return targets >= RIGHT, scores, predictions.astype(bool, copy=False)


def by_rows(function: Callable[..., np.ndarray], *arrays: np.ndarray) -> np.ndarray:
    """Return what a function makes of rows (n, C) of arrays, (N, ...); of so many at a time that it takes little."""
    n, classes = arrays[0].shape
    size = max(1, AT_ONCE // max(1, classes))
    return np.concatenate([function(*(x[i : i + size] for x in arrays)) for i in range(0, n, size)])


def divide(a: np.ndarray, b: np.ndarray, otherwise: float) -> np.ndarray:
    """Return a / b, and ``otherwise`` where b is 0."""
    ratio: np.ndarray = np.divide(a, b, out=np.full(a.shape, otherwise, np.float64), where=b != 0)
    return ratio


def mean(values: ArrayLike) -> Weighted:
    """Return the mean of one value a row, (N,)."""
    numbers = np.asarray(values, np.float64)
    return lambda weights: numbers @ weights / weights.sum(axis=0)
