"""Stage 2: light heads over cached features, from a problem to trained models, and from a store to a run."""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cachefuse.device import own_randomness
from cachefuse.fusion.base import Model
from cachefuse.fusion.model import FusionModel
from cachefuse.metrics.tasks import decide_tasks
from cachefuse.nn.losses import Loss
from cachefuse.training import OPTIMIZERS, SCHEDULES
from cachefuse.training.batches import balanced_sample_weights
from cachefuse.training.build import training_loss, untrained_model
from cachefuse.training.config import TrainConfig
from cachefuse.training.data import OUT_OF_FOLD, TRAIN, VAL, TrainingData, TrainingSet
from cachefuse.training.feature_table import LOAD_ROWS
from cachefuse.training.held_out import HeldOut, choose_for, chooses
from cachefuse.training.inference import CHECKED_ROWS, predict_scores, to_scores
from cachefuse.training.loop import Epoch, History, Validation, fit
from cachefuse.training.optim import EMA
from cachefuse.training.split import Split, make_splits

logger = logging.getLogger(__name__)


def fit_module(
    config: TrainConfig,
    training_set: TrainingSet,
    module: Model,
    loss: Loss,
    parameters: Any,
    *,
    epochs: int,
    **watching: Any,
) -> History:
    """Train a module's parameters, or groups of them, by ``fit``; ``watching`` are its validation and callbacks."""
    module = training_set.reading(module)
    optimizer = OPTIMIZERS[config.optimizer](parameters, lr=config.learning_rate, weight_decay=config.penalty)
    steps = -(-len(training_set.rows) // (config.effective_batch_size or len(training_set.rows)))
    return fit(
        module,
        loss,
        optimizer,
        training_set.table,
        training_set.rows,
        epochs=epochs,
        batch_size=config.effective_batch_size,
        generator=torch.Generator().manual_seed(config.seed),
        schedule=SCHEDULES[str(config.schedule)](optimizer, config.n_epochs * steps),
        ema=EMA(module, config.ema) if config.ema else None,
        clip_norm=config.clip_norm,
        sample_weights=balanced_sample_weights(training_set.targets) if config.sampler == "balanced" else None,
        modality_dropout=config.modality_dropout,
        accumulate=config.accumulate,
        mixed_precision=config.mixed_precision and training_set.table.targets.device.type == "cuda",
        **watching,
    )


def fit_stages(
    config: TrainConfig, fusion: Any, training_set: TrainingSet, train: Callable[[str, Model, TrainingSet], History]
) -> History:
    """Train a fusion stage by stage, each from the weights that were best in the one before; mostly there is one."""
    histories: dict[str, History] = {}
    for name, module, own in _stages(config, fusion, training_set):
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


def _stages(config: TrainConfig, fusion: Any, training_set: TrainingSet) -> Iterator[tuple[str, Model, TrainingSet]]:
    """Yield each stage with its name, what it trains, all else being frozen, and on what.

    The scheme "staged" trains each head alone, on the rows that have what it reads, and then, as "", what joins them.
    """
    for stage in config.stages:
        fusion.requires_grad_(False)
        for parameter in fusion.trained_in(stage):
            parameter.requires_grad_(True)
        yield stage, fusion, training_set
    if config.scheme == "staged":
        for name, head in fusion.unimodal_heads().items():
            yield name, head, training_set.only(head.widths)
            head.requires_grad_(False)
    if not config.stages:
        yield "", fusion, training_set


MEMBER_STRIDE = 1000  # between the seeds of members, so that runs of neighbouring seeds share none


@dataclass(frozen=True)
class Progress:
    """Where a training stands: which of its models, at what stage, of how many epochs; and the epoch just done."""

    model: int
    n_models: int
    stage: str
    n_epochs: int
    epoch: Epoch


@dataclass
class Trained:
    """Models with their settings and fold, those histories that ``held_out`` is of, thresholds (C,)."""

    members: list[tuple[TrainConfig, FusionModel, int | None]]
    histories: list[History]
    held_out: HeldOut | None
    thresholds: np.ndarray


def train_models(
    data: TrainingData, config: TrainConfig, on_progress: Callable[[Progress], None] = lambda progress: None
) -> Trained:
    """Train what the settings ask for: a model for each part (one, or one a fold) and seed; then refit, if asked to.

    Raises ConfigError, DataError or TrainingError as ``train_head`` does.
    """
    config = data.resolve(config)
    parts = make_splits(data, config)
    chooses(data, config, sum(len(part.held_out) for part in parts))  # before hours of training, not after
    _warn_of_rare_classes(data, parts)
    seeds = [config.with_seed(config.seed + MEMBER_STRIDE * i) for i in range(config.members)]
    n_models = (len(parts) + config.refit) * len(seeds)
    members: list[tuple[TrainConfig, FusionModel, int | None]] = []
    histories, scores = [], []
    for fold, part in enumerate(parts):
        mean = np.zeros((len(part.held_out), len(data.classes)), np.float32)
        for own in seeds:
            tell = partial(_tell, on_progress, len(members) + 1, n_models, lambda stage: config.n_epochs)
            model, history = train_model(data, own, part, on_epoch=tell)
            if history.interrupted and n_models > 1:
                raise KeyboardInterrupt
            members.append((own, model, fold if config.folds else None))
            histories.append(history)
            table = data.table.only(model.widths)
            mean += predict_scores(model, table, part.held_out, own.resolve_loss(data.task), data.tasks)
        mean /= len(seeds)
        scores.append(mean)
    held_out = HeldOut.join(OUT_OF_FOLD if config.folds else VAL, data, [part.held_out for part in parts], scores)
    thresholds = choose_for(data, config, held_out)
    if config.refit:
        best = _mean_best_epochs(histories)
        everything = Split(data.rows(TRAIN, VAL), *[torch.empty(0, dtype=torch.int64)] * 2)
        done, members = len(members), []
        for own in seeds:
            tell = partial(_tell, on_progress, done + len(members) + 1, n_models, best.__getitem__)
            model, history = train_model(data, own, everything, epochs=best, on_epoch=tell)
            if history.interrupted:
                raise KeyboardInterrupt
            members.append((own, model, None))
    return Trained(members, histories, held_out, thresholds)


@own_randomness()
def train_model(
    data: TrainingData,
    config: TrainConfig,
    part: Split,
    *,
    epochs: Mapping[str, int] | None = None,
    on_epoch: Callable[[str, Epoch], None] = lambda stage, epoch: None,
) -> tuple[FusionModel, History]:
    """Train one model on a part's rows. ``epochs`` ends each stage at that one, for good, with the schedule of all.

    The stages are named as in the settings, or as the heads that are trained alone, and "" is the whole.
    """
    model = untrained_model(data, config)
    training_set = TrainingSet.prepare(data, model, part.train)
    loss = training_loss(data, config, training_set)

    def train(stage: str, module: Any, training_set: TrainingSet) -> History:
        validate = part.validate.to(data.device)
        validate = validate if module is model.fusion else validate[training_set.table.any_present(validate)]
        score = partial(score_of, data, validate, config.monitor or data.metric, config.resolve_loss(data.task))
        return fit_module(
            config,
            training_set,
            module,
            loss,
            [parameter for parameter in module.parameters() if parameter.requires_grad],
            epochs=epochs[stage] if epochs else config.n_epochs,
            validation=Validation(validate, score) if len(validate) else None,
            patience=0 if epochs else config.patience,
            on_epoch=partial(on_epoch, stage),
        )

    return model, fit_stages(config, model.fusion, training_set, train)


@torch.inference_mode()
def score_of(data: TrainingData, rows: Tensor, metric: str, loss: str, logits: Tensor) -> float:
    """Return a metric of some rows (n,), decided on at 0.5; their scores take the place of the logits (n, C)."""
    for part in logits.split(LOAD_ROWS):
        part.copy_(to_scores(part, loss, data.tasks))
    scores = logits.numpy()
    return data.bind([metric])[metric](data.targets(rows), scores, decide_tasks(scores, data.tasks))


def _mean_best_epochs(histories: Sequence[History]) -> dict[str, int]:
    """Return the mean of the models' best epochs in each stage, by its name."""
    best = [{"": history.best_epoch, **history.stages} for history in histories]
    return {stage: round(float(np.mean([own[stage] for own in best]))) for stage in best[0]}


def _tell(
    on_progress: Callable[[Progress], None],
    model: int,
    n_models: int,
    n_epochs: Callable[[str], int],
    stage: str,
    epoch: Epoch,
) -> None:
    on_progress(Progress(model, n_models, stage, n_epochs(stage), epoch))


def _warn_of_rare_classes(data: TrainingData, parts: Sequence[Split]) -> None:
    positives = np.min([_positives(data, part.train) for part in parts], axis=0)
    absent = [name for name, n in zip(data.classes, positives, strict=True) if n == 0]
    if absent:
        where = "the training rows" if len(parts) == 1 else "the training rows of some fold"
        more = f" and {len(absent) - 1} more" if len(absent) > 1 else ""
        logger.warning("class %r%s never occurs in %s, so nothing can be learnt of it there", absent[0], more, where)


def _positives(data: TrainingData, rows: Tensor) -> np.ndarray:
    """Return how many of some rows (n,) have each class, (C,)."""
    return np.sum([(data.targets(part) > 0).sum(axis=0) for part in rows.split(CHECKED_ROWS)], axis=0)
