"""The training loop: one function that reads from top to bottom."""

import ctypes
import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler

from cachefuse.errors import TrainingError
from cachefuse.fusion.base import Model
from cachefuse.nn.losses import Loss
from cachefuse.threads import adapt_threads, idle_threads
from cachefuse.training.batches import Batch, Batches, drop_modalities
from cachefuse.training.feature_table import FeatureTable
from cachefuse.training.inference import CHECKED_ROWS, mean_loss, predict_logits, spread
from cachefuse.training.optim import EMA

KEPT_BYTES = 512 << 20  # of freed memory, that stay with the process
MMAP_THRESHOLD, TRIM_THRESHOLD = -3, -1  # as malloc.h numbers them
DIVERGED = 10.0  # a loss this many times that of logits 0 is no longer one of a model that learns


@dataclass(frozen=True)
class Epoch:
    """What one epoch came to: the mean training loss and, with validation rows, their score and their loss.

    With averaged weights, which are then those kept, ``raw_score`` is that of the weights as they are. The last digits
    depend on the number of CPU ``threads``.
    """

    epoch: int
    loss: float
    score: float | None
    best: bool
    val_loss: float | None = None
    raw_score: float | None = None
    threads: int = 0


@dataclass
class History:
    """All epochs, which of them the weights come from, and whether training was interrupted.

    ``stages`` are the best epochs by stage, where there were several, or by head that was trained alone before;
    ``earlier`` all epochs of those that came before the last.
    """

    epochs: list[Epoch] = field(default_factory=list)
    best_epoch: int = 0
    interrupted: bool = False
    stages: dict[str, int] = field(default_factory=dict)
    earlier: dict[str, list[Epoch]] = field(default_factory=dict)


@dataclass(frozen=True)
class Validation:
    """The rows (n,) that a model is validated on, and ``score(logits (n, C))``, higher for a better model.

    The logits are the score's to overwrite.
    """

    rows: Tensor
    score: Callable[[Tensor], float]


@idle_threads()
def fit(
    model: Model,
    loss: Loss,
    optimizer: torch.optim.Optimizer,
    table: FeatureTable,
    train_rows: Tensor,
    *,
    epochs: int,
    batch_size: int,
    generator: torch.Generator,
    schedule: LRScheduler | None = None,
    validation: Validation | None = None,
    patience: int = 0,
    ema: EMA | None = None,
    clip_norm: float = 0.0,
    sample_weights: Tensor | None = None,
    modality_dropout: float = 0.0,
    accumulate: int = 1,
    mixed_precision: bool = False,
    on_epoch: Callable[[Epoch], None] = lambda epoch: None,
) -> History:
    """Train until ``epochs``, or ``patience`` epochs without a better validation; leaves the best weights in the model.

    Without validation, or with ``patience`` 0, the last epoch's weights stay; with ``ema`` its averaged ones. Modules
    whose parameters are all frozen are left in evaluation mode. ``sample_weights`` (n,) are the rows' chances to be
    drawn, where they are not all equal. A step's rows pass the model in ``accumulate`` parts, whose gradients add up
    to that of the mean of all; with ``mixed_precision`` in bfloat16, on CUDA. Raises TrainingError if training
    diverges. Ctrl-C ends training at the best epoch so far, if there is one.
    """
    keep_freed_memory()
    history = History()
    best_score: float | None = None
    best_state: dict[str, Tensor] = {}
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    kept = model if ema is None else ema.model
    batches = Batches(table, train_rows, batch_size, generator, sample_weights)
    try:
        for epoch in range(1, epochs + 1):
            threads = adapt_threads()
            _train_mode(model)
            total = torch.zeros((), device=train_rows.device)
            for features, present, targets in batches:  # (B, D_m), (B,), (B, C)
                if modality_dropout:
                    present = drop_modalities(present, modality_dropout, generator)

                def closure(batch: Any = (features, present, targets)) -> Any:
                    for parameter in parameters:
                        parameter.grad = None
                    value = torch.zeros((), device=train_rows.device)
                    for features, present, targets in in_parts(batch, accumulate):
                        with torch.autocast("cuda", torch.bfloat16, enabled=mixed_precision):
                            part = model.objective(features, present, targets, loss)
                        part = part * (len(targets) / len(batch[2]))
                        part.backward()
                        value += part.detach()
                    if clip_norm:
                        nn.utils.clip_grad_norm_(parameters, clip_norm)
                    return value

                value: Any = optimizer.step(closure)
                if schedule:
                    schedule.step()
                if ema:
                    ema.update()
                total.add_(value.detach(), alpha=len(targets))
            mean_loss = total.item() / len(train_rows)
            if not math.isfinite(mean_loss):
                raise TrainingError(f"training diverged in epoch {epoch}: the loss is {mean_loss}; take a lower lr")
            score, val_loss = _validate(kept, loss, table, validation)
            raw_score = _validate(model, loss, table, validation)[0] if ema else None
            better = patience == 0 or epoch == 1 or _is_better(score, best_score)
            history.epochs.append(Epoch(epoch, mean_loss, score, better, val_loss, raw_score, threads))
            if better:
                best_state = {name: x.clone() for name, x in kept.state_dict().items()}
                history.best_epoch, best_score = epoch, score
            on_epoch(history.epochs[-1])
            if patience and epoch - history.best_epoch >= patience:
                break
    except KeyboardInterrupt:
        if not history.best_epoch:
            raise
        history.interrupted = True
    model.load_state_dict(best_state)
    try:
        check_learnt(model, loss, table, train_rows)
    except TrainingError:
        if history.interrupted:  # it was not given the time to learn
            raise KeyboardInterrupt from None
        raise
    return history


