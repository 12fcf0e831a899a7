"""Train an alignment on a store's features, and evaluate an alignment on any store."""

import time
from collections.abc import Callable, Sequence

import numpy as np
import torch

from cachefuse.alignment.config import AlignConfig
from cachefuse.alignment.data import PairData, fit_statistics, n_batches, open_pairs, pair_data
from cachefuse.alignment.loop import embed_samples, fit
from cachefuse.alignment.model import Aligner
from cachefuse.alignment.ranks import Embedded, best_ranks, chance_at, modality_gap, recall_at
from cachefuse.alignment.run import Alignment, AlignmentSide, Direction, Retrieval, chose_epoch
from cachefuse.data.dataset import dataset_options
from cachefuse.data.splits import ordered_splits
from cachefuse.device import own_randomness, resolve_device, seed_everything
from cachefuse.errors import ConfigError, DataError, RunError
from cachefuse.printable import listed
from cachefuse.runs.run import split_digest
from cachefuse.store.features import Features
from cachefuse.store.store import FeatureStore
from cachefuse.training import OPTIMIZERS, SCHEDULES
from cachefuse.training.data import TRAIN, VAL
from cachefuse.training.loop import History, Optimization
from cachefuse.training.optim import EMA, decay_groups
from cachefuse.training.train import TrainingProgress

KS = (1, 5, 10)
CURVE = (100, 10_000)  # the paper's range of k
CURVE_POINTS = 60


@own_randomness()
def align(
    store: FeatureStore,
    config: AlignConfig,
    *,
    encoders: Sequence[str] = (),
    device: str = "auto",
    on_progress: Callable[[TrainingProgress], None] = lambda progress: None,
) -> Alignment:
    """Align two encoders on a store's ``train`` samples and evaluate them on its other splits; writes nothing.

    ``val``, if there is one, chooses the epoch. Raises ConfigError if there are not two encoders, DataError if there
    are no samples with both sides, CacheError if rows are missing, TrainingError if training diverges.
    """
    begun = time.perf_counter()
    data, features = open_pairs(store, encoders, config.views)
    train, validate = data.of(TRAIN), data.of(VAL)
    if len(train) < 2:
        raise DataError(f"{store.dataset} has {len(train)} usable pairs in its {TRAIN!r} split; align needs at least 2")
    if config.patience and len(validate) < 2:
        raise ConfigError(
            f"{store.dataset} has {len(validate)} usable pairs in its {VAL!r} split; early stopping needs at least 2; "
            f"use --patience 0"
        )
    seed_everything(config.seed)
    model = Aligner([side.width for side in data.sides], config)
    fit_statistics(model, data, train)
    model = model.to(resolve_device(device))
    run = Alignment(
        name=f"{store.dataset}-{config.label}",
        dataset=store.dataset,
        config=config,
        sides=(AlignmentSide.of(features[0], config.views), AlignmentSide.of(features[1], config.views)),
        model=model,
        history=History(),
        split_digest=split_digest(store),
    )
    gaps = {split: _gap(model, data, split) for split in evaluated_splits(data)}
    parameters = decay_groups(model, config.weight_decay, config.decay)
    optimizer = OPTIMIZERS[config.optimizer](parameters, lr=config.lr, weight_decay=config.weight_decay)
    steps = config.epochs * n_batches(len(train), config.batch_size)
    run.history = fit(
        model,
        config,
        data,
        train,
        validate,
        Optimization(
            optimizer, SCHEDULES[config.schedule](optimizer, steps), EMA(model, config.ema) if config.ema else None
        ),
        torch.Generator().manual_seed(config.seed),
        on_epoch=lambda epoch: on_progress(TrainingProgress(1, 1, "", config.epochs, epoch)),
    )
    run.val_chose = chose_epoch(run.history)
    run.results = {split: measure_retrieval(run, data, data.of(split), gaps[split]) for split in gaps}
    run.seconds = time.perf_counter() - begun
    return run


