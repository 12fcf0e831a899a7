"""The training loop: one function that reads from top to bottom."""

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from cachefuse.errors import TrainingError
from cachefuse.training.batches import FeatureTable, shuffled_batches

EVAL_ROWS = 8192
DIVERGED = 2.0  # a best epoch whose loss is this many times the untrained model's has learnt nothing


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
    best_score, best_state, first_loss = float("-inf"), None, None
    try:
        for epoch in range(1, epochs + 1):
            model.train()
            total = 0.0
            for rows in shuffled_batches(train_rows, batch_size, generator):
                features, present = table.batch(rows)  # (B, D_m), (B,)
                logits = model(features, present)  # (B, C)
                value = loss(logits, table.targets[rows])
                optimizer.zero_grad(set_to_none=True)
                value.backward()
                optimizer.step()
                total += value.item() * len(rows)
                first_loss = value.item() if first_loss is None else first_loss
            mean_loss = total / len(train_rows)
            if not mean_loss < float("inf"):
                raise TrainingError(f"training diverged in epoch {epoch}: the loss is {mean_loss}")
            epoch_score = score(model) if score else None
            better = patience == 0 or epoch_score is None or epoch_score > best_score
            if better:
                best_score, history.best_epoch = epoch_score if epoch_score is not None else best_score, epoch
                best_state = copy.deepcopy(model.state_dict()) if patience and score else None
            history.epochs.append(Epoch(epoch, mean_loss, epoch_score, better))
            on_epoch(history.epochs[-1])
            if patience and epoch - history.best_epoch >= patience:
                break
    except KeyboardInterrupt:
        if not history.epochs:
            raise
        history.interrupted = True
    if best_state is not None:
        model.load_state_dict(best_state)
    best = history.epochs[history.best_epoch - 1]
    if first_loss is not None and best.loss > DIVERGED * max(first_loss, 1e-12):
        raise TrainingError(f"training diverged: the loss went from {first_loss:.4g} to {best.loss:.4g}")
    return history


@torch.inference_mode()
def predict_logits(model: nn.Module, table: FeatureTable, rows: Tensor) -> Tensor:
    """Return the logits (n, C) of some rows, float32, on the CPU."""
    model.eval()
    return torch.cat([model(*table.batch(part)).float().cpu() for part in rows.split(EVAL_ROWS)])


def to_scores(logits: Tensor, loss: str) -> Tensor:
    """Return probabilities (n, C): a softmax where the loss was one over the classes, else a sigmoid for each."""
    return logits.softmax(dim=1) if loss == "ce" else logits.sigmoid()
