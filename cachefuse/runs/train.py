"""From a store to a run: open the features, train the models, evaluate them."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np

from cachefuse.errors import ConfigError
from cachefuse.metrics.calibrators import Calibration
from cachefuse.runs.features import record_features
from cachefuse.runs.results import compute_results, held_out_calibration_errors
from cachefuse.runs.run import Member, Run, named, split_digest
from cachefuse.store.store import FeatureStore
from cachefuse.training.blend import blend
from cachefuse.training.build import resolve_for
from cachefuse.training.config import TrainConfig
from cachefuse.training.data import TrainingData, open_training_data
from cachefuse.training.duplicates import keep_together
from cachefuse.training.held_out import HeldOut, final_decision
from cachefuse.training.loop import History
from cachefuse.training.recommended import KEEPS, recommended
from cachefuse.training.resolved import ResolvedConfig
from cachefuse.training.train import TrainedModel, TrainedModels, TrainingProgress, train_models, warned_splits


def train_head(
    store: FeatureStore,
    config: TrainConfig | Sequence[TrainConfig] | None = None,
    *,
    encoders: Sequence[str] = (),
    device: str = "auto",
    max_size_mb: float | None = None,
    on_progress: Callable[[TrainingProgress], None] = lambda progress: None,
) -> Run:
    """Train a head on a store's ``train`` rows and evaluate it on every labelled split; nothing is written.

    With ``config.folds``, ``train`` and ``val`` are joined, and each fold is scored by a model that has not seen it
    ("oof"). Figures on ``train`` are of at most 100,000 evenly spread rows. Ctrl-C ends the training of a single model
    at its best epoch so far, and the run is then ``interrupted``; with several models, KeyboardInterrupt is raised.

    Several settings train a blend: their scores are averaged, with weights chosen on the rows held out. Folds, seed and
    other settings of choosing and measuring must be equal. Without settings, they are those of ``recommended``.

    ``encoders`` names the features to use, by default all in the store. ``max_size_mb`` is the maximum size of the
    model in 10^6 bytes. Raises ConfigError for settings that do not fit the dataset, a model that is too large, or a
    modality that no training row has, DataError without training rows, TrainingError if training diverges.
    """
    configs = recommended(store) if config is None else (config,) if isinstance(config, TrainConfig) else config
    opened = [(open_training_data(store, encoders, device, each.reads), each) for each in configs]
    return train_blend(store, opened, max_size_mb=max_size_mb, on_progress=on_progress)


def train_run(
    store: FeatureStore,
    data: TrainingData,
    config: TrainConfig,
    *,
    max_size_mb: float | None = None,
    on_progress: Callable[[TrainingProgress], None] = lambda progress: None,
) -> Run:
    """Do what ``train_head`` does for one config, with opened data."""
    return train_blend(store, [(data, config)], max_size_mb=max_size_mb, on_progress=on_progress)


def train_blend(
    store: FeatureStore,
    opened: Sequence[tuple[TrainingData, TrainConfig]],
    *,
    max_size_mb: float | None = None,
    on_progress: Callable[[TrainingProgress], None] = lambda progress: None,
) -> Run:
    """Do what ``train_head`` does for one or several configs, each with its opened data."""
    begun = time.perf_counter()
    resolved = _within(opened, max_size_mb)
    data, config = resolved[0]
    _check_shared([config for _, config in resolved])
    data = keep_together(data, config)
    splits = warned_splits(data, config)  # the same for all
    if len(resolved) > 1 and not sum(len(split.held_out) for split in splits):
        raise ConfigError(f"{data.name} has no labelled val rows, on which weights are chosen; use --folds 5")
    n_models = [config.n_trainings for _, config in resolved]
    trained: list[TrainedModels] = []
    for i, (its_data, its_config) in enumerate(resolved):
        place, alone = partial(_placed, on_progress, sum(n_models[:i]), sum(n_models)), len(resolved) == 1
        its_data = replace(its_data, groups=data.groups)
        trained.append(train_models(its_data, its_config, place, splits=splits, keep_interrupted=alone))
    weights, held_out = np.ones(1), trained[0].held_out
    if len(trained) > 1:
        sizes = np.array([sum(member.model.size_mb for member in each.members) for each in trained])
        fits = partial(_fits, sizes, max_size_mb)
        if any(fits(alone) for alone in np.eye(len(trained))):  # else the error comes with the run's size
            weights, held_out = blend(data, [each.held_out for each in trained if each.held_out is not None], fits)
        else:
            weights, held_out = np.eye(len(trained))[sizes.argmin()], trained[sizes.argmin()].held_out
    parts = [
        BlendPart(its_data, its_config, models.members, weight, models.histories)
        for (its_data, its_config), models, weight in zip(resolved, trained, weights.tolist(), strict=True)
    ]
    run = build_run(store, parts, held_out)
    run.seconds = time.perf_counter() - begun
    if max_size_mb is not None and run.size_mb > max_size_mb:
        raise ConfigError(
            f"the models take {run.size_mb:.2f} MB, and max-size-mb is {max_size_mb:g}; use fewer landmarks (--fusion "
            f"kernel --fusion-options landmarks=500), or cachefuse auto --max-size-mb {max_size_mb:g}"
        )
    return run


def _within(
    opened: Sequence[tuple[TrainingData, TrainConfig]], max_size_mb: float | None
) -> list[tuple[TrainingData, ResolvedConfig]]:
    """Resolve the settings of a blend, without those of models that are too large by themselves.

    Raises the error of the last one if all are.
    """
    resolved = [resolve_for(data, config) for data, config in opened]
    if max_size_mb is None:
        return resolved
    found, problem = [], None
    for data, config in opened:
        try:
            found.append(resolve_for(data, config, max_size_mb))
        except ConfigError as error:
            problem = error
    if problem is not None and not found:
        raise problem
    return found


def _fits(sizes: np.ndarray, max_size_mb: float | None, counts: np.ndarray) -> bool:
    return max_size_mb is None or float(sizes[counts > 0].sum()) <= max_size_mb


@dataclass(frozen=True)
class BlendPart:
    """Trained models of one kind, to average with a ``weight`` in all; ``calibration`` comes before the mean."""

    data: TrainingData
    config: ResolvedConfig
    members: Sequence[TrainedModel]
    weight: float
    histories: Sequence[History] = ()
    calibration: Calibration | None = None


def build_run(store: FeatureStore, parts: Sequence[BlendPart], held_out: HeldOut | None, name: str = "") -> Run:
    """Return the run of models, with its figures; parts without a weight are left out. Its seconds are not set.

    ``held_out`` are the joint scores of the rows held out. ``name`` is its name after the dataset's, by default the
    model's, or "blend" of several.
    """
    parts = [part for part in parts if part.weight > 0]
    data, config = parts[0].data, parts[0].config
    calibration, thresholds = final_decision(data, config, held_out)
    members, tables = [], {}
    for part in parts:
        features = record_features(part.data.stored, part.data.specs)
        tables[tuple(features.items())] = part.data.table
        share = part.weight / len(part.members)
        members += [
            Member(member.config, features, member.model, share, member.fold, part.calibration)
            for member in part.members
        ]
    run = Run(
        name=f"{store.dataset}-{name or (named(config) if len(parts) == 1 else 'blend')}",
        dataset=store.dataset,
        manifest=store.manifest,
        classes=data.classes,
        config=config,
        members=members,
        thresholds=thresholds,
        calibration=calibration,
        histories=[history for part in parts for history in part.histories],
        held_out=held_out,
        split_digest=split_digest(store),
    )
    run.results = compute_results(data, run, lambda member: tables[tuple(member.features.items())])
    run.calibration_errors = held_out_calibration_errors(data, run)
    return run


def _check_shared(configs: Sequence[TrainConfig]) -> None:
    """Raise ConfigError if the settings of a blend differ where they must not."""
    for name in (*KEEPS, "patience"):
        if len({getattr(config, name) for config in configs}) > 1:
            raise ConfigError(f"the settings of a blend must have the same {name}")


def _placed(
    on_progress: Callable[[TrainingProgress], None], before: int, n_models: int, progress: TrainingProgress
) -> None:
    """Report a model's progress with its number among the models of a blend."""
    on_progress(replace(progress, model=before + progress.model, n_models=n_models))
