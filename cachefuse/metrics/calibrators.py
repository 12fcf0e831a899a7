"""Calibration: maps from scores to probabilities, fitted on rows that the models have not seen.

Targets (N, C) are 0 or 1, and -1 in a task's columns where a row lacks its label; scores (N, C) are in [0, 1].
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from cachefuse.metrics.base import by_rows
from cachefuse.metrics.tasks import TaskSlice

FEWEST = 50  # rows with a label, and rows without it, from which isotonic regression learns a class's steps
LEVEL = 0.01  # the share of a probability that a step leaves as it was
LEAST = 0.05  # slope
ROUNDS, CLOSE = 100, 1e-9  # of Newton's method: the most steps, and the size of the last one
LOWEST, HIGHEST = 1e-38, 1 - 2**-25  # float32 scores between 0 and 1 lie within
Derivatives = tuple[float, np.ndarray, np.ndarray]  # a value, its gradient (P,) and its second derivatives (P, P)
Loss = Callable[[np.ndarray], Derivatives]  # of parameters (P,)


@dataclass(frozen=True)
class Calibration:
    """A map from the score to the probability of each of C classes, with ``slopes`` and ``biases`` (C,).

    Where a row may have several labels, the probability of a score s is sigmoid(slope * logit(s) + bias). Where it has
    one, it is s ** slope, divided by the sum over the task's classes: temperature scaling, 1 / slope being the
    temperature (arXiv 1706.04599).

    ``steps`` {class number: (before (k,), after (k,))} change these probabilities once more, by isotonic regression.
    Both are ascending, with straight lines between them. Probabilities that would become equal stay in order: they keep
    0.01 of what they were, beside 0.99 of the step. Of a task with one label a row, the sum is then made 1 again.
    """

    slopes: np.ndarray
    biases: np.ndarray
    steps: Mapping[int, tuple[np.ndarray, np.ndarray]] = field(default_factory=dict)

    def __call__(self, scores: np.ndarray, tasks: Sequence[TaskSlice]) -> np.ndarray:
        """Return the probabilities (N, C) float32 of scores (N, C)."""
        if not len(scores):
            return scores
        return by_rows(lambda piece: np.concatenate([self._of_task(piece, task) for task in tasks], axis=1), scores)

    def as_dict(self) -> dict[str, object]:
        """Return it as plain numbers; ``steps`` are by the class's number as text, as JSON has keys."""
        steps = {str(c): [values.tolist() for values in step] for c, step in self.steps.items()}
        return {"slopes": self.slopes.tolist(), "biases": self.biases.tolist(), "steps": steps}

    def _of_task(self, scores: np.ndarray, task: TaskSlice) -> np.ndarray:
        columns = task.columns
        if task.one_label:
            probabilities = _softmax(self.slopes[columns] * _log(scores[:, columns]))
        else:
            probabilities = _sigmoid(self.slopes[columns] * _logit(scores[:, columns]) + self.biases[columns])
        steps = {c: self.steps[c] for c in task.numbers.tolist() if c in self.steps}
        for c, (before, after) in steps.items():
            own = probabilities[:, c - columns.start]
            own[:] = LEVEL * own + (1 - LEVEL) * np.interp(own, before, after)
        if task.one_label and steps:
            probabilities /= probabilities.sum(axis=1, keepdims=True)
        return probabilities.astype(np.float32)


def fit_calibration(kind: str, targets: np.ndarray, scores: np.ndarray, tasks: Sequence[TaskSlice]) -> Calibration:
    """Return the calibration of a ``kind``, "temperature" or "isotonic", that fits targets and scores (N, C) best.

    Slopes and biases have the highest likelihood, times a normal density around no change. A task with several labels
    a row has a common slope and bias, and then one of each class, around the common ones: so a class with few labels
    changes little from the others. A task with one label a row has one slope. "isotonic" adds steps for each class with
    at least 50 rows with its label, and 50 without.
    """
    slopes, biases, steps = np.ones(scores.shape[1]), np.zeros(scores.shape[1]), {}
    for task in tasks:
        own_targets, own_scores = task.own(targets, scores)
        if task.one_label:
            slopes[task.columns] = _fit_one_label(own_targets, own_scores)
        else:
            slopes[task.columns], biases[task.columns] = _fit_labels(own_targets, own_scores)
    smooth = Calibration(slopes, biases)
    if kind == "isotonic":
        for task in tasks:
            own = task.own(targets, smooth(scores, tasks))
            for c, truth, before in zip(task.numbers.tolist(), *(array.T for array in own), strict=True):
                if min(truth.sum(), (1 - truth).sum()) >= FEWEST:
                    steps[c] = _fit_steps(truth, before)
    return replace(smooth, steps=steps)


