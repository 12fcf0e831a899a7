"""Decision thresholds for multi-label scores, by an exact search over all splits of the scores.

Targets (N, C) are 0 or 1, scores (N, C) are higher for likelier labels. ``cachefuse.metrics`` defines F1.
"""

import numpy as np

from cachefuse.errors import ConfigError, DataError
from cachefuse.metrics.decisions import decide
from cachefuse.registry import lookup

HALF = 0.5  # the threshold if none is chosen
TIE = 1e-10  # closer values differ only by rounding
MAX_ROUNDS = 100


def choose_thresholds(
    targets: np.ndarray, scores: np.ndarray, metric: str, per_class: bool, min_labels: int = 0
) -> np.ndarray:
    """Return the thresholds (C,) float64 with the highest ``metric`` under ``decide``: one for all, or one per class.

    A threshold lies midway between two neighbouring scores; of several best ones, the nearest to 0.5 is taken. One
    threshold for all is optimal, given ``min_labels``. Thresholds per class are chosen as if ``min_labels`` were 0,
    which only adds labels to rows with too few. They are optimal for micro_f1 and macro_f1; for the latter, a class
    without positives keeps 0.5. The classes of samples_f1 cannot be separated: coordinate ascent starts at the best
    threshold for all. At its end no change of one threshold improves the metric, but a change of several might.

    Raises UnknownNameError for a metric not in THRESHOLD_METRICS, ConfigError if the shapes differ, DataError if there
    are no rows or scores are not finite.
    """
    as_groups, by_class = lookup(THRESHOLD_METRICS, metric, "threshold metric")
    if targets.ndim != 2 or targets.shape != scores.shape:
        raise ConfigError(
            f"targets and scores must both have shape (N, C). Got {targets.shape} and {scores.shape} instead."
        )
    if not len(targets):
        raise DataError("thresholds cannot be chosen: there are no rows")
    if not np.isfinite(scores).all():
        raise DataError(f"scores must be finite. Got {scores[~np.isfinite(scores)][0]} instead.")
    targets = targets > 0
    if per_class:
        thresholds: np.ndarray = by_class(targets, scores)
        return thresholds
    always = decide(scores, "multilabel", np.inf, min_labels)
    threshold = _search(as_groups(targets), as_groups(np.where(always, np.inf, scores)))
    return np.full(targets.shape[1], threshold)


def crossfit_decisions(
    targets: np.ndarray,
    scores: np.ndarray,
    parts: np.ndarray,
    metric: str,
    per_class: bool,
    min_labels: int = 0,
    decided: np.ndarray | None = None,
) -> np.ndarray:
    """Return predictions (N, C) bool: each fold is decided by thresholds chosen on all other folds.

    ``parts`` (N,) are fold numbers. So no row takes part in the choice of its own thresholds. Thresholds are chosen on
    ``scores`` and applied to ``decided`` (N, C), by default the same. Raises as ``choose_thresholds`` does, and
    ConfigError if ``parts`` does not have one number per row.
    """
    decided = scores if decided is None else decided
    if parts.shape != (len(scores),):
        raise ConfigError(f"parts must have shape (N,), here ({len(scores)},). Got {parts.shape} instead.")
    predictions = np.zeros(scores.shape, bool)
    for fold in np.unique(parts):
        rows = parts == fold
        thresholds = choose_thresholds(targets[~rows], scores[~rows], metric, per_class, min_labels)
        predictions[rows] = decide(decided[rows], "multilabel", thresholds, min_labels)
    return predictions


def _search(targets: np.ndarray, scores: np.ndarray) -> float:
    """Return the best threshold for the mean F1 of G groups of n, (G, n). Scores of inf are always predicted.

    Going from the highest score down, each score changes only its group's F1: the mean is a sum of these changes.
    """
    order = np.argsort(-scores, axis=1)
    ranked = np.take_along_axis(scores, order, axis=1)
    hits = np.take_along_axis(targets, order, axis=1).cumsum(axis=1)
    f1 = 2 * hits / (np.arange(1, hits.shape[1] + 1) + hits[:, -1:])
    changes = np.diff(f1, axis=1, prepend=0)
    merged = np.argsort(-ranked, axis=None)
    values = np.append(0, changes.ravel()[merged].cumsum() / len(f1))
    always = np.count_nonzero(np.isinf(scores))
    return _pick(ranked.ravel()[merged][always:], values[always:])


