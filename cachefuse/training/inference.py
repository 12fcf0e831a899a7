"""Inference: compute a model's logits and probabilities for rows of a table."""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from cachefuse.errors import TrainingError
from cachefuse.metrics.tasks import TaskSlice
from cachefuse.nn.losses import Loss
from cachefuse.training.feature_table import PIECE_FLOATS, FeatureTable
from cachefuse.training.tasks import loss_of

CHECKED_ROWS = 100_000  # maximum number of training rows to check a trained model on


def mean_loss(loss: Loss, logits: Tensor, table: FeatureTable, rows: Tensor) -> float:
    """Return the mean loss of logits (n, C) of rows (n,), computed piece by piece to save memory."""
    size = max(1, PIECE_FLOATS // logits.shape[1])
    pieces = zip(logits.split(size), rows.split(size), strict=True)
    return sum(loss(x, table.targets[piece].cpu()).item() * len(piece) for x, piece in pieces) / len(rows)


def spread(rows: Tensor, most: int) -> Tensor:
    """Return rows (n,), or ``most`` of them, evenly spread, if there are more."""
    if len(rows) <= most:
        return rows
    return rows[torch.arange(most, device=rows.device) * len(rows) // most]


def predict_logits(
    model: nn.Module, table: FeatureTable, rows: Tensor, then: Callable[[Tensor], Tensor] = lambda logits: logits
) -> Tensor:
    """Return the logits (n, C) of rows (n,), float32 on the CPU; ``then`` is applied to each batch of them.

    Raises TrainingError if a logit is not finite.
    """
    model.eval()

    def predict(features: dict[str, Tensor], present: dict[str, Tensor]) -> Tensor:
        logits = model(features, present).float()
        if not logits.isfinite().all():
            raise TrainingError("the model's logits are not finite: its training diverged; use a lower lr")
        return then(logits)

    return table.map(predict, rows)


def to_scores(logits: Tensor, loss: str, tasks: Sequence[TaskSlice] = ()) -> Tensor:
    """Return probabilities (n, C): a softmax for loss ce, else a sigmoid per class.

    With several tasks, each has its own columns and loss.
    """
    if tasks:
        return torch.cat([to_scores(logits[:, task.columns], loss_of(task, loss)) for task in tasks], dim=1)
    return logits.softmax(dim=1) if loss == "ce" else logits.sigmoid()


def predict_scores(
    model: nn.Module, table: FeatureTable, rows: Tensor, loss: str, tasks: Sequence[TaskSlice] = ()
) -> np.ndarray:
    """Return probabilities (n, C) float32 of rows (n,), by ``to_scores``.

    Raises TrainingError if a logit is not finite.
    """
    if not len(rows):
        return np.zeros((0, table.targets.shape[1]), np.float32)
    scores = predict_logits(model, table, rows.to(table.targets.device), lambda x: to_scores(x, loss, tasks))
    return scores.numpy()
