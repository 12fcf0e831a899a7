"""Decision thresholds for multi-label scores, by an exact search: every way in which a threshold can split the scores.

Targets (N, C) are 0 or 1, scores (N, C) are higher for likelier labels. F1 as ``cachefuse.metrics`` defines it.
"""

import numpy as np

from cachefuse.errors import ConfigError, DataError
from cachefuse.metrics.decisions import decide
from cachefuse.registry import lookup

HALF = 0.5  # the threshold where none is chosen
TIE = 1e-10  # values this close differ by rounding alone
MAX_ROUNDS = 100


def choose_thresholds(
    targets: np.ndarray, scores: np.ndarray, metric: str, per_class: bool, min_labels: int = 0
) -> np.ndarray:
    """Return the thresholds (C,) float64 that reach the highest ``metric`` under ``decide``: one for all, or by class.

    A threshold lies midway between two neighbouring scores, the nearest to 0.5 where several are best. One threshold
    for all is optimal, given ``min_labels``. Thresholds by class are chosen as if ``min_labels`` were 0: it only adds
    labels to rows left with too few. They are optimal for macro_f1, where a class without positives keeps 0.5, and for
    micro_f1. For samples_f1, whose classes can't be separated, they come from coordinate ascent that starts at the best
    one for all: no change of one threshold improves, but changes of several might.

    Raises UnknownNameError for a metric not in THRESHOLD_METRICS, ConfigError if the shapes differ, DataError if there
    are no rows or scores are not finite.
    """
    as_groups, by_class = lookup(THRESHOLD_METRICS, metric, "threshold metric")
    if targets.ndim != 2 or targets.shape != scores.shape:
        raise ConfigError(
            f"targets and scores must both have shape (N, C). Got {targets.shape} and {scores.shape} instead."
        )
    if not len(targets):
        raise DataError("thresholds can't be chosen on no rows")
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
    """Return predictions (N, C) bool: the rows of each part, by thresholds chosen on the rows of all the others.

    Parts (N,) are fold numbers. A metric of these predictions never saw the rows that chose its thresholds. ``decided``
    (N, C) are scores to decide on, where others than those thresholds are chosen by. Raises as ``choose_thresholds``
    does, and ConfigError if parts are not one for each row.
    """
    decided = scores if decided is None else decided
    if parts.shape != (len(scores),):
        raise ConfigError(f"parts must have shape (N,), here ({len(scores)},). Got {parts.shape} instead.")
    predictions = np.zeros(scores.shape, bool)
    for part in np.unique(parts):
        rows = parts == part
        thresholds = choose_thresholds(targets[~rows], scores[~rows], metric, per_class, min_labels)
        predictions[rows] = decide(decided[rows], "multilabel", thresholds, min_labels)
    return predictions


def _search(targets: np.ndarray, scores: np.ndarray) -> float:
    """Return the best threshold for the mean F1 of G groups of n, (G, n); scores of inf are predicted in any case.

    From the highest score to the lowest, each changes the F1 of its group alone: the mean is a sum of those changes.
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
    """Return the best threshold, given scores from high to low (n,) and the value of predicting the first 0 to n."""
    top = float(ranked.max(initial=0))
    # The last score predicted and the first that is not; 0 and 1 stand in at the ends.
    last = np.concatenate([[1 if top < 1 else 2 * top], ranked], dtype=np.float64)
    first = np.concatenate([ranked, [0]], dtype=np.float64)
    possible = last > first  # equal scores can't be told apart
    possible[-1] = True  # to predict them all
    best = np.flatnonzero(possible & (values >= values[possible].max() - TIE))
    midway = (last[best] + first[best]) / 2
    nearest = np.abs(midway - 0.5).argmin()
    # Between adjacent floats there is no other; a Python float is rounded to float32 to be compared with such scores.
    apart = ranked.dtype.type(midway[nearest]) > first[best[nearest]]
    return float(midway[nearest] if apart else last[best[nearest]])


def _macro_by_class(targets: np.ndarray, scores: np.ndarray) -> np.ndarray:
    """Return the optimal thresholds: each class is a search of its own."""
    thresholds = np.full(targets.shape[1], 0.5)
    for c in np.flatnonzero(targets.any(axis=0)):
        thresholds[c] = _search(targets[None, :, c], scores[None, :, c])
    return thresholds


def _micro_by_class(targets: np.ndarray, scores: np.ndarray) -> np.ndarray:
    """Return the optimal thresholds, by Dinkelbach's method for ratios ("On nonlinear fractional programming", 1967).

    F1 is 2 TP / (predicted + positives). It can exceed a ratio a / b if and only if 2 TP b - (predicted + positives) a
    can exceed 0, which is a sum over classes: maximise that, take the ratio reached, and repeat until it stays. The
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
    """Return good thresholds, by coordinate ascent from the best one for all: each step is exact for one class.

    Not always the optimum: it ends where no change of one threshold improves, or after MAX_ROUNDS over the classes.
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
            without = 2 * hits / np.maximum(predicted + positives, 1)
            changes = 2 * (hits + truth) / (predicted + 1 + positives) - without
            values = np.append(0, changes[ranking].cumsum() / len(changes))
            thresholds[c] = _pick(scores[ranking, c], values)
            chosen[:, c] = scores[:, c] >= thresholds[c]
            predicted += chosen[:, c]
            hits += chosen[:, c] & truth
        if (thresholds == before).all():
            break
    return thresholds


# The groups whose F1 is averaged, (G, n), and the search by class.
THRESHOLD_METRICS = {
    "micro_f1": (lambda x: x.reshape(1, -1), _micro_by_class),
    "macro_f1": (np.transpose, _macro_by_class),
    "samples_f1": (np.asarray, _samples_by_class),
}