def in_parts(batch: Batch, n: int) -> Iterator[Batch]:
    """Yield a batch in n parts, as equal as can be, none of them empty."""
    features, present, targets = batch
    size = -(-len(targets) // n)
    for start in range(0, len(targets), size):
        rows = slice(start, start + size)
        yield {m: x[rows] for m, x in features.items()}, {m: x[rows] for m, x in present.items()}, targets[rows]


def keep_freed_memory() -> None:
    """Have one batch's memory serve the next. By itself glibc gives large pieces back, and takes them anew as zeros.

    That takes a fifth of an MLP's epoch. It holds for the process from here on; other C libraries are left as they are.
    """
    libc: Any = ctypes.CDLL(None) if sys.platform == "linux" else None
    if hasattr(libc, "mallopt"):
        libc.mallopt(MMAP_THRESHOLD, KEPT_BYTES // 4)
        libc.mallopt(TRIM_THRESHOLD, KEPT_BYTES)


def _train_mode(model: nn.Module) -> None:
    model.train()
    for module in model.modules():
        parameters = list(module.parameters())
        if parameters and not any(parameter.requires_grad for parameter in parameters):
            module.eval()


def _validate(
    model: nn.Module,
    loss: Loss,
    table: FeatureTable,
    validation: Validation | None,
) -> tuple[float | None, float | None]:
    if validation is None:
        return None, None
    logits = predict_logits(model, table, validation.rows)  # (n, C)
    val_loss = mean_loss(loss, logits, table, validation.rows)
    return validation.score(logits), val_loss


def _is_better(score: float | None, best: float | None) -> bool:
    """Whether a score beats the best so far; where there is none to tell by (None or NaN), a later epoch does."""
    return score is None or best is None or not score <= best


def check_learnt(model: nn.Module, loss: Loss, table: FeatureTable, rows: Tensor) -> None:
    """Raise TrainingError if a model does far worse on the rows it was trained on (n,) than one that says nothing."""
    rows = spread(rows, CHECKED_ROWS)
    logits = predict_logits(model, table, rows)  # (n, C)
    reached = mean_loss(loss, logits, table, rows)
    blank = mean_loss(loss, logits.new_zeros(()).expand_as(logits), table, rows)
    if reached > DIVERGED * blank:
        raise TrainingError(
            f"training diverged: the loss is {reached:.4g}, where logits of 0 give {blank:.4g}; take a lower lr"
        )
