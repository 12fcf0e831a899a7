"""The weights of a blend: models of several settings, averaged as suits the rows that none of them has seen."""

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import torch

from cachefuse.metrics.calibrators import Calibration, fit_calibration
from cachefuse.metrics.tasks import TaskSlice
from cachefuse.training.data import TrainingData
from cachefuse.training.held_out import HeldOut

ROUNDS = 20  # of selection: weights are multiples of 1 / ROUNDS
SURE = 1e-6  # the least probability; that of a sure and wrong model would have an infinite loss

Allowed = Callable[[np.ndarray], bool]  # whether the models with these counts (K,) may be in the mean together


def blend(
    data: TrainingData, held_out: Sequence[HeldOut], allowed: Allowed = lambda counts: True
) -> tuple[np.ndarray, HeldOut]:
    """Return the weights (K,) of K models, of sum 1, and their joint scores of the rows that they held out.

    These are those of ``join``, unless one of the models alone has a lower log loss: then it gets all the weight. A
    choice that is not ``allowed``, such as one that takes too much memory, is never made; one model alone must be.
    """
    weights, joint = join(data, held_out, allowed)
    targets = data.targets(torch.from_numpy(joint.rows))
    alone = [k for k, one in enumerate(np.eye(len(held_out))) if allowed(one)]
    losses = {k: log_loss(targets, held_out[k].scores, data.tasks) for k in alone}
    best = min(losses, key=lambda k: losses[k])
    if losses[best] <= log_loss(targets, joint.scores, data.tasks):
        return np.eye(len(held_out))[best], held_out[best]
    return weights, joint


def join(
    data: TrainingData, held_out: Sequence[HeldOut], allowed: Allowed = lambda counts: True
) -> tuple[np.ndarray, HeldOut]:
    """Return the weights (K,) of K models by ``select``, and their joint scores of the rows that they held out.

    Each part of these rows is joined with weights chosen on the other parts: no row helps to choose its own. The final
    weights are chosen on all. The models must have held out the same rows, in the same parts.
    """
    first, scores = held_out[0], np.stack([each.scores for each in held_out])  # (K, n, C)
    targets = data.targets(torch.from_numpy(first.rows))
    final = select(targets, scores, data.tasks, allowed)
    joint = np.empty_like(first.scores)
    for part in np.unique(first.parts):
        own, rest = first.parts == part, first.parts != part
        weights = select(targets[rest], scores[:, rest], data.tasks, allowed) if rest.any() else final
        joint[own] = np.einsum("k,knc->nc", weights, scores[:, own])
    return final, replace(first, scores=joint)


def select(
    targets: np.ndarray, scores: np.ndarray, tasks: Sequence[TaskSlice], allowed: Allowed = lambda counts: True
) -> np.ndarray:
    """Return weights (K,) for the probabilities (K, n, C) of K models, of sum 1, by their mean's log loss.

    Greedy selection with replacement (Caruana et al., "Ensemble selection from libraries of models", 2004): each round
    adds the model that makes the mean best. Of the means of all rounds, the best one is taken.
    """
    counts, own = np.zeros(len(scores)), np.eye(len(scores))
    total, best = np.zeros(scores.shape[1:]), (np.inf, counts)
    for n in range(1, ROUNDS + 1):
        fitting = [k for k in range(len(scores)) if allowed(counts + own[k])]
        losses = {k: log_loss(targets, (total + scores[k]) / n, tasks) for k in fitting}
        chosen = min(losses, key=lambda k: losses[k])
        total += scores[chosen]
        counts = counts + own[chosen]
        if losses[chosen] < best[0]:
            best = losses[chosen], counts / n
    return best[1]


def calibrated(data: TrainingData, held_out: HeldOut) -> tuple[Calibration, HeldOut]:
    """Return what makes a model's scores probabilities, and those of the rows held out: each part's by the others."""
    targets = data.targets(torch.from_numpy(held_out.rows))

    def fit(rows: np.ndarray) -> Calibration:
        return fit_calibration("temperature", targets[rows], held_out.scores[rows], data.tasks)

    scores, parts = held_out.scores.copy(), held_out.parts_to_calibrate(data)
    for part in np.unique(parts):
        own, rest = parts == part, parts != part
        if rest.any():
            scores[own] = fit(rest)(held_out.scores[own], data.tasks)
    return fit(np.ones(len(targets), bool)), replace(held_out, scores=scores)


def log_loss(targets: np.ndarray, scores: np.ndarray, tasks: Sequence[TaskSlice]) -> float:
    """Return the log loss of probabilities (n, C), per row and task; a row without a task's label does not count."""
    total = 0.0
    for task in tasks:
        y, p = task.own(targets, scores)
        p = np.clip(p, SURE, 1 - SURE)
        positive = np.where(y > 0, np.log(p), 0)
        negative = 0 if task.one_label else np.where(y > 0, 0, np.log1p(-p))
        total -= float((positive + negative).sum()) / max(1, len(y))
    return total
