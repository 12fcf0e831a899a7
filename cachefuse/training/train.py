"""Stage 2: light heads over cached features, from a problem to trained models, and from a store to a run."""

import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cachefuse.cache.store import FeatureStore
from cachefuse.errors import ConfigError
from cachefuse.fusion.model import FusionModel
from cachefuse.metrics import METRICS, decide_tasks
from cachefuse.runtime import own_randomness
from cachefuse.training.batches import LOAD_ROWS
from cachefuse.training.config import TrainConfig
from cachefuse.training.fitting import TrainingSet, fit_module, fit_stages, training_loss, untrained_model
from cachefuse.training.loop import CHECKED_ROWS, Epoch, History, Validation, predict_scores, to_scores
from cachefuse.training.measure import HeldOut, choose_for, chooses, measure
from cachefuse.training.problem import OUT_OF_FOLD, TRAIN, VAL, Problem, open_problem
from cachefuse.training.run import Member, Run, build_model, split_digest
from cachefuse.training.used import UsedByName, used_features

logger = logging.getLogger(__name__)

MEMBER_STRIDE = 1000  # between the seeds of members, so that runs of neighbouring seeds share none
STOP_PARTS = 10  # with folds, one in so many of the rows to train on says when to stop


@dataclass(frozen=True)
class Part:
    """Rows to train on, to validate on while training, and to measure on: (n,) int64 each."""

    train: Tensor
    validate: Tensor
    held: Tensor


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
    """Models with their settings and fold, the histories of those that ``held`` was measured by, thresholds (C,)."""

    members: list[tuple[TrainConfig, FusionModel, int | None]]
    histories: list[History]
    held: HeldOut | None
    thresholds: np.ndarray


def train_head(
    store: FeatureStore,
    config: TrainConfig,
    *,
    encoders: Sequence[str] = (),
    device: str = "auto",
    max_size_mb: float | None = None,
    on_progress: Callable[[Progress], None] = lambda progress: None,
) -> Run:
    """Train a head on a store's ``train`` rows and measure it on every labelled split; nothing is written.

    With ``config.folds``, ``train`` and ``val`` are taken together, and each part is measured by a model that has not
    seen it ("oof"). Of ``train`` itself at most 100,000 rows, evenly spread, are measured.

    ``encoders`` name the features to use, by default all that the store has. ``max_size_mb`` is the most that the
    model may take, in 10^6 bytes. Raises ConfigError for settings that don't fit the dataset, a model that is too
    large, or a modality that no training row has, DataError without training rows, TrainingError if training diverges.
    """
    problem, chosen = open_problem(store, encoders, device, config.views)
    used = used_features(chosen, problem.widths)
    return train_run(store, problem, used, config, max_size_mb=max_size_mb, on_progress=on_progress)


def train_run(
    store: FeatureStore,
    problem: Problem,
    used: UsedByName,
    config: TrainConfig,
    *,
    max_size_mb: float | None = None,
    on_progress: Callable[[Progress], None] = lambda progress: None,
) -> Run:
    """Do what ``train_head`` does, with a problem that is open already."""
    begun = time.perf_counter()
    config = problem.resolve(config)
    with torch.device("meta"):
        untrained = build_model(config, problem.widths, len(problem.classes), problem.tasks)
    _check_size(untrained, config, max_size_mb)
    problem = problem.only(list(untrained.widths)).shuffled(config)
    trained = train_problem(problem, config, on_progress)
    own = {name: used[name] for name in untrained.widths}
    run = Run(
        name=f"{store.dataset}-{config.fusion}-{config.head_name}-{config.loss}",
        dataset=store.dataset,
        manifest=store.manifest,
        classes=problem.classes,
        config=config,
        members=[
            Member(settings, own, model, 1 / len(trained.members), fold) for settings, model, fold in trained.members
        ],
        thresholds=trained.thresholds,
        histories=trained.histories,
        held=trained.held,
        split_digest=split_digest(store),
    )
    run.results = measure(problem, run, lambda member: problem.table)
    run.seconds = time.perf_counter() - begun
    return run


def train_problem(
    problem: Problem, config: TrainConfig, on_progress: Callable[[Progress], None] = lambda progress: None
) -> Trained:
    """Train what the settings ask for: a model for each part (one, or one a fold) and seed; then refit, if asked to.

    Raises ConfigError, DataError or TrainingError as ``train_head`` does.
    """
    config = problem.resolve(config)
    parts = split_parts(problem, config)
    chooses(problem, config, sum(len(part.held) for part in parts))  # before hours of training, not after
    _warn_of_rare_classes(problem, parts)
    seeds = [config.with_seed(config.seed + MEMBER_STRIDE * i) for i in range(config.members)]
    n_models = (len(parts) + config.refit) * len(seeds)
    members: list[tuple[TrainConfig, FusionModel, int | None]] = []
    histories, scores = [], []
    for fold, part in enumerate(parts):
        mean = np.zeros((len(part.held), len(problem.classes)), np.float32)
        for own in seeds:
            tell = partial(_tell, on_progress, len(members) + 1, n_models, lambda stage: config.n_epochs)
            model, history = train_model(problem, own, part, on_epoch=tell)
            if history.interrupted and n_models > 1:
                raise KeyboardInterrupt
            members.append((own, model, fold if config.folds else None))
            histories.append(history)
            table = problem.table.only(model.widths)
            mean += predict_scores(model, table, part.held, own.resolve_loss(problem.task), problem.tasks)
        mean /= len(seeds)
        scores.append(mean)
    held = HeldOut.join(OUT_OF_FOLD if config.folds else VAL, problem, [part.held for part in parts], scores)
    thresholds = choose_for(problem, config, held)
    if config.refit:
        best = _mean_best_epochs(histories)
        everything = Part(problem.rows(TRAIN, VAL), *[torch.empty(0, dtype=torch.int64)] * 2)
        done, members = len(members), []
        for own in seeds:
            tell = partial(_tell, on_progress, done + len(members) + 1, n_models, best.__getitem__)
            model, history = train_model(problem, own, everything, epochs=best, on_epoch=tell)
            if history.interrupted:
                raise KeyboardInterrupt
            members.append((own, model, None))
    return Trained(members, histories, held, thresholds)


