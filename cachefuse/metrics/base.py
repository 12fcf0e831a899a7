"""The definition of a metric: one function for weighted rows. The plain value has weights of 1."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from cachefuse.errors import DataError

AT_ONCE = 1 << 24  # numbers in the temporary arrays of a metric
# The least target of a right label, for metrics that know only right and wrong. An answer to a question may be partly
# right: one that three of ten people gave is right, with a target of 0.9; of two people it has 0.6.
RIGHT = 0.7
Weighted = Callable[[np.ndarray], np.ndarray]  # weights (N, R), how often each row counts -> R figures, (R,)
Definition = Callable[[np.ndarray, np.ndarray, np.ndarray], Weighted]


@dataclass(frozen=True)
class Metric:
    """``metric(targets, scores, predictions) -> float``, all (N, C); NaN without rows.

    ``weighted`` takes the same and returns a function from weights (N, R) to R figures. The weights say how often each
    row counts in each of R resamples. Both raise DataError if the shapes differ, a target is outside [0, 1], or a score
    is NaN.

    The ``definition`` gets targets and predictions as bool, and at least one row. A ``graded`` metric gets the targets
    in [0, 1]; for others only right labels count (``RIGHT``). ``title`` is its name in tables.
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
    """Turn a function into a ``Metric`` (decorator)."""
    return lambda definition: Metric(definition, title, graded, lower_is_better)


def probe_metric(metric: Metric) -> None:
    """Measure three rows, to see errors of a metric before a training rather than at its end."""
    targets = np.eye(3)
    metric(targets, targets, targets.astype(bool))


def checked(targets: np.ndarray, scores: np.ndarray, predictions: np.ndarray) -> tuple[np.ndarray, ...]:
    """Return a mask of the right targets, the scores, and the predictions as bool.

    Raises DataError for shapes or values that metrics do not take.
    """
    if targets.ndim != 2 or not targets.shape == scores.shape == predictions.shape:
        got = ", ".join(str(x.shape) for x in (targets, scores, predictions))
        raise DataError(f"targets, scores and predictions must have one shape, (N, C). Got {got} instead.")
    if not (targets.min(initial=0) >= 0 and targets.max(initial=1) <= 1):  # both are false for NaN
        raise DataError(f"targets must be from 0 to 1. Got {targets[~((targets >= 0) & (targets <= 1))][0]} instead.")
    if np.isnan(scores.min(initial=0)):
        raise DataError("scores must be numbers. Got NaN instead.")
    return targets >= RIGHT, scores, predictions.astype(bool, copy=False)


def by_rows(function: Callable[..., np.ndarray], *arrays: np.ndarray) -> np.ndarray:
    """Apply a function to rows (n, C) of arrays in chunks that need little memory, and return all results, (N, ...)."""
    n, classes = arrays[0].shape
    size = max(1, AT_ONCE // max(1, classes))
    return np.concatenate([function(*(x[i : i + size] for x in arrays)) for i in range(0, n, size)])


def divide(a: np.ndarray, b: np.ndarray, otherwise: float) -> np.ndarray:
    """Return a / b, or ``otherwise`` where b is 0."""
    ratio: np.ndarray = np.divide(a, b, out=np.full(a.shape, otherwise, np.float64), where=b != 0)
    return ratio


def mean(values: ArrayLike) -> Weighted:
    """Return the weighted mean of values (N,), one per row."""
    numbers = np.asarray(values, np.float64)
    return lambda weights: numbers @ weights / weights.sum(axis=0)
