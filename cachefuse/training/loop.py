"""The training loop: ``fit``."""

import ctypes
import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler

from cachefuse.errors import TrainingError
from cachefuse.fusion.base import Model
from cachefuse.nn.losses import Loss
from cachefuse.threads import adapt_threads, idle_threads
from cachefuse.training.batches import Batch, Batches
from cachefuse.training.feature_table import FeatureTable
from cachefuse.training.inference import CHECKED_ROWS, mean_loss, predict_logits, spread
from cachefuse.training.optim import EMA, LBFGS

KEPT_BYTES = 512 << 20  # freed memory that the process keeps
MMAP_THRESHOLD, TRIM_THRESHOLD = -3, -1  # numbers in malloc.h
DIVERGED = 10.0  # training has diverged if the loss is this many times the loss of logits 0


@dataclass(frozen=True)
class Epoch:
    """The figures of one epoch: the mean training loss and, with validation rows, their score and loss.

    With averaged weights (EMA), ``score`` is measured with them, and ``raw_score`` with the weights before averaging.
    The last digits depend on the number of CPU ``threads``.
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
    """All epochs of a training, the best epoch (its weights are kept), and whether it was interrupted.

    With several stages, or heads trained alone, ``stages`` has the best epoch of each, and ``earlier`` all epochs of
    the stages before the last.
    """

    epochs: list[Epoch] = field(default_factory=list)
    best_epoch: int = 0
    interrupted: bool = False
    stages: dict[str, int] = field(default_factory=dict)
    earlier: dict[str, list[Epoch]] = field(default_factory=dict)

    @classmethod
    def of_stages(cls, histories: dict[str, "History"]) -> "History":
        """Return the history of a training in stages, from histories by stage name, in order; "" has no name."""
        *earlier, last = histories
        return replace(
            histories[last],
            stages={name: history.best_epoch for name, history in histories.items() if name},
            earlier={name: histories[name].epochs for name in earlier},
        )


@dataclass(frozen=True)
class Optimization:
    """How a model's weights change at each step.

    The gradient is clipped to norm ``clip_norm``, 0 for never. A batch is split into ``accumulate`` pieces; their
    gradients add up to the gradient of the batch's mean loss. ``mixed_precision`` means bfloat16 on CUDA. With ``ema``,
    the averaged weights are validated and kept.
    """

    optimizer: torch.optim.Optimizer
    schedule: LRScheduler | None = None
    ema: EMA[Any] | None = None
    clip_norm: float = 0.0
    accumulate: int = 1
    mixed_precision: bool = False


@dataclass(frozen=True)
class Validation:
    """The validation rows (n,), and ``score(logits (n, C))``; a higher score is better.

    The score may overwrite the logits. Training stops after ``patience`` epochs without a better score, and the best
    epoch's weights are kept; with 0 the last epoch's weights are kept. ``by_loss`` takes the validation loss for the
    score: lower is better.
    """

    rows: Tensor
    score: Callable[[Tensor], float]
    patience: int = 0
    by_loss: bool = False


class EpochLoop:
    """The epochs of a training: their numbers, their history, and the weights of the best one.

    It keeps the weights of ``model``. The loop ends after ``patience`` epochs without a better score.
    """

    def __init__(self, model: nn.Module, n_epochs: int, patience: int = 0) -> None:
        self.history = History()
        self._model, self._n_epochs, self._patience = model, n_epochs, patience
        self._number = self._threads = 0
        self._best_score: float | None = None
        self._best_weights: dict[str, Tensor] = {}

    def __iter__(self) -> Iterator[int]:
        """Yield the number of each epoch, from 1. Each epoch uses as many CPU threads as there are idle cores."""
        while self._number < self._n_epochs:
            self._number += 1
            self._threads = adapt_threads()
            yield self._number
            if self._patience and self._number - self.history.best_epoch >= self._patience:
                return

    def check(self, loss: float) -> float:
        """Return an epoch's mean loss. Raises TrainingError if it is not finite."""
        if not math.isfinite(loss):
            raise TrainingError(f"training diverged in epoch {self._number}: the loss is {loss}; use a lower lr")
        return loss

    def end_epoch(
        self,
        loss: float,
        score: float | None = None,
        val_loss: float | None = None,
        raw_score: float | None = None,
        *,
        monitor: float | None,
    ) -> Epoch:
        """Add an epoch to the history, keep its weights if it is the best so far, and return it.

        Higher ``monitor`` is better, and a number is better than NaN. If there is none, the later epoch is better.
        """
        best = monitor is None or self._best_score is None or math.isnan(self._best_score) or monitor > self._best_score
        epoch = Epoch(self._number, loss, score, best, val_loss, raw_score, self._threads)
        self.history.epochs.append(epoch)
        if best:
            self._best_weights = {name: x.clone() for name, x in self._model.state_dict().items()}
            self.history.best_epoch, self._best_score = self._number, monitor
        return epoch

    def restore_best(self, model: nn.Module) -> bool:
        """Load the best epoch's weights into a model; return False if there are none."""
        if self._best_weights:
            model.load_state_dict(self._best_weights)
        return bool(self._best_weights)