def _pick(ranked: np.ndarray, values: np.ndarray) -> float:
    """Return the best threshold, given descending scores (n,) and the values of predicting the first 0 to n of them."""
    top = float(ranked.max(initial=0))
    # The last score that is predicted and the first that is not; 1 and 0 are used at the ends.
    last = np.concatenate([[1 if top < 1 else 2 * top], ranked], dtype=np.float64)
    first = np.concatenate([ranked, [0]], dtype=np.float64)
    possible = last > first  # no threshold separates equal scores
    possible[-1] = True  # predict all
    best = np.flatnonzero(possible & (values >= values[possible].max() - TIE))
    midway = (last[best] + first[best]) / 2
    nearest = np.abs(midway - 0.5).argmin()
    # There is no float between adjacent floats, and comparing with float32 scores rounds the threshold to float32.
    separates = ranked.dtype.type(midway[nearest]) > first[best[nearest]]
    return float(midway[nearest] if separates else last[best[nearest]])


def _macro_by_class(targets: np.ndarray, scores: np.ndarray) -> np.ndarray:
    """Return the optimal thresholds: one independent search per class."""
    thresholds = np.full(targets.shape[1], 0.5)
    for c in np.flatnonzero(targets.any(axis=0)):
        thresholds[c] = _search(targets[None, :, c], scores[None, :, c])
    return thresholds


def _micro_by_class(targets: np.ndarray, scores: np.ndarray) -> np.ndarray:
    """Return the optimal thresholds, by Dinkelbach's method for ratios ("On nonlinear fractional programming", 1967).

    F1 is 2 TP / (predicted + positives). It can exceed a ratio a / b if and only if 2 TP b - (predicted + positives) a
    can exceed 0. That is a sum over classes: maximise it, take the new ratio, and repeat until the ratio stays. The
    integers are exact.
    """
    n, classes = targets.shape
    order = np.argsort(-scores, axis=0)
    ranked = np.take_along_axis(scores, order, axis=0)
    hits = np.zeros((n + 1, classes), np.int64)
    np.take_along_axis(targets, order, axis=0).cumsum(axis=0, out=hits[1:])
    predicted = np.arange(n + 1)
    a, b = 0, 1
    while True:
        values = [2 * hits[:, c] * b - predicted * a for c in range(classes)]
        thresholds = np.array([_pick(ranked[:, c], values[c]) for c in range(classes)])
        chosen = scores >= thresholds
        top, bottom = 2 * int((chosen & targets).sum()), int(chosen.sum() + targets.sum())
        if top * b <= a * bottom:
            return thresholds
        a, b = top, bottom


def _samples_by_class(targets: np.ndarray, scores: np.ndarray) -> np.ndarray:
    """Return good thresholds, by coordinate ascent from the best threshold for all: each step is exact for one class.

    They may not be optimal: the search ends when no change of one threshold improves, or after MAX_ROUNDS rounds.
    """
    thresholds = np.full(targets.shape[1], _search(targets, scores))
    chosen = scores >= thresholds
    order = np.argsort(-scores, axis=0)
    positives, predicted, hits = targets.sum(axis=1), chosen.sum(axis=1), (chosen & targets).sum(axis=1)
    for _ in range(MAX_ROUNDS):
        before = thresholds.copy()
        for c in range(len(thresholds)):
            truth, ranking = targets[:, c], order[:, c]
            predicted -= chosen[:, c]
            hits -= chosen[:, c] & truth
            f1_without = 2 * hits / np.maximum(predicted + positives, 1)
            changes = 2 * (hits + truth) / (predicted + 1 + positives) - f1_without
            values = np.append(0, changes[ranking].cumsum() / len(changes))
            thresholds[c] = _pick(scores[ranking, c], values)
            chosen[:, c] = scores[:, c] >= thresholds[c]
            predicted += chosen[:, c]
            hits += chosen[:, c] & truth
        if (thresholds == before).all():
            break
    return thresholds


# For each metric: the groups (G, n) whose F1 is averaged, and the search per class.
THRESHOLD_METRICS = {
    "micro_f1": (lambda x: x.reshape(1, -1), _micro_by_class),
    "macro_f1": (np.transpose, _macro_by_class),
    "samples_f1": (np.asarray, _samples_by_class),
}
