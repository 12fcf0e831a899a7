"""Build the objects of a training from its settings: features, model, loss, batches, optimizer, validation."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from cachefuse.device import seed_everything
from cachefuse.errors import ConfigError
from cachefuse.feature_spec import FeatureSpec
from cachefuse.fusion import FUSIONS
from cachefuse.fusion.base import Model
from cachefuse.fusion.model import FusionModel
from cachefuse.metrics.tasks import TaskSlice
from cachefuse.nn import HEADS
from cachefuse.nn.losses import Loss, build_loss, class_weights, per_task
from cachefuse.training import LBFGS, OPTIMIZERS, SCHEDULES
from cachefuse.training.batches import Batches, balanced_sample_weights
from cachefuse.training.config import LOSS, TrainConfig
from cachefuse.training.data import TrainingData, TrainingSet
from cachefuse.training.held_out import validation_score
from cachefuse.training.loop import Optimization, Validation
from cachefuse.training.optim import EMA, decay_groups, start_at_zero
from cachefuse.training.resolved import LOSS_OPTIONS, ResolvedConfig
from cachefuse.training.tasks import loss_of


def resolve_for(
    data: TrainingData, config: TrainConfig, max_size_mb: float | None = None
) -> tuple[TrainingData, ResolvedConfig]:
    """Return the settings with every None resolved, and the data with only the features that the model reads.

    Raises ConfigError for settings that do not fit the data, and if all models of the training together exceed
    ``max_size_mb`` (10^6 bytes).
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
        remedies = []
        if config.head != "linear" and not config.is_generative:
            remedies.append("smaller --layers")
        if config.members > 1:
            remedies.append("fewer --members")
        if config.folds and not config.refit:
            remedies.append("--refit, which keeps one model per seed instead of one per fold")
        models = f"{n_models} models" if n_models > 1 else "the model"
        raise ConfigError(
            f"{models} would take {size:.2f} MB, and max-size-mb is {max_size_mb:g}; "
            f"use {', or '.join(remedies) or 'fewer encoders'}"
        )


def build_model(
    config: ResolvedConfig, specs: Mapping[str, FeatureSpec], n_classes: int, tasks: Sequence[TaskSlice] = ()
) -> FusionModel:
    """Build the untrained model of the settings for the features in ``specs``, with ``n_classes`` logits.

    A fusion that has parts per task also gets the names and sizes of the ``tasks``.
    """
    head = partial(HEADS[config.head], **config.head_options())
    fusion, options = FUSIONS[config.fusion], config.own_options()
    named = {task.name: task.n_classes for task in tasks if task.name}
    if named and fusion.per_task:
        options["tasks"] = named
    return FusionModel(fusion(specs, n_classes, head, **options), config.standardize)


def untrained_model(data: TrainingData, config: ResolvedConfig) -> FusionModel:
    """Build the model of the settings, initialised from their seed, on the device of the data."""
    seed_everything(config.seed)
    model = build_model(config, data.specs, len(data.classes), data.tasks)
    model.fusion.initialize()
    if config.optimizer == LBFGS:
        start_at_zero(model)
    return model.to(data.device)


def build_training(data: TrainingData, config: ResolvedConfig, rows: Tensor) -> tuple[FusionModel, TrainingSet, Loss]:
    """Build an untrained model, its training set of rows (n,) of the data, and its loss."""
    model = untrained_model(data, config)
    training_set = TrainingSet.prepare(data, model, rows)
    return model, training_set, training_loss(data, config, training_set)


def training_loss(data: TrainingData, config: ResolvedConfig, training_set: TrainingSet, **options: str) -> Loss:
    """Return the settings' loss with their class weights; ``options`` override the settings' loss options.

    For several tasks it is the mean of the tasks' losses (``loss_of``). Only the settings' loss gets the loss options.
    """
    given = config.loss
    reduction = {name: value for name, value in config.loss_options.items() if name == "reduction"}

    def of_task(task: TaskSlice) -> Loss:
        name, weights = loss_of(task, given), None
        settings = config.loss_options if name == given else {**LOSS_OPTIONS.get(name, {}), **reduction}
        if config.class_weights != "none":
            targets = training_set.targets
            targets = targets[task.labelled(targets), task.columns]
            kind = "multiclass" if name == "ce" else task.kind  # a softmax loss has weights of rows
            weights = class_weights(targets, config.class_weights, kind)
        return build_loss(name, {**settings, **options}, weights)

    if not data.tasks[0].name:
        return of_task(data.tasks[0])
    return per_task([(task.columns, of_task(task)) for task in data.tasks])


@dataclass(frozen=True)
class Stage:
    """A stage of a training: the trained module, its training set, and the maximum number of epochs.

    ``name`` is a stage of the settings, a head that is trained alone, or "" for the whole model.
    """

    name: str
    module: Model
    training_set: TrainingSet
    n_epochs: int
    is_last: bool


def training_stages(
    config: ResolvedConfig, fusion: Any, training_set: TrainingSet, epochs: Mapping[str, int] | None = None
) -> Iterator[Stage]:
    """Yield a training's stages, usually one. During a stage the rest of the fusion is frozen.

    The scheme "staged" trains each head alone, on the rows that have its modality. Its last stage, "", trains the
    layers that join the heads. ``epochs`` by stage name replace the settings' epochs.
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
    parameters: ParamsT | None = None,
) -> tuple[Model, Loss, Batches, Optimization]:
    """Return the arguments of ``fit`` for a module: the module, its loss, batches and optimization.

    The optimizer gets ``parameters``, or groups of them; by default all that are not frozen.
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
    config: ResolvedConfig, module: Model, n_rows: int, parameters: ParamsT | None = None
) -> Optimization:
    """Return the settings' optimizer, schedule and other optimization, for epochs of ``n_rows`` rows.

    ``parameters`` are as in ``build_stage``.
    """
    if parameters is None:
        parameters = decay_groups(module, config.weight_decay, config.decay)
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
    """Return the validation of a model on rows (n,), or None without rows.

    With a ``training_set``, only rows with at least one of its modalities are used.
    """
    rows = rows.to(data.device)
    if training_set is not None:
        rows = rows[training_set.table.any_present(rows)]
    if not len(rows):
        return None
    score = partial(validation_score, data, rows, config.monitored_metric or data.metric, config.loss)
    return Validation(rows, score, config.patience, by_loss=config.monitor == LOSS)