@idle_threads()
def fit(
    model: Model,
    loss: Loss,
    batches: Batches,
    optimization: Optimization,
    *,
    epochs: int,
    validation: Validation | None = None,
    on_epoch: Callable[[Epoch], None] = lambda epoch: None,
    keep_interrupted: bool = False,
) -> History:
    """Train for ``epochs``, or until validation stops it early, and leave the best weights in the model.

    Without patience the best weights are the last epoch's. Modules with only frozen parameters stay in evaluation mode.
    With ``keep_interrupted``, Ctrl-C ends training at the best epoch so far. It raises KeyboardInterrupt if no epoch
    has ended, or the model has learnt nothing yet. Raises TrainingError if training diverges.
    """
    keep_freed_memory()
    table, rows = batches.table, batches.rows
    optimizer, schedule, ema = optimization.optimizer, optimization.schedule, optimization.ema
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    kept_model = model if ema is None else ema.model
    patience = validation.patience if validation else 0
    loop = EpochLoop(kept_model, epochs, patience)
    try:
        for _ in loop:
            _train_mode(model)
            total = torch.zeros((), device=rows.device)
            for batch in batches:  # features {name: (B, D_m)}, presence {name: (B,)}, targets (B, C)
                closure: Any = partial(backward, model, parameters, loss, batch, optimization)
                value: Any = optimizer.step(closure)  # L-BFGS calls it several times
                if schedule:
                    schedule.step()
                if ema:
                    ema.update()
                total.add_(value.detach(), alpha=len(batch[2]))
            train_loss = loop.check(total.item() / len(rows))
            score, val_loss = _validate(kept_model, loss, table, validation)
            raw_score = _validate(model, loss, table, validation)[0] if ema else None
            monitor = _monitored(validation, score, val_loss) if patience else None
            on_epoch(loop.end_epoch(train_loss, score, val_loss, raw_score, monitor=monitor))
    except KeyboardInterrupt:
        if not (keep_interrupted and loop.restore_best(model) and _has_learnt(model, loss, table, rows)):
            raise
        loop.history.interrupted = True
        return loop.history
    loop.restore_best(model)
    if isinstance(optimizer, LBFGS):
        optimizer.check_minimum()
    check_learnt(model, loss, table, rows)
    return loop.history


def backward(
    model: Model, parameters: list[nn.Parameter], loss: Loss, batch: Batch, optimization: Optimization
) -> Tensor:
    """Compute the loss of a batch and its gradient; return the loss."""
    for parameter in parameters:
        parameter.grad = None
    n = len(batch[2])
    values: list[Tensor] = []
    for features, present, targets in split_batch(batch, optimization.accumulate):
        with torch.autocast("cuda", torch.bfloat16, enabled=optimization.mixed_precision):
            value = model.objective(features, present, targets, loss)
        value = value * (len(targets) / n)
        value.backward()
        values.append(value.detach())
    if optimization.clip_norm:
        nn.utils.clip_grad_norm_(parameters, optimization.clip_norm)
    return sum(values[1:], start=values[0])


def split_batch(batch: Batch, n: int) -> Iterator[Batch]:
    """Yield a batch in at most n pieces of equal size; the last may be smaller."""
    features, present, targets = batch
    size = -(-len(targets) // n)
    for start in range(0, len(targets), size):
        rows = slice(start, start + size)
        yield {m: x[rows] for m, x in features.items()}, {m: x[rows] for m, x in present.items()}, targets[rows]


def keep_freed_memory() -> None:
    """Make glibc keep freed memory for the next batch. By default it returns large blocks and gets new, zeroed ones.

    That takes a fifth of an MLP's epoch. The change affects the whole process, and only glibc.
    """
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    if libc is not None and hasattr(libc, "mallopt"):
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


def _monitored(validation: Validation | None, score: float | None, val_loss: float | None) -> float | None:
    """Return what decides the best epoch: higher is better."""
    by_loss = validation is not None and validation.by_loss
    return -val_loss if by_loss and val_loss is not None else score


def check_learnt(model: nn.Module, loss: Loss, table: FeatureTable, rows: Tensor) -> None:
    """Raise TrainingError if a model's loss on its training rows (n,) is far above the loss of logits 0."""
    rows = spread(rows, CHECKED_ROWS)
    logits = predict_logits(model, table, rows)  # (n, C)
    trained_loss = mean_loss(loss, logits, table, rows)
    zero_loss = mean_loss(loss, logits.new_zeros(()).expand_as(logits), table, rows)
    if trained_loss > DIVERGED * zero_loss:
        raise TrainingError(
            f"training diverged: the loss is {trained_loss:.4g}, and {zero_loss:.4g} for logits of 0; use a lower lr"
        )


def _has_learnt(model: nn.Module, loss: Loss, table: FeatureTable, rows: Tensor) -> bool:
    try:
        check_learnt(model, loss, table, rows)
    except TrainingError:
        return False
    return True
