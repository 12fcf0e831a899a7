"""Comparison of fusions over the same folds, epochs and steps: scores, paired differences and costs."""

import logging
from collections.abc import Callable, Collection, Sequence
from pathlib import Path

import torch

from cachefuse.errors import CacheError, ConfigError
from cachefuse.experiments.files import read_scores, write_results
from cachefuse.experiments.results import SettingResult, SweepResult
from cachefuse.experiments.sweep import Experiment, held_out_rows, run_sweep, views_of
from cachefuse.experiments.verdict import MARGIN, Comparison, judge
from cachefuse.feature_spec import TOKENS
from cachefuse.files import JsonObject
from cachefuse.fusion import FUSIONS
from cachefuse.store.store import FeatureStore
from cachefuse.training.build import build_model
from cachefuse.training.config import TrainConfig
from cachefuse.training.data import TrainingData, open_training_data
from cachefuse.training.held_out import HeldOut
from cachefuse.training.selection import select_features

logger = logging.getLogger(__name__)

METHODS = ("image", "text", "concat", "sum", "mixed", "tirg", "cma", "midfusion")
FOLDS, EPOCHS, BATCH_SIZE = 5, 10, 64
MAX_TOKENS = 64  # of a modality, for methods over tokens; modalities with more are pooled
POOLED_TO = 16


def compare(
    store: FeatureStore,
    *,
    folder: Path,
    methods: Sequence[str] | None = None,
    folds: int = FOLDS,
    epochs: int = EPOCHS,
    batch_size: int = BATCH_SIZE,
    pool: str | None = None,
    seed: int = 0,
    margin: float = MARGIN,
    encoders: Sequence[str] = (),
    device: str = "auto",
    on_trial: Callable[[SweepResult], None] = lambda result: None,
) -> Comparison:
    """Train each fusion with the same loss, folds, epochs and batch size, and return scores, differences and costs.

    By default these are ``METHODS`` without those that do not fit the store's features; a warning names each of these.
    Other settings are each fusion's defaults. Every row of train and val is scored by a model that has not seen it.
    ``pool`` ("image=mean:16") pools tokens. By default, a modality with more than 64 tokens is pooled to the means of
    16 spans. ``margin`` is the largest loss of the main metric at which a fusion is still enough: see ``judge``.

    Finished trials and their scores are kept in ``folder``: the same call resumes an interrupted one. A trial that an
    older version kept without scores is trained again. Raises CacheError if the store lacks features that the methods
    read, ConfigError for a margin that is not between 0 and 1, and as ``sweep`` does.
    """
    if not 0 < margin < 1:
        raise ConfigError(f"margin must lie between 0 and 1: the largest loss to accept. Got {margin} instead")
    if methods is None:
        methods = fitting_methods(store, encoders)
    if not methods:
        raise ConfigError("compare needs at least one fusion")
    methods = tuple(dict.fromkeys(methods))
    for method in methods:
        FUSIONS.check(method)
    base = TrainConfig(folds=folds, epochs=epochs, batch_size=batch_size, seed=seed)
    reads = views_of(base, [{"fusion": method} for method in methods])
    if pool is None:
        pool = default_pool(store, encoders, reads)
    settings = [{"fusion": method, **_pooled(method, pool)} for method in methods]
    data = open_training_data(store, encoders, device, reads)
    title = f"{store.dataset}: {folds} folds, {epochs} epochs of {batch_size} rows per step"
    title = f"{title}, {pool}" if pool else title
    experiment = Experiment(base, settings, title=title, costs=True, fields=("fusion",), keep_scores=True)
    result = run_sweep(store, data, experiment, folder, [seed], on_trial)
    write_results(result, folder)
    rows = held_out_rows(data, base)

    def scores_of(setting: SettingResult) -> HeldOut:
        kept = read_scores(folder, setting.trials[0], rows.numpy(), len(data.classes))
        if kept is None:
            raise CacheError(f"the scores of {setting.config.fusion} in {folder} are gone; run compare again")
        return kept

    return judge(result, data, rows, scores_of, margin)


def fitting_methods(store: FeatureStore, encoders: Sequence[str]) -> tuple[str, ...]:
    """Return ``METHODS`` without those that cannot be trained on the store's features; a warning names each of these.

    Raises the first one's error if none can.
    """
    opened: dict[tuple[tuple[str, ...], ...], TrainingData] = {}  # by the views that methods read
    problems: dict[str, Exception] = {}
    modalities = sorted({features.modality for features in store.features()})
    for method in METHODS:
        config = TrainConfig(fusion=method)
        views = tuple(config.reads(modality) for modality in modalities)
        try:
            if views not in opened:
                opened[views] = open_training_data(store, encoders, "cpu", config.reads)
            data = opened[views]
            with torch.device("meta"):
                build_model(data.resolve(config), data.specs, len(data.classes), data.tasks)
        except (CacheError, ConfigError) as error:
            problems[method] = error
    if len(problems) == len(METHODS):
        raise problems[METHODS[0]]
    for method, problem in problems.items():
        logger.warning("compare leaves out %s: %s", method, problem)
    return tuple(method for method in METHODS if method not in problems)


def default_pool(store: FeatureStore, encoders: Sequence[str], views: Callable[[str], Collection[str]]) -> str:
    """Return the pooling of modalities with many tokens, such as "image=mean:16"; "" if none has many."""
    chosen = select_features(store, encoders, views)
    many = []
    for modality, group in chosen.items():
        layouts = [
            features.views[TOKENS] for features in group if TOKENS in views(modality) and TOKENS in features.views
        ]
        if layouts and layouts[0].row_shape[0] > MAX_TOKENS and not layouts[0].ragged:
            many.append(f"{modality}=mean:{POOLED_TO}")
    return ",".join(many)


def _pooled(method: str, pool: str) -> JsonObject:
    has_option = "pool" in FUSIONS[method].options()
    return {"fusion_options": {"pool": pool}} if pool and has_option else {}
