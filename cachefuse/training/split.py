"""Which rows to train on, to validate on and to measure on."""

from dataclasses import dataclass

from torch import Tensor

from cachefuse.errors import ConfigError
from cachefuse.training.config import TrainConfig
from cachefuse.training.data import TRAIN, VAL, Problem

STOP_PARTS = 10  # with folds, one in so many of the rows to train on says when to stop


@dataclass(frozen=True)
class Part:
    """Rows to train on, to validate on while training, and to measure on: (n,) int64 each."""

    train: Tensor
    validate: Tensor
    held: Tensor


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
