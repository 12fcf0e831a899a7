"""Paired comparison: two or more models measured on the same rows, so that rows hard for all of them cancel out.

A small difference that is not significant does not show that models are equal: with few rows nothing is significant.
``not_worse`` tests the claim itself, non-inferiority by a margin (Walker and Nowacki, "Understanding equivalence and
noninferiority testing", 2011).
"""

from dataclasses import dataclass

import numpy as np

from cachefuse.metrics.base import Metric
from cachefuse.metrics.bootstrap import interval
from cachefuse.metrics.decisions import accuracy
from cachefuse.metrics.tasks import BoundMetric, OfTask

LEVEL = 0.95  # of intervals
ALPHA = 1 - LEVEL  # of two-sided tests; one-sided tests have half of it, so that they agree with the intervals
TIE = 1e-12  # closer values differ only by rounding
BOOTSTRAP, MCNEMAR = "paired bootstrap", "exact McNemar"  # the tests behind a p


@dataclass(frozen=True)
class Difference:
    """A difference of two figures, its interval (low, high), and the two-sided p of no difference by ``test``."""

    value: float
    low: float
    high: float
    p: float
    test: str = BOOTSTRAP


def difference(value: float, resampled: np.ndarray, level: float = LEVEL) -> Difference:
    """Return a difference with its bootstrap interval and p, from its values in R resamples (R,).

    Both figures must come from the same resamples: ``resample`` with the same seed. p is twice the share of resamples
    on the other side of 0, counting one more (Davison and Hinkley, 1997, section 4.2). The interval is NaN, and p is 1,
    if no resample defines the difference.
    """
    low, high = interval(value, resampled, level)
    defined = resampled[~np.isnan(resampled)]
    one_side = 1 + min((defined <= 0).sum(), (defined >= 0).sum())
    return Difference(value, low, high, min(1.0, 2 * float(one_side) / (len(defined) + 1)))


def not_worse(behind: np.ndarray, margin: float, n: int, seed: int = 0) -> float:
    """Return the one-sided p of "worse by ``margin`` or more", from R resamples of how far it is behind (R,).

    A small p shows that it is not. ``n`` is the number of independent rows, or groups. If the models differ on few of
    these rows or on none, resamples vary too little, however few rows there are. So each may also draw a row that is
    not there, on which only the other model is right. Without any difference, p is close to the exact (1 - margin)^n.
    """
    defined = behind[~np.isnan(behind)]
    unseen = np.random.default_rng([seed, 1]).poisson(1, len(defined)) / max(1, n)
    return (1 + float((defined + unseen >= margin - TIE).sum())) / (len(defined) + 1)


def worse(behind: np.ndarray, margin: float, n: int, seed: int = 0) -> float:
    """Return the one-sided p of "worse by at most ``margin``": a small p shows that it is worse by more."""
    return not_worse(-behind, -margin, n, seed)


def mcnemar(first: np.ndarray, second: np.ndarray) -> float:
    """Return the two-sided p of McNemar's exact test: whether each of two models is right, (N,) bool each.

    Only rows count on which one is right and the other wrong. If the models are equally good, each of these is as
    likely for either: a binomial test (McNemar, 1947).
    """
    from scipy.stats import binomtest

    only_first, only_second = int((first & ~second).sum()), int((second & ~first).sum())
    n = only_first + only_second
    return float(binomtest(only_first, n, 0.5).pvalue) if n else 1.0


def right_rows(
    metric: BoundMetric, targets: np.ndarray, scores: np.ndarray, predictions: np.ndarray
) -> np.ndarray | None:
    """Return which rows (n,) a metric counts as right; None if it is not the share of rows that are right."""
    if isinstance(metric, OfTask):
        return right_rows(metric.metric, *metric.task.own(targets, scores, predictions))
    if not isinstance(metric, Metric) or metric.definition is not accuracy.definition:
        return None
    return np.asarray(((targets >= 1) == predictions).all(axis=1))


def holm(p: np.ndarray) -> np.ndarray:
    """Return p values (K,) corrected for K tests, which may depend on each other.

    The chance that a true hypothesis gets a corrected p of at most alpha is at most alpha, for all K together (Holm, "A
    simple sequentially rejective multiple test procedure", 1979).
    """
    order = np.argsort(p)
    corrected = np.minimum(1, np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1)))
    result = np.empty(len(p))
    result[order] = corrected
    return result
