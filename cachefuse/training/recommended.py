"""The settings of a training that names none: the best of what takes seconds ("Defaults" in README.md)."""

import numpy as np

from cachefuse.data.manifest import VQA
from cachefuse.data.targets import is_labelled
from cachefuse.registry import Options
from cachefuse.store.store import FeatureStore
from cachefuse.training.config import TrainConfig
from cachefuse.training.data import TRAIN, VAL, groups_of

FOLDS = 5
MOST_ROWS = 10_000  # comparing each of more rows with all takes minutes, and a network learns as much
# Settings that go with any model.
KEEPS = ("thresholds", "threshold_metric", "calibrate", "folds", "refit", "seed", "duplicates")


def recommended(store: FeatureStore, given: Options | None = None) -> tuple[TrainConfig, ...]:
    """Return the settings of the models to blend for a store, with those that are ``given``.

    They are ``kernel`` and a small network, on five folds, refitted on all rows. If a setting of models or gradients is
    given, for questions with answers, with more than ``MOST_ROWS`` rows, or with fewer than five, the settings are the
    defaults of ``TrainConfig``.
    """
    given = given or {}
    rows = is_labelled(store.targets) & np.isin(store.splits, (TRAIN, VAL))
    groups = groups_of(store)
    n_apart = int(rows.sum()) if groups is None else len(np.unique(groups[rows]))
    if given.keys() - set(KEEPS) or store.manifest.task == VQA or not FOLDS <= n_apart <= MOST_ROWS:
        return (TrainConfig(**given),)
    common = {"folds": FOLDS, "refit": True, **given}
    loss = "ce" if store.manifest.task == "multiclass" else "bce"  # their scores are probabilities, as the kernel's
    return TrainConfig(fusion="kernel", **common), TrainConfig(fusion="sum", loss=loss, **common)