@own_randomness()
def evaluate_alignment(
    run: Alignment, store: FeatureStore, split: str | None = None, *, device: str = "auto"
) -> dict[str, Retrieval]:
    """Evaluate an alignment on a split of any store with its encoders' features, by default on all except ``train``.

    Raises RunError if the store lacks these features or has other ones, DataError if a split has no usable pairs.
    """
    run.model.to(resolve_device(device))
    data = pair_data(store, run_features(run, store), run.config.views)
    splits = [split] if split is not None else evaluated_splits(data) or ordered_splits(data.splits[data.samples])
    for name in splits:
        if len(data.of(name)) < 1:
            known = listed(ordered_splits(data.splits[data.samples]))
            raise DataError(f"{store.dataset} has no usable pairs in split {name!r}; its splits are: {known}")
    seed_everything(run.config.seed)
    untrained = Aligner([side.width for side in run.sides], run.config)
    untrained.standardize.load_state_dict(run.model.standardize.state_dict())
    gaps = {name: _gap(untrained.to(run.model.log_temperature.device), data, name) for name in splits}
    return {name: measure_retrieval(run, data, data.of(name), gaps[name]) for name in splits}


def run_features(run: Alignment, store: FeatureStore) -> tuple[Features, Features]:
    """Return the store's features that an alignment reads. Raises RunError if it lacks them or has other ones."""
    first, second = run.sides
    return find_side(run, first, store), find_side(run, second, store)


def find_side(run: Alignment, side: AlignmentSide, store: FeatureStore) -> Features:
    """Return the store's features for one side of an alignment. Raises RunError if it lacks them or has other ones."""
    features = store.open_features(side.encoder, side.modality)
    if features is None:
        raise RunError(
            f"run {run.name} reads {side.encoder} ({side.modality}), which {store.path} lacks; "
            f"run cachefuse extract {dataset_options(store.dataset)} --encoder {side.source}"
        )
    if features.key != side.key:
        raise RunError(
            f"run {run.name} reads other {side.encoder} ({side.modality}) features than those in {store.path}; "
            f"align again, or use the store that it was trained on"
        )
    return features


def evaluated_splits(data: PairData) -> list[str]:
    """Return the splits with usable pairs except ``train``: val and test first."""
    return [split for split in ordered_splits(data.splits[data.samples]) if split != TRAIN]


def measure_retrieval(run: Alignment, data: PairData, samples: np.ndarray, gap_before: float) -> Retrieval:
    """Return the retrieval figures of some samples (n,), with all their captions."""
    both = embed_samples(run.model, data, samples)
    first, second = run.side_names
    return Retrieval(
        n_samples=len(samples),
        directions={
            f"{first} to {second}": direction(*both),
            f"{second} to {first}": direction(*both[::-1]),
        },
        gap_before=gap_before,
        gap_after=modality_gap(both[0].vectors, both[1].vectors),
    )


def direction(queries: Embedded, gallery: Embedded) -> Direction:
    """Return the figures of queries that search the gallery for items of their own sample."""
    ranks, n_gallery = best_ranks(queries, gallery), len(gallery.owners)
    low, high = CURVE[0], min(CURVE[1], n_gallery)
    ks = np.unique(np.geomspace(low, high, CURVE_POINTS).round().astype(int)) if high > low else np.array([n_gallery])
    return Direction(
        n_queries=len(ranks),
        n_gallery=n_gallery,
        recall={k: recall_at(ranks, k) for k in KS},
        chance={k: chance_at(k, queries, gallery) for k in KS},
        median_rank=float(np.median(ranks)),
        curve=tuple((int(k), recall_at(ranks, int(k))) for k in ks),
    )


def _gap(model: Aligner, data: PairData, split: str) -> float:
    both = embed_samples(model, data, data.of(split))
    return modality_gap(both[0].vectors, both[1].vectors)
