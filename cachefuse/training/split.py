"""Splitting rows into training, validation and held-out rows."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from cachefuse.errors import ConfigError
from cachefuse.training.config import TrainConfig
from cachefuse.training.data import TRAIN, VAL, TrainingData
from cachefuse.training.held_out import check_calibrates, chooses_thresholds
from cachefuse.training.inference import CHECKED_ROWS

logger = logging.getLogger(__name__)

STOP_PARTS = 10  # with folds, 1 / STOP_PARTS of the training rows is for early stopping


@dataclass(frozen=True)
class Split:
    """Rows to train on, to validate on while training, and to measure on: (n,) int64 each."""

    train: Tensor
    validate: Tensor
    held_out: Tensor


def make_splits(data: TrainingData, config: TrainConfig) -> list[Split]:
    """Return the splits to train on: the dataset's train and val, or one per fold of both joined.

    With folds and patience, a tenth of the training rows is set aside for early stopping: the rows held out must not
    affect it. A warning tells if rows held out are copies of rows to train on. Raises ConfigError if there are too few
    rows for early stopping, thresholds or calibration.
    """
    splits = _fold_splits(data, config) if config.folds else [_dataset_split(data, config)]
    n_held_out = sum(len(split.held_out) for split in splits)
    chooses_thresholds(data, config, n_held_out)  # raise before training, not after
    check_calibrates(data, config, n_held_out)
    _warn_of_copies(data, config, splits)
    return splits


def _dataset_split(data: TrainingData, config: TrainConfig) -> Split:
    train, val = data.train_rows(), data.rows(VAL)
    if config.patience and not len(val):
        raise ConfigError(f"{data.name} has no labelled validation rows for early stopping; use --folds 5")
    return Split(train, val, val)


def _fold_splits(data: TrainingData, config: TrainConfig) -> list[Split]:
    data.train_rows()  # raises if there are none
    rows = data.rows(TRAIN, VAL)
    fold_of = data.folds(rows, config.folds, config.seed)
    splits = []
    for fold in range(config.folds):
        held_out, rest = rows[fold_of == fold], rows[fold_of != fold]
        if config.patience:
            inner = data.folds(rest, min(STOP_PARTS, data.n_groups(rest)), config.seed)
            splits.append(Split(rest[inner != 0], rest[inner == 0], held_out))
        else:
            splits.append(Split(rest, held_out, held_out))
    return splits


def split_of_all(data: TrainingData) -> Split:
    """Return a split that trains on all of train and val, without validation or held-out rows."""
    rows = data.rows(TRAIN, VAL)
    return Split(rows, rows[:0], rows[:0])


def warn_of_rare_classes(data: TrainingData, splits: Sequence[Split]) -> None:
    """Log a warning if the training rows of a split lack a class."""
    positives = np.min([_positives(data, split.train) for split in splits], axis=0)
    absent = [name for name, n in zip(data.classes, positives, strict=True) if n == 0]
    if absent:
        where = "the training rows" if len(splits) == 1 else "the training rows of a fold"
        more = f" and {len(absent) - 1} more" if len(absent) > 1 else ""
        logger.warning("class %r%s never occurs in %s: the model cannot learn it", absent[0], more, where)


def _warn_of_copies(data: TrainingData, config: TrainConfig, splits: Sequence[Split]) -> None:
    """Log a warning if rows held out have the content of rows that their model is trained on."""
    for samples in data.samples:
        n = sum(count_copies(samples.content, split.held_out, split.train) for split in splits)
        if n:
            logger.warning("%s", copies_message(n, sum(len(split.held_out) for split in splits), bool(config.folds)))


def count_copies(content: np.ndarray, rows: Tensor, others: Tensor) -> int:
    """Return how many rows (n,) have the content of any of the others (m,): ``content`` is a store's, (N,)."""
    known = np.zeros(int(content.max(initial=-1)) + 2, bool)
    known[content[others.cpu().numpy()]] = True
    known[-1] = False  # where a row has no content
    return int(known[content[rows.cpu().numpy()]].sum())


def copies_message(n: int, n_rows: int, folds: bool, split: str = VAL) -> str:
    """Return the sentence on ``n`` of ``n_rows`` measured rows that are copies of training rows."""
    if folds:
        return (
            f"{n:,} of {n_rows:,} rows have copies in other folds: figures may be too high; train-head --duplicates "
            f"together keeps them in one fold, and cachefuse inspect --duplicates counts them"
        )
    return (
        f"{n:,} of {n_rows:,} {split} rows are copies of training rows: their figures may be too high; see cachefuse "
        f"inspect --duplicates"
    )


def _positives(data: TrainingData, rows: Tensor) -> np.ndarray:
    """Return the number of rows with each class, (C,), among rows (n,)."""
    counts = [data.learnt(piece).sum(axis=0) for piece in rows.split(CHECKED_ROWS)]
    positives: np.ndarray = np.sum(counts, axis=0)
    return positives
