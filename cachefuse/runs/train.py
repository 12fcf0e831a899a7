"""From a store to a run: open the features, train the models, evaluate them."""

import time
from collections.abc import Callable, Sequence

from cachefuse.runs.features import record_features
from cachefuse.runs.results import compute_results, held_out_calibration_errors
from cachefuse.runs.run import Member, Run, split_digest
from cachefuse.store.store import FeatureStore
from cachefuse.training.build import resolve_for
from cachefuse.training.config import TrainConfig
from cachefuse.training.data import TrainingData, open_training_data
from cachefuse.training.duplicates import keep_together
from cachefuse.training.train import TrainingProgress, train_models


def train_head(
    store: FeatureStore,
    config: TrainConfig,
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

    ``encoders`` names the features to use, by default all in the store. ``max_size_mb`` is the maximum size of the
    model in 10^6 bytes. Raises ConfigError for settings that do not fit the dataset, a model that is too large, or a
    modality that no training row has, DataError without training rows, TrainingError if training diverges.
    """
    data = open_training_data(store, encoders, device, config.reads)
    return train_run(store, data, config, max_size_mb=max_size_mb, on_progress=on_progress)


def train_run(
    store: FeatureStore,
    data: TrainingData,
    config: TrainConfig,
    *,
    max_size_mb: float | None = None,
    on_progress: Callable[[TrainingProgress], None] = lambda progress: None,
) -> Run:
    """Do what ``train_head`` does, with opened data."""
    begun = time.perf_counter()
    data, config = resolve_for(data, config, max_size_mb)
    data = keep_together(data, config)
    trained = train_models(data, config, on_progress, keep_interrupted=True)
    features = record_features(data.stored, data.specs)
    run = Run(
        name=f"{store.dataset}-{config.fusion}-{config.head_name}-{config.loss}",
        dataset=store.dataset,
        manifest=store.manifest,
        classes=data.classes,
        config=config,
        members=[
            Member(member.config, features, member.model, 1 / len(trained.members), member.fold)
            for member in trained.members
        ],
        thresholds=trained.thresholds,
        calibration=trained.calibration,
        histories=trained.histories,
        held_out=trained.held_out,
        split_digest=split_digest(store),
    )
    run.results = compute_results(data, run, lambda member: data.table)
    run.calibration_errors = held_out_calibration_errors(data, run)
    run.seconds = time.perf_counter() - begun
    return run