def _fit_labels(targets: np.ndarray, scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the slopes and biases (C,) of labels that may stand beside others."""
    columns = [(_logit(values), truth) for truth, values in zip(targets.T, scores.T, strict=True)]

    def log_loss(columns: Sequence[tuple[np.ndarray, np.ndarray]]) -> Loss:
        def loss(parameters: np.ndarray) -> Derivatives:
            value, gradient, curvature = 0.0, np.zeros(2), np.zeros((2, 2))
            for logits, truth in columns:
                changed = parameters[0] * logits + parameters[1]
                share = _sigmoid(changed)
                wrong, weight = share - truth, share * (1 - share)
                slopes = weight * logits
                value += (np.logaddexp(0, changed) - truth * changed).sum()
                gradient += (wrong * logits).sum(), wrong.sum()
                curvature += [[(slopes * logits).sum(), slopes.sum()], [slopes.sum(), weight.sum()]]
            return value, gradient, curvature

        return loss

    slope, bias = _minimum(log_loss(columns), np.array([1.0, 0.0]))
    own = [_minimum(log_loss([(slope * x + bias, truth)]), np.array([1.0, 0.0])) for x, truth in columns]
    slopes, biases = np.array(own).reshape(-1, 2).T
    return slopes * slope, slopes * bias + biases


def _fit_one_label(targets: np.ndarray, scores: np.ndarray) -> float:
    """Return the slope of a task with one label a row."""
    logs = _log(scores)

    def loss(parameters: np.ndarray) -> Derivatives:
        shares = _softmax(parameters[0] * logs)
        mean = (shares * logs).sum(axis=1)
        value = -np.log(np.maximum((shares * targets).sum(axis=1), LOWEST)).sum()
        gradient = ((shares - targets) * logs).sum()
        curvature = (shares * logs**2).sum() - (mean**2).sum()
        return value, np.array([gradient]), np.array([[curvature]])

    return float(_minimum(loss, np.ones(1))[0])


def _fit_steps(targets: np.ndarray, scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    from sklearn.isotonic import IsotonicRegression

    found = IsotonicRegression(y_min=0, y_max=1).fit(scores.astype(np.float64), targets)
    return found.X_thresholds_, found.y_thresholds_


def _minimum(loss: Loss, start: np.ndarray) -> np.ndarray:
    """Return the parameters, the slope first, with the least loss and half their squared distance to ``start``.

    Newton's method for a convex loss, with halved steps where it would overshoot. The slope is at least ``LEAST``.
    """

    def penalised(parameters: np.ndarray) -> Derivatives:
        value, gradient, curvature = loss(parameters)
        apart = parameters - start
        return value + 0.5 * (apart**2).sum(), gradient + apart, curvature + np.eye(len(start))

    lowest = np.where(np.arange(len(start)) == 0, LEAST, -np.inf)
    best, (value, gradient, curvature) = start, penalised(start)
    for _ in range(ROUNDS):
        free = np.flatnonzero((best > lowest) | (gradient < 0))
        step = np.zeros(len(start))
        step[free] = np.linalg.solve(curvature[np.ix_(free, free)], gradient[free])
        size = 1.0
        while np.abs(size * step).max() > CLOSE:
            tried = np.maximum(best - size * step, lowest)
            found = penalised(tried)
            if found[0] < value:
                break
            size /= 2
        else:
            break  # no step is better
        best, (value, gradient, curvature) = tried, found
    return best


def _log(scores: np.ndarray) -> np.ndarray:
    return np.log(np.clip(scores.astype(np.float64), LOWEST, None))


def _logit(scores: np.ndarray) -> np.ndarray:
    clipped = np.clip(scores.astype(np.float64), LOWEST, HIGHEST)
    logits: np.ndarray = np.log(clipped) - np.log1p(-clipped)
    return logits


def _sigmoid(values: np.ndarray) -> np.ndarray:
    from scipy.special import expit

    found: np.ndarray = expit(values)
    return found


def _softmax(values: np.ndarray) -> np.ndarray:
    shares: np.ndarray = np.exp(values - values.max(axis=1, keepdims=True))
    shares /= shares.sum(axis=1, keepdims=True)
    return shares
