"""Calibration metrics: how well scores agree with probabilities. Lower is better."""

import numpy as np

from cachefuse.errors import DataError
from cachefuse.metrics.base import Weighted, by_rows, metric

BINS = 15


@metric("ECE", lower_is_better=True)
def calibration_error(targets: np.ndarray, scores: np.ndarray, predictions: np.ndarray) -> Weighted:
    """Return the expected calibration error of all N * C scores, each the probability of its label.

    arXiv 1706.04599, equation 3, with 15 bins of equal width. Raises DataError if scores are not in [0, 1].
    """
    return _expected_error(targets, scores)


@metric("ECE (top)", lower_is_better=True)
def top_calibration_error(targets: np.ndarray, scores: np.ndarray, predictions: np.ndarray) -> Weighted:
    """Return the expected calibration error of each sample's highest score, the probability of its class.

    This is the usual definition for multi-class tasks. Of equal scores the first counts. Bins and errors are those of
    ``calibration_error``.
    """
    top = scores.argmax(axis=1)[:, None]
    return _expected_error(*(np.take_along_axis(x, top, axis=1) for x in (targets, scores)))


def _expected_error(targets: np.ndarray, scores: np.ndarray) -> Weighted:
    if scores.min() < 0 or scores.max() > 1:
        raise DataError(f"scores must be in [0, 1] for calibration. Got {scores.min()} to {scores.max()} instead.")
    gaps = by_rows(_gaps, targets, scores)  # (N, 15)
    return lambda weights: np.abs(gaps.T @ weights).sum(axis=0) / (scores.shape[1] * weights.sum(axis=0))


def _gaps(targets: np.ndarray, scores: np.ndarray) -> np.ndarray:
    """Return the sum of targets minus scores in each row and bin, (n, 15)."""
    n = len(scores)
    bins = np.searchsorted(np.linspace(0, 1, BINS + 1)[1:-1], scores)  # each is (lower, upper]
    bins += BINS * np.arange(n)[:, None]
    return np.bincount(bins.ravel(), (targets - scores.astype(np.float64)).ravel(), BINS * n).reshape(n, BINS)