def split_parts(problem: Problem, config: TrainConfig) -> list[Part]:
    """Return the parts to train on: the dataset's own train and val, or K folds of both together.

    With folds, where an epoch is to be chosen, a tenth of the rows to train on is kept apart for that, so that the part
    measured has no say in it. Raises ConfigError if training is to stop early, and there are no rows to tell when.
    """
    train = problem.train_rows()
    if not config.folds:
        val = problem.rows(VAL)
        if config.patience and not len(val):
            raise ConfigError(f"{problem.name} has no labelled validation rows to stop early on; take --folds 5")
        return [Part(train, val, val)]
    rows = problem.rows(TRAIN, VAL)
    fold_of = problem.folds(rows, config.folds, config.seed)
    parts = []
    for fold in range(config.folds):
        held, rest = rows[fold_of == fold], rows[fold_of != fold]
        if config.patience:
            inner = problem.folds(rest, min(STOP_PARTS, problem.n_groups(rest)), config.seed)
            parts.append(Part(rest[inner != 0], rest[inner == 0], held))
        else:
            parts.append(Part(rest, held, held))
    return parts


@own_randomness()
def train_model(
    problem: Problem,
    config: TrainConfig,
    part: Part,
    *,
    epochs: Mapping[str, int] | None = None,
    on_epoch: Callable[[str, Epoch], None] = lambda stage, epoch: None,
) -> tuple[FusionModel, History]:
    """Train one model on a part's rows. ``epochs`` ends each stage at that one, for good, with the schedule of all.

    The stages are named as in the settings, or as the heads that are trained alone, and "" is the whole.
    """
    model = untrained_model(problem, config)
    data = TrainingSet.prepare(problem, model, part.train)
    loss = training_loss(problem, config, data)

    def train(stage: str, module: Any, data: TrainingSet) -> History:
        validate = part.validate.to(problem.device)
        validate = validate if module is model.fusion else validate[data.table.any_present(validate)]
        score = partial(
            score_of, problem, validate, config.monitor or problem.metric, config.resolve_loss(problem.task)
        )
        return fit_module(
            config,
            data,
            module,
            loss,
            [parameter for parameter in module.parameters() if parameter.requires_grad],
            epochs=epochs[stage] if epochs else config.n_epochs,
            validation=Validation(validate, score) if len(validate) else None,
            patience=0 if epochs else config.patience,
            on_epoch=partial(on_epoch, stage),
        )

    return model, fit_stages(config, model.fusion, data, train)


@torch.inference_mode()
def score_of(problem: Problem, rows: Tensor, metric: str, loss: str, logits: Tensor) -> float:
    """Return a metric of some rows (n,), decided on at 0.5; their scores take the place of the logits (n, C)."""
    for part in logits.split(LOAD_ROWS):
        part.copy_(to_scores(part, loss, problem.tasks))
    scores = logits.numpy()
    return METRICS[metric](problem.targets(rows), scores, decide_tasks(scores, problem.tasks))


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


def _warn_of_rare_classes(problem: Problem, parts: Sequence[Part]) -> None:
    positives = np.min([_positives(problem, part.train) for part in parts], axis=0)
    absent = [name for name, n in zip(problem.classes, positives, strict=True) if n == 0]
    if absent:
        where = "the training rows" if len(parts) == 1 else "the training rows of some fold"
        more = f" and {len(absent) - 1} more" if len(absent) > 1 else ""
        logger.warning("class %r%s never occurs in %s, so nothing can be learnt of it there", absent[0], more, where)


def _positives(problem: Problem, rows: Tensor) -> np.ndarray:
    """Return how many of some rows (n,) have each class, (C,)."""
    return np.sum([(problem.targets(part) > 0).sum(axis=0) for part in rows.split(CHECKED_ROWS)], axis=0)


def _check_size(model: FusionModel, config: TrainConfig, max_size_mb: float | None) -> None:
    if max_size_mb is None:
        return
    if not 0 < max_size_mb < math.inf:
        raise ConfigError(f"max-size-mb must be a number above 0. Got {max_size_mb:g} instead")
    n_models = config.members * (1 if config.refit else max(1, config.folds))
    size = n_models * model.size_mb
    if size > max_size_mb:
        ways = ["smaller --layers"] * (config.head != "linear" and not config.writes) + ["fewer --members"] * (
            config.members > 1
        )
        ways += ["--refit, which keeps one model a seed and not one a fold"] * bool(config.folds and not config.refit)
        raise ConfigError(
            f"the model would take {size:.2f} MB{f' ({n_models} of them)' if n_models > 1 else ''}, and max-size-mb is "
            f"{max_size_mb:g}; take {', or '.join(ways) or 'fewer encoders'}"
        )
