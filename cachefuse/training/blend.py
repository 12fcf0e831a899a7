"""The weights of a blend: models of several settings, averaged as suits the rows that none of them has seen."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch

from cachefuse.metrics.tasks import TaskSlice
from cachefuse.training.data import TrainingData
from cachefuse.training.held_out import HeldOut

ROUNDS = 20  # of selection: weights are multiples of 1 / ROUNDS
SURE = 1e-6  # the least probability; that of a sure and wrong model would have an infinite loss


def blend(data: TrainingData, held_out: Sequence[HeldOut]) -> tuple[np.ndarray, HeldOut]:
    """Return the weights (K,) of K models, of sum 1, and their joint scores of the rows that they held out.

    Each part of these rows is joined with weights chosen on the other parts: no row helps to choose its own. The final
    weights are chosen on all. The models must have held out the same rows, in the same parts.
    """
    first, scores = held_out[0], np.stack([each.scores for each in held_out])  # (K, n, C)
    targets = data.targets(torch.from_numpy(first.rows))
    joint = np.empty_like(first.scores)
    for part in np.unique(first.parts):
        own, rest = first.parts == part, first.parts != part
        chosen = rest if rest.any() else own
        weights = select(targets[chosen], scores[:, chosen], data.tasks)
        joint[own] = np.einsum("k,knc->nc", weights, scores[:, own])
    return select(targets, scores, data.tasks), replace(first, scores=joint)


def select(targets: np.ndarray, scores: np.ndarray, tasks: Sequence[TaskSlice]) -> np.ndarray:
    """Return weights (K,) for the probabilities (K, n, C) of K models, of sum 1, by their mean's log loss.

    Greedy selection with replacement (Caruana et al., "Ensemble selection from libraries of models", 2004): each round
    adds the model that makes the mean best. Of the means of all rounds, the best one is taken.
    """
    total, counts, best = np.zeros(scores.shape[1:]), np.zeros(len(scores)), (np.inf, np.zeros(len(scores)))
    for n in range(1, ROUNDS + 1):
        losses = [log_loss(targets, (total + one) / n, tasks) for one in scores]
        chosen = int(np.argmin(losses))
        total += scores[chosen]
        counts[chosen] += 1
        if losses[chosen] < best[0]:
            best = losses[chosen], counts / n
    return best[1]


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
