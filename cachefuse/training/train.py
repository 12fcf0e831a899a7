"""Stage 2: train models on training data, one per split and seed."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from cachefuse.device import own_randomness
from cachefuse.fusion.model import FusionModel
from cachefuse.metrics.calibrators import Calibration
from cachefuse.training import DECAY_ALL, LBFGS
from cachefuse.training.build import Stage, build_stage, build_training, build_validation, training_stages
from cachefuse.training.config import TrainConfig
from cachefuse.training.data import OUT_OF_FOLD, VAL, TrainingData
from cachefuse.training.held_out import HeldOut, final_decision
from cachefuse.training.inference import predict_scores
from cachefuse.training.loop import Epoch, History, fit
from cachefuse.training.optim import float64
from cachefuse.training.resolved import ResolvedConfig
from cachefuse.training.solve import solve_model
from cachefuse.training.split import Split, make_splits, split_of_all, warn_of_rare_classes

MEMBER_STRIDE = 1000  # between the seeds of members: runs with seeds 0 and 1 must share no member


@dataclass(frozen=True)
class TrainingProgress:
    """The progress of a training: its model, stage and number of epochs, and the last epoch."""

    model: int
    n_models: int
    stage: str
    n_epochs: int
    epoch: Epoch


@dataclass(frozen=True)
class TrainedModel:
    """A model with its settings, and the fold that it has not seen; None without folds."""

    config: ResolvedConfig
    model: FusionModel
    fold: int | None


@dataclass(frozen=True)
class TrainedModels:
    """Models to average, scores of rows held out, the histories of the models that scored them, and thresholds (C,).

    ``calibration`` comes before the thresholds, if the settings have one.
    """

    members: list[TrainedModel]
    histories: list[History]
    held_out: HeldOut | None
    thresholds: np.ndarray
    calibration: Calibration | None = None


def train_models(
    data: TrainingData,
    config: ResolvedConfig,
    on_progress: Callable[[TrainingProgress], None] = lambda progress: None,
    *,
    splits: Sequence[Split] | None = None,
    keep_interrupted: bool = False,
) -> TrainedModels:
    """Train a model for each split (one, or one per fold) and seed of resolved settings, then refit if set.

    The splits are those of ``warned_splits`` if they are not given.
    With ``keep_interrupted``, Ctrl-C ends the training of a single model at its best epoch so far. With several models,
    which are useful only together, KeyboardInterrupt is raised. Raises ConfigError, DataError or TrainingError as
    ``train_head`` does.
    """
    splits = warned_splits(data, config) if splits is None else splits
    n_models = config.n_trainings
    members: list[TrainedModel] = []
    histories, scores = [], []
    for fold, split in enumerate(splits):
        mean = np.zeros((len(split.held_out), len(data.classes)), np.float32)
        for i in range(config.members):
            settings = member_settings(config, i)
            model, history = train_model(
                data,
                settings,
                split,
                place=(len(members) + 1, n_models),
                on_progress=on_progress,
                keep_interrupted=keep_interrupted and n_models == 1,
            )
            members.append(TrainedModel(settings.with_sizes(model.fusion), model, fold if config.folds else None))
            histories.append(history)
            table = data.table.only(model.specs)
            mean += predict_scores(model, table, split.held_out, settings.loss, data.tasks)
        scores.append(mean / config.members)
    name = OUT_OF_FOLD if config.folds else VAL
    held_out = HeldOut.join(name, data, [split.held_out for split in splits], scores)
    calibration, thresholds = final_decision(data, config, held_out)
    if config.refit:
        epochs, split = mean_best_epochs(histories), split_of_all(data)
        n_done, members = len(members), []
        for i in range(config.members):
            settings, place = member_settings(config, i), (n_done + i + 1, n_models)
            model, _ = train_model(data, settings, split, epochs=epochs, place=place, on_progress=on_progress)
            members.append(TrainedModel(settings.with_sizes(model.fusion), model, None))
    return TrainedModels(members, histories, held_out, thresholds, calibration)


def warned_splits(data: TrainingData, config: TrainConfig) -> list[Split]:
    """Return ``make_splits``, after a warning of classes that the training rows lack."""
    splits = make_splits(data, config)
    warn_of_rare_classes(data, splits)
    return splits


def member_settings(config: ResolvedConfig, i: int) -> ResolvedConfig:
    """Return the settings of member i; members differ in their seeds."""
    return config.with_seed(config.seed + MEMBER_STRIDE * i)


@own_randomness()
def train_model(
    data: TrainingData,
    config: ResolvedConfig,
    split: Split,
    *,
    epochs: Mapping[str, int] | None = None,
    place: tuple[int, int] = (1, 1),
    on_progress: Callable[[TrainingProgress], None] = lambda progress: None,
    keep_interrupted: bool = False,
) -> tuple[FusionModel, History]:
    """Train one model on a split's rows, stage by stage; each stage starts from the best weights of the one before.

    ``epochs`` by stage name replace the settings' epochs, but the schedule still follows the settings. ``place`` is
    (the model's number, the number of models). With ``keep_interrupted``, Ctrl-C in the last stage ends training at its
    best epoch so far. Raises TrainingError if training diverges.
    """
    model, training_set, loss = build_training(data, config, split.train)
    if config.is_solved:
        history = solve_model(data, config, model, training_set, loss, split)
        on_progress(TrainingProgress(*place, "", 1, history.epochs[0]))
        return model, history
    histories: dict[str, History] = {}
    for stage in training_stages(config, model.fusion, training_set, epochs):
        head_set = None if stage.module is model.fusion else stage.training_set
        # A shift of inputs moves the intercept alone, unless the intercept decays too, or is averaged.
        with float64(model, config.optimizer == LBFGS, centred=config.decay != DECAY_ALL and not config.ema):
            histories[stage.name] = fit(
                *build_stage(config, stage.training_set, stage.module, loss),
                epochs=stage.n_epochs,
                validation=build_validation(data, config, split.validate, head_set),
                on_epoch=partial(_report_epoch, on_progress, place, stage),
                keep_interrupted=keep_interrupted and stage.is_last,
            )
    return model, History.of_stages(histories)


def mean_best_epochs(histories: Sequence[History]) -> dict[str, int]:
    """Return the mean of the models' best epochs, by stage name."""
    best = [{"": history.best_epoch, **history.stages} for history in histories]
    return {stage: round(float(np.mean([epochs[stage] for epochs in best]))) for stage in best[0]}


def _report_epoch(
    on_progress: Callable[[TrainingProgress], None], place: tuple[int, int], stage: Stage, epoch: Epoch
) -> None:
    on_progress(TrainingProgress(*place, stage.name, stage.n_epochs, epoch))
