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


def class_calibration_error(targets: np.ndarray, scores: np.ndarray) -> np.ndarray:
    """Return the expected calibration error of each class's scores, (C,), for targets 0 or 1 and scores (N, C)."""
    gaps = [
        np.bincount(_bins(x), truth - x.astype(np.float64), BINS) for truth, x in zip(targets.T, scores.T, strict=True)
    ]
    errors: np.ndarray = np.abs(gaps).sum(axis=1) / max(1, len(scores))
    return errors


def reliability(targets: np.ndarray, scores: np.ndarray, kind: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the mean score, the share of right labels and the number of scores in each bin that has any: (B,) each.

    Targets (N, C) are 0 or 1. Bins and scores are those of the calibration error of a ``kind`` of task: all scores of
    "multilabel", the highest score of each row of "multiclass".
    """
    if kind == "multiclass":
        top = scores.argmax(axis=1)[:, None]
        targets, scores = (np.take_along_axis(x, top, axis=1) for x in (targets, scores))
    bins = _bins(scores.ravel())
    counts, rights, totals = (np.bincount(bins, x, BINS) for x in (None, targets.ravel(), scores.ravel()))
    some = counts > 0
    return totals[some] / counts[some], rights[some] / counts[some], counts[some]


def _expected_error(targets: np.ndarray, scores: np.ndarray) -> Weighted:
    if scores.min() < 0 or scores.max() > 1:
        raise DataError(f"scores must be in [0, 1] for calibration. Got {scores.min()} to {scores.max()} instead.")
    gaps = by_rows(_gaps, targets, scores)  # (N, 15)
    return lambda weights: np.abs(gaps.T @ weights).sum(axis=0) / (scores.shape[1] * weights.sum(axis=0))


def _gaps(targets: np.ndarray, scores: np.ndarray) -> np.ndarray:
    """Return the sum of targets minus scores in each row and bin, (n, 15)."""
    n = len(scores)
    bins = _bins(scores)
    bins += BINS * np.arange(n)[:, None]
    return np.bincount(bins.ravel(), (targets - scores.astype(np.float64)).ravel(), BINS * n).reshape(n, BINS)


def _bins(scores: np.ndarray) -> np.ndarray:
    """Return the number of each score's bin; each is (lower, upper]."""
    return np.searchsorted(np.linspace(0, 1, BINS + 1)[1:-1], scores)
