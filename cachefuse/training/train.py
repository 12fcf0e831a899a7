"""Stage 2: a light head over cached features, from a store to a run."""

import hashlib
import time
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

from cachefuse.cache.store import FeatureStore
from cachefuse.data.splits import ordered_splits
from cachefuse.errors import DataError
from cachefuse.metrics import METRICS, decide, per_class
from cachefuse.registry import LOSSES, OPTIMIZERS, lookup
from cachefuse.runtime import resolve_device, seed_everything
from cachefuse.training.batches import FeatureTable, load_table, select_features
from cachefuse.training.config import TrainConfig
from cachefuse.training.loop import CHECKED_ROWS, Epoch, fit, predict_logits, spread, to_scores
from cachefuse.training.run import Run, build_model, used_features

TRAIN, VAL = "train", "val"


def train_head(
    store: FeatureStore,
    config: TrainConfig,
    *,
    encoders: Sequence[str] = (),
    device: str = "auto",
    on_epoch: Callable[[Epoch], None] = lambda epoch: None,
) -> Run:
    """Train one head on a store's ``train`` rows and measure it on every labelled split; nothing is written.

    Of ``train`` itself at most 100,000 rows, evenly spread, are measured.

    ``encoders`` name the features to use, by default all that the store has. Early stopping watches the dataset's first
    metric on ``val``, where there are such rows. Raises ConfigError for settings that don't fit the dataset or a
    modality that no training row has, DataError without training rows, TrainingError if training diverges.
    """
    begun = time.perf_counter()
    manifest, classes = store.manifest, store.classes
    loss_name = config.resolve_loss(manifest.task)
    device = resolve_device(device)
    chosen = select_features(store, encoders)
    seed_everything(config.seed)
    model = build_model(
        config, {m: sum(f.views["pooled"].row_shape[0] for f in g) for m, g in chosen.items()}, len(classes)
    )
    chosen = {modality: chosen[modality] for modality in model.widths}
    table = load_table(store, chosen)
    train_rows = _training_rows(store, table)
    model.fit_statistics(table.features, table.present, train_rows)
    model, table = model.to(device), table.to(device)
    score = partial(_score, table=table, loss=loss_name, store=store) if len(table.rows(VAL)) else None
    history = fit(
        model,
        lookup(LOSSES, loss_name, "loss"),
        lookup(OPTIMIZERS, config.optimizer, "optimizer")(
            model.parameters(), lr=config.lr, weight_decay=config.weight_decay
        ),
        table,
        train_rows.to(device),
        score=score,
        epochs=config.epochs,
        batch_size=config.batch_size,
        patience=config.patience,
        generator=torch.Generator().manual_seed(config.seed),
        on_epoch=on_epoch,
    )
    splits = [split for split in ordered_splits(store.splits) if len(table.rows(split))]
    measured = {split: _measure(model, table, split, loss_name, store) for split in splits}
    return Run(
        name=f"{store.dataset}-{config.fusion}-{config.head}-{loss_name}",
        dataset=store.dataset,
        manifest=manifest,
        classes=classes,
        config=config,
        features=used_features(chosen),
        model=model.cpu(),
        history=history,
        rows={split: len(table.rows(split)) for split in measured},
        metrics={split: metrics for split, (metrics, _) in measured.items()},
        per_class={split: figures for split, (_, figures) in measured.items()},
        split_digest=_split_digest(store),
        seconds=time.perf_counter() - begun,
    )


def _training_rows(store: FeatureStore, table: FeatureTable) -> Tensor:
    rows = table.rows(TRAIN)
    if not len(rows):
        have = {split: len(table.rows(split)) for split in ordered_splits(store.splits)}
        labelled = ", ".join(f"{split} has {n:,} labelled rows" for split, n in have.items())
        raise DataError(f"{store.dataset} has no labelled rows in its {TRAIN!r} split ({labelled})")
    return rows


def _decided(
    model: nn.Module, table: FeatureTable, split: str, loss: str, store: FeatureStore
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return targets, scores and predictions of a split, all (n, C); of train, which may be large, of some rows."""
    rows = table.rows(split)
    if split == TRAIN:
        rows = spread(rows, CHECKED_ROWS)
    device = table.targets.device
    scores = to_scores(predict_logits(model, table, rows.to(device)), loss).numpy()
    targets = table.targets[rows.to(device)].cpu().numpy()
    return targets, scores, decide(scores, store.manifest.task, min_labels=store.manifest.min_labels)


def _score(model: nn.Module, *, table: FeatureTable, loss: str, store: FeatureStore) -> float:
    metric = METRICS[store.manifest.reported_metrics[0]]
    return metric(*_decided(model, table, VAL, loss, store))


def _measure(
    model: nn.Module, table: FeatureTable, split: str, loss: str, store: FeatureStore
) -> tuple[dict[str, float], dict[str, list[float]]]:
    decided = _decided(model, table, split, loss, store)
    metrics = {name: METRICS[name](*decided) for name in store.manifest.reported_metrics}
    return metrics, {name: values.tolist() for name, values in per_class(*decided).items()}


def _split_digest(store: FeatureStore) -> str:
    """Hash which id is in which split, so that two runs can tell whether they were measured on the same rows."""
    digest = hashlib.blake2b(digest_size=8)
    for sample, split in zip(store.ids, store.splits, strict=True):
        digest.update(f"{sample}\0{split}\n".encode("utf-8", "surrogatepass"))
    return digest.hexdigest()
