"""From settings to what a training takes: features, model, loss, batches, optimizer, validation."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from cachefuse.device import seed_everything
from cachefuse.errors import ConfigError
from cachefuse.feature_spec import FeatureSpec
from cachefuse.fusion import FUSIONS
from cachefuse.fusion.base import Model
from cachefuse.fusion.model import FusionModel
from cachefuse.metrics.tasks import TaskSlice
from cachefuse.nn import HEADS
from cachefuse.nn.losses import Loss, build_loss, class_weights, per_task
from cachefuse.training import OPTIMIZERS, SCHEDULES
from cachefuse.training.batches import Batches, balanced_sample_weights
from cachefuse.training.config import TrainConfig
from cachefuse.training.data import TrainingData, TrainingSet
from cachefuse.training.held_out import validation_score
from cachefuse.training.loop import Optimization, Validation
from cachefuse.training.optim import EMA
from cachefuse.training.resolved import LOSS_OPTIONS, ResolvedConfig
from cachefuse.training.tasks import loss_of


def resolve_for(
    data: TrainingData, config: TrainConfig, max_size_mb: float | None = None
) -> tuple[TrainingData, ResolvedConfig]:
    """Return the settings with none left open, and the data with the features that their model reads.

    Raises ConfigError for settings that do not fit the data, and if all the models of the training together take more
    than ``max_size_mb`` (10^6 bytes).
    """
    resolved = data.resolve(config)
    with torch.device("meta"):
        model = build_model(resolved, data.specs, len(data.classes), data.tasks)
    if max_size_mb is not None:
        _check_size(model, resolved, max_size_mb)
    return data.only(list(model.specs)).shuffled(resolved), resolved


def _check_size(model: FusionModel, config: ResolvedConfig, max_size_mb: float) -> None:
    if not 0 < max_size_mb < math.inf:
        raise ConfigError(f"max-size-mb must be a number above 0. Got {max_size_mb:g} instead")
    n_models = config.members * (1 if config.refit else max(1, config.folds))
    size = n_models * model.size_mb
    if size > max_size_mb:
        ways = ["smaller --layers"] * (config.head != "linear" and not config.is_generative) + ["fewer --members"] * (
            config.members > 1
        )
        ways += ["--refit, which keeps one model a seed and not one a fold"] * bool(config.folds and not config.refit)
        raise ConfigError(
            f"the model would take {size:.2f} MB{f' ({n_models} of them)' if n_models > 1 else ''}, and max-size-mb is "
            f"{max_size_mb:g}; take {', or '.join(ways) or 'fewer encoders'}"
        )


def build_model(
    config: ResolvedConfig, specs: Mapping[str, FeatureSpec], n_classes: int, tasks: Sequence[TaskSlice] = ()
) -> FusionModel:
    """Build the untrained model that the settings describe, for features that ``specs`` describe by name.

    Its logits are those of ``n_classes``; a fusion that has parts for each of several ``tasks`` is told of them.
    """
    head = partial(HEADS[config.head], **config.head_options())
    fusion, options = FUSIONS[config.fusion], config.own_options()
    named = {task.name: task.n_classes for task in tasks if task.name}
    if named and fusion.per_task:
        options["tasks"] = named
    return FusionModel(fusion(specs, n_classes, head, **options))


def untrained_model(data: TrainingData, config: ResolvedConfig) -> FusionModel:
    """Build the model that the settings describe, from their seed, on the device of the data."""
    seed_everything(config.seed)
    model = build_model(config, data.specs, len(data.classes), data.tasks)
    model.fusion.initialize()
    return model.to(data.device)


def build_training(data: TrainingData, config: ResolvedConfig, rows: Tensor) -> tuple[FusionModel, TrainingSet, Loss]:
    """Build an untrained model, what it is trained on, which is some rows (n,) of the data, and its loss."""
    model = untrained_model(data, config)
    training_set = TrainingSet.prepare(data, model, rows)
    return model, training_set, training_loss(data, config, training_set)


def training_loss(data: TrainingData, config: ResolvedConfig, training_set: TrainingSet, **options: str) -> Loss:
    """Return the settings' loss, with the class weights that they ask for, and other ``options`` than theirs.

    Of several tasks it is the mean of each one's own, as ``loss_of`` says; the settings' options are for their loss.
    """
    given = config.loss
    reduction = {name: value for name, value in config.loss_options.items() if name == "reduction"}

    def of_task(task: TaskSlice) -> Loss:
        name, weights = loss_of(task, given), None
        settings = config.loss_options if name == given else {**LOSS_OPTIONS.get(name, {}), **reduction}
        if config.class_weights != "none":
            targets = training_set.targets
            targets = targets[task.labelled(targets), task.columns]
            kind = "multiclass" if name == "ce" else task.kind  # a softmax weighs rows, and not each of their labels
            weights = class_weights(targets, config.class_weights, kind)
        return build_loss(name, {**settings, **options}, weights)

    if not data.tasks[0].name:
        return of_task(data.tasks[0])
    return per_task([(task.columns, of_task(task)) for task in data.tasks])


@dataclass(frozen=True)
class Stage:
    """A stage of a training: the part of the model that it trains, on what, and for how many epochs at most.

    ``name`` is that of the settings' stage, or of the head that is trained alone, or "" for the whole model.
    """

    name: str
    module: Model
    training_set: TrainingSet
    n_epochs: int
    is_last: bool


def training_stages(
    config: ResolvedConfig, fusion: Any, training_set: TrainingSet, epochs: Mapping[str, int] | None = None
) -> Iterator[Stage]:
    """Yield a training's stages, mostly one; while it is trained, all else of the fusion is frozen.

    The scheme "staged" trains each head alone, on the rows that have what it reads, and then, as "", what joins them.
    ``epochs`` says by a stage's name how many it has, where those are not the settings'.
    """

    def stage(name: str, module: Model, training_set: TrainingSet, is_last: bool) -> Stage:
        return Stage(name, module, training_set, epochs[name] if epochs else config.epochs, is_last)

    for name in config.stages:
        fusion.requires_grad_(False)
        for parameter in fusion.trained_in(name):
            parameter.requires_grad_(True)
        yield stage(name, fusion, training_set, name == config.stages[-1])
    if config.scheme == "staged":
        for name, head in fusion.unimodal_heads().items():
            yield stage(name, head, training_set.only(head.specs), False)
            head.requires_grad_(False)
    if not config.stages:
        yield stage("", fusion, training_set, True)
    fusion.requires_grad_(True)


def build_stage(
    config: ResolvedConfig,
    training_set: TrainingSet,
    module: Model,
    loss: Loss,
    parameters: Sequence[Any] | None = None,
) -> tuple[Model, Loss, Batches, Optimization]:
    """Return what ``fit`` takes to train a module: as it reads the training set, its loss, batches and optimization.

    ``parameters``, or groups of them, are what the optimizer changes; by default all that are not frozen.
    """
    table, rows = training_set.table, training_set.rows
    module = training_set.reading(module)
    batches = Batches(
        table,
        rows,
        config.effective_batch_size,
        torch.Generator().manual_seed(config.seed),
        balanced_sample_weights(training_set.targets) if config.sampler == "balanced" else None,
        config.modality_dropout,
    )
    return module, loss, batches, build_optimization(config, module, len(rows), parameters)


def build_optimization(
    config: ResolvedConfig, module: Model, n_rows: int, parameters: Sequence[Any] | None = None
) -> Optimization:
    """Return how the settings change a module's weights, or some ``parameters``, over epochs of so many rows."""
    if parameters is None:
        parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    optimizer = OPTIMIZERS[config.optimizer](parameters, lr=config.lr, weight_decay=config.weight_decay)
    steps = -(-n_rows // (config.effective_batch_size or n_rows))
    return Optimization(
        optimizer,
        SCHEDULES[config.schedule](optimizer, config.epochs * steps),
        ema=EMA(module, config.ema) if config.ema else None,
        clip_norm=config.clip_norm,
        accumulate=config.accumulate,
        mixed_precision=config.mixed_precision and next(module.parameters()).is_cuda,
    )


def build_validation(
    data: TrainingData, config: ResolvedConfig, rows: Tensor, training_set: TrainingSet | None = None
) -> Validation | None:
    """Return how a model is validated on some rows (n,), or None if there are none.

    Of the rows, those count that have any of the modalities of a ``training_set``.
    """
    rows = rows.to(data.device)
    if training_set is not None:
        rows = rows[training_set.table.any_present(rows)]
    if not len(rows):
        return None
    score = partial(validation_score, data, rows, config.monitor or data.metric, config.loss)
    return Validation(rows, score, config.patience)
