"""What the training of one model and of many at once have in common."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from cachefuse.fusion.base import Learner
from cachefuse.fusion.model import FusionModel
from cachefuse.losses import Loss, build_loss, class_weights, per_task
from cachefuse.metrics import TaskSlice
from cachefuse.registry import OPTIMIZERS, SCHEDULES, lookup
from cachefuse.runtime import seed_everything
from cachefuse.training.batches import FeatureTable, balanced_chances
from cachefuse.training.config import LOSS_OPTIONS, TrainConfig
from cachefuse.training.ema import EMA
from cachefuse.training.loop import History, fit
from cachefuse.training.problem import Problem
from cachefuse.training.run import build_model
from cachefuse.training.tasks import loss_of


@dataclass(frozen=True)
class TrainingSet:
    """What models of one part are trained on: rows (n,) of a table.

    The table is standardised already where memory allows; elsewhere ``standardize`` is still to be applied.
    """

    table: FeatureTable
    rows: Tensor
    standardize: nn.ModuleDict | None

    @classmethod
    def prepare(cls, problem: Problem, model: FusionModel, rows: Tensor) -> "TrainingSet":
        """Take the model's statistics from its rows (n,), and bring the table to hand."""
        table, rows = problem.table.only(model.widths), rows.to(problem.device)
        model.fit_statistics(table.features, table.present, rows, table.feature_rows)
        at_hand = table.at_hand(model.standardize)
        return cls(at_hand or table, rows, model.standardize if at_hand is None else None)

    @property
    def targets(self) -> Tensor:
        """The rows' targets (n, C)."""
        return self.table.targets[self.rows]

    def only(self, modalities: Iterable[str]) -> "TrainingSet":
        """Return some of the modalities, and the rows that have any of them."""
        table = self.table.only(modalities)
        here = table.any_present(self.rows)
        return replace(self, table=table, rows=self.rows[here])

    def reading(self, module: Any) -> Learner:
        """Return a fusion, or a head of one, as it takes the table's features."""
        return module if self.standardize is None else FusionModel(module, self.standardize)


def untrained_model(problem: Problem, config: TrainConfig) -> FusionModel:
    """Build the model that the settings describe, from their seed, on the problem's device."""
    seed_everything(config.seed)
    model = build_model(config, problem.widths, len(problem.classes), problem.tasks)
    model.fusion.initialize()
    return model.to(problem.device)


def training_loss(problem: Problem, config: TrainConfig, data: TrainingSet, **options: str) -> Loss:
    """Return the settings' loss, with the class weights that they ask for, and other ``options`` than theirs.

    Of several tasks it is the mean of each one's own, as ``loss_of`` says; the settings' options are for their loss.
    """
    given = config.resolve_loss(problem.task)
    reduction = {name: value for name, value in config.loss_options.items() if name == "reduction"}

    def of_task(task: TaskSlice) -> Loss:
        name, weights = loss_of(task, given), None
        own = config.loss_options if name == given else {**LOSS_OPTIONS.get(name, {}), **reduction}
        if config.class_weights != "none":
            targets = data.targets
            targets = targets[task.labelled(targets), task.columns]
            kind = "multiclass" if name == "ce" else task.kind  # a softmax weighs rows, and not each of their labels
            weights = class_weights(targets, config.class_weights, kind)
        return build_loss(name, {**own, **options}, weights)

    if not problem.tasks[0].name:
        return of_task(problem.tasks[0])
    return per_task([(task.columns, of_task(task)) for task in problem.tasks])


def fit_module(
    config: TrainConfig,
    data: TrainingSet,
    module: Learner,
    loss: Loss,
    parameters: Any,
    *,
    epochs: int,
    **watching: Any,
) -> History:
    """Train a module's parameters, or groups of them, by ``fit``; ``watching`` are its validation and callbacks."""
    module = data.reading(module)
    optimizer = lookup(OPTIMIZERS, config.optimizer, "optimizer")(
        parameters, lr=config.learning_rate, weight_decay=config.penalty
    )
    steps = -(-len(data.rows) // (config.rows_a_step or len(data.rows)))
    return fit(
        module,
        loss,
        optimizer,
        data.table,
        data.rows,
        epochs=epochs,
        batch_size=config.rows_a_step,
        generator=torch.Generator().manual_seed(config.seed),
        schedule=lookup(SCHEDULES, str(config.schedule), "schedule")(optimizer, config.n_epochs * steps),
        ema=EMA(module, config.ema) if config.ema else None,
        clip_norm=config.clip_norm,
        chances=balanced_chances(data.targets) if config.sampler == "balanced" else None,
        modality_dropout=config.modality_dropout,
        accumulate=config.accumulate,
        mixed_precision=config.mixed_precision and data.table.targets.device.type == "cuda",
        **watching,
    )


def fit_stages(
    config: TrainConfig, fusion: Any, data: TrainingSet, train: Callable[[str, Learner, TrainingSet], History]
) -> History:
    """Train a fusion stage by stage, each from the weights that were best in the one before; mostly there is one."""
    histories: dict[str, History] = {}
    for name, module, own in _stages(config, fusion, data):
        histories[name] = train(name, module, own)
        if histories[name].interrupted:
            break
    fusion.requires_grad_(True)
    *earlier, last = histories
    if last != (config.stages or ("",))[-1]:  # interrupted before the last stage
        raise KeyboardInterrupt
    return replace(
        histories[last],
        stages={name: history.best_epoch for name, history in histories.items() if name},
        earlier={name: histories[name].epochs for name in earlier},
    )


def _stages(config: TrainConfig, fusion: Any, data: TrainingSet) -> Iterator[tuple[str, Learner, TrainingSet]]:
    """Yield each stage with its name, what it trains, all else being frozen, and on what.

    The scheme "staged" trains each head alone, on the rows that have what it reads, and then, as "", what joins them.
    """
    for stage in config.stages:
        fusion.requires_grad_(False)
        for parameter in fusion.trained_in(stage):
            parameter.requires_grad_(True)
        yield stage, fusion, data
    if config.scheme == "staged":
        for name, head in fusion.alone().items():
            yield name, head, data.only(head.widths)
            head.requires_grad_(False)
    if not config.stages:
        yield "", fusion, data
