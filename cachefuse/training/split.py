"""Which rows to train on, to validate on and to measure on."""

from dataclasses import dataclass

from torch import Tensor

from cachefuse.errors import ConfigError
from cachefuse.training.config import TrainConfig
from cachefuse.training.data import TRAIN, VAL, TrainingData

STOP_PARTS = 10  # with folds, one in so many of the rows to train on says when to stop


@dataclass(frozen=True)
class Split:
    """Rows to train on, to validate on while training, and to measure on: (n,) int64 each."""

    train: Tensor
    validate: Tensor
    held_out: Tensor


def make_splits(data: TrainingData, config: TrainConfig) -> list[Split]:
    """Return the parts to train on: the dataset's own train and val, or K folds of both together.

    With folds, where an epoch is to be chosen, a tenth of the rows to train on is kept apart for that, so that the part
    measured has no say in it. Raises ConfigError if training is to stop early, and there are no rows to tell when.
    """
    train = data.train_rows()
    if not config.folds:
        val = data.rows(VAL)
        if config.patience and not len(val):
            raise ConfigError(f"{data.name} has no labelled validation rows to stop early on; take --folds 5")
        return [Split(train, val, val)]
    rows = data.rows(TRAIN, VAL)
    fold_of = data.folds(rows, config.folds, config.seed)
    parts = []
    for fold in range(config.folds):
        held_out, rest = rows[fold_of == fold], rows[fold_of != fold]
        if config.patience:
            inner = data.folds(rest, min(STOP_PARTS, data.n_groups(rest)), config.seed)
            parts.append(Split(rest[inner != 0], rest[inner == 0], held_out))
        else:
            parts.append(Split(rest, held_out, held_out))
    return parts
