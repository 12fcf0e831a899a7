"""The training loop: one function that reads from top to bottom."""

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from cachefuse.errors import TrainingError
from cachefuse.training.batches import FeatureTable, shuffled_batches

EVAL_ROWS = 8192
CHECKED_ROWS = 100_000  # of the training rows that what was learnt is measured on, however many there are
DIVERGED = 10.0  # a loss this many times that of logits 0 is no longer one of a model that learns


class NesterovSGD(torch.optim.SGD):
    """SGD with Nesterov momentum 0.9."""

    def __init__(self, params: Any, lr: float, weight_decay: float = 0.0) -> None:
        super().__init__(params, lr=lr, momentum=0.9, nesterov=True, weight_decay=weight_decay)


@dataclass(frozen=True)
class Epoch:
    """What one epoch came to: the mean training loss and the validation score (None without a validation split)."""

    epoch: int
    loss: float
    score: float | None
    best: bool


@dataclass
class History:
    """All epochs, which of them the weights come from, and whether training was interrupted."""

    epochs: list[Epoch] = field(default_factory=list)
    best_epoch: int = 0
    interrupted: bool = False


def fit(
    model: nn.Module,
    loss: Callable[[Tensor, Tensor], Tensor],
    optimizer: torch.optim.Optimizer,
    table: FeatureTable,
    train_rows: Tensor,
    *,
    score: Callable[[nn.Module], float] | None,
    epochs: int,
    batch_size: int,
    patience: int,
    generator: torch.Generator,
    on_epoch: Callable[[Epoch], None] = lambda epoch: None,
) -> History:
    """Train until ``epochs``, or ``patience`` epochs without a better ``score``; leaves the best weights in the model.

    ``score`` is higher for a better model; without it, or with ``patience`` 0, the last epoch's weights stay.
    Raises TrainingError if training diverges. Ctrl-C ends training at the best epoch so far, if there is one.
    """
    history = History()
    best_score: float | None = None
    best_state: dict[str, Tensor] = {}
    try:
        for epoch in range(1, epochs + 1):
            model.train()
            total = 0.0
            for rows in shuffled_batches(table, train_rows, batch_size, generator):
                features, present = table.batch(rows)  # (B, D_m), (B,)
                logits = model(features, present)  # (B, C)
                value = loss(logits, table.targets[rows])
                optimizer.zero_grad(set_to_none=True)
                value.backward()
                optimizer.step()
                total += value.item() * len(rows)
            mean_loss = total / len(train_rows)
            if not math.isfinite(mean_loss):
                raise TrainingError(f"training diverged in epoch {epoch}: the loss is {mean_loss}; take a lower lr")
            epoch_score = score(model) if score else None
            better = patience == 0 or epoch == 1 or _is_better(epoch_score, best_score)
            history.epochs.append(Epoch(epoch, mean_loss, epoch_score, better))
            if better:
                history.best_epoch, best_score, best_state = epoch, epoch_score, copy.deepcopy(model.state_dict())
            on_epoch(history.epochs[-1])
            if patience and epoch - history.best_epoch >= patience:
                break
    except KeyboardInterrupt:
        if not history.best_epoch:
            raise
        history.interrupted = True
    model.load_state_dict(best_state)
    _check_learnt(model, loss, table, train_rows)
    return history


def _is_better(score: float | None, best: float | None) -> bool:
    """Whether a score beats the best so far; where there is none to tell by (None or NaN), a later epoch does."""
    return score is None or best is None or not score <= best


def _check_learnt(
    model: nn.Module, loss: Callable[[Tensor, Tensor], Tensor], table: FeatureTable, rows: Tensor
) -> None:
    rows = spread(rows, CHECKED_ROWS)
    logits = predict_logits(model, table, rows)  # (n, C)
    targets = table.targets[rows].cpu()
    reached, blank = (loss(x, targets).item() for x in (logits, torch.zeros_like(logits)))
    if reached > DIVERGED * blank:
        raise TrainingError(
            f"training diverged: the loss is {reached:.4g}, where logits of 0 give {blank:.4g}; take a lower lr"
        )


def spread(rows: Tensor, most: int) -> Tensor:
    """Return rows (n,) as they are, or ``most`` of them, evenly spread."""
    if len(rows) <= most:
        return rows
    return rows[torch.arange(most, device=rows.device) * len(rows) // most]


@torch.inference_mode()
def predict_logits(model: nn.Module, table: FeatureTable, rows: Tensor) -> Tensor:
    """Return the logits (n, C) of some rows, float32, on the CPU. Raises TrainingError if any is not finite."""
    model.eval()
    logits = torch.cat([model(*table.batch(part)).float().cpu() for part in rows.split(EVAL_ROWS)])
    if not logits.isfinite().all():
        raise TrainingError("the model's logits are not finite: its training diverged; take a lower lr")
    return logits


def to_scores(logits: Tensor, loss: str) -> Tensor:
    """Return probabilities (n, C): a softmax where the loss was one over the classes, else a sigmoid for each."""
    return logits.softmax(dim=1) if loss == "ce" else logits.sigmoid()
