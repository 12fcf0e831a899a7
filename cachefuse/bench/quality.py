"""`cachefuse bench quality`: cachefuse beside simple scikit-learn pipelines, on the same rows, folds and features."""

import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from sklearn.preprocessing import normalize
from threadpoolctl import threadpool_limits
from torch import Tensor

from cachefuse.bench.base import OnProgress
from cachefuse.bench.simple_pipelines import PIPELINES, Fold, Inputs, Pipeline
from cachefuse.data.dataset import Dataset
from cachefuse.errors import ConfigError
from cachefuse.experiments.auto import auto
from cachefuse.feature_spec import POOLED
from cachefuse.registry import lookup
from cachefuse.runs.run import Run
from cachefuse.runs.train import train_head
from cachefuse.store.store import FeatureStore
from cachefuse.threads import same_threads
from cachefuse.training.config import TrainConfig
from cachefuse.training.data import OUT_OF_FOLD, TRAIN, VAL, TrainingData, open_training_data
from cachefuse.training.held_out import HeldOut
from cachefuse.training.recommended import recommended

METRICS = {
    "multilabel": ("micro_f1", "macro_f1", "samples_f1", "macro_ap"),
    "multiclass": ("accuracy", "macro_f1", "macro_ap"),
}
THRESHOLDS = ("global", "class")  # of a simple pipeline; the kind that is better in the main metric is shown
HIGHEST = "highest"  # for one label per row: the class with the highest score
WORD = re.compile(r"\w\w")


@dataclass(frozen=True)
class QualityRow:
    """The figures of one classifier by metric, and the seconds to train it and to score all rows held out.

    ``thresholds`` is as in ``TrainConfig``, or "highest" if each row gets the class with the highest score.
    """

    name: str
    thresholds: str
    metrics: dict[str, float]
    seconds: float


@dataclass(frozen=True)
class Quality:
    """Figures of classifiers on the same rows, out of fold; ``left_out`` says why others have none, by name."""

    dataset: str
    n_rows: int
    n_classes: int
    folds: int
    metrics: tuple[str, ...]
    rows: list[QualityRow]
    left_out: dict[str, str]

    def best(self, metric: str) -> float:
        """Return the highest figure of a metric."""
        return max((row.metrics[metric] for row in self.rows), default=np.nan)


def default(store: FeatureStore, config: TrainConfig, encoders: Sequence[str], device: str) -> Run:
    """Train what ``cachefuse train-head`` trains by default."""
    given = {"folds": config.folds, "seed": config.seed}
    return train_head(store, recommended(store, given), encoders=encoders, device=device)


def search(store: FeatureStore, config: TrainConfig, encoders: Sequence[str], device: str) -> Run:
    """Train what ``cachefuse auto`` finds in its default time."""
    return auto(store, base=config, encoders=encoders, device=device)


# What cachefuse offers, by name: functions that return a run with held-out rows of ``config.folds`` folds.
OWN: dict[str, Callable[[FeatureStore, TrainConfig, Sequence[str], str], Run]] = {"default": default, "auto": search}


def classifiers(only: Sequence[str], folds: int) -> list[str]:
    """Return the names of the classifiers to measure, by default all.

    Raises UnknownNameError for an unknown one, ConfigError for fewer than 2 folds.
    """
    names = list(dict.fromkeys(only)) or [*OWN, *PIPELINES]
    for name in names:
        lookup({**OWN, **PIPELINES}, name, "classifier")
    if folds < 2:
        raise ConfigError(f"folds must be at least 2. Got {folds} instead")
    return names


@same_threads()
def bench_quality(
    store: FeatureStore,
    dataset: Dataset | None = None,
    *,
    encoders: Sequence[str] = (),
    folds: int = 5,
    seed: int = 0,
    only: Sequence[str] = (),
    device: str = "auto",
    on_progress: OnProgress = lambda what, done, total: None,
) -> Quality:
    """Measure cachefuse's default and simple pipelines on train and val out of fold, in the folds of ``train_head``.

    ``dataset`` has the texts, which a store does not keep; without it, the pipelines that read texts are left out.
    ``encoders`` names the features, by default all; simple pipelines read pooled ones. ``only`` names the classifiers
    to measure, by default all. Thresholds of each fold are chosen on the scores of the other folds.

    Raises UnknownNameError for an unknown classifier, ConfigError for a task other than multi-label and multi-class or
    for fewer than 2 folds, and as ``train_head`` does.
    """
    names = classifiers(only, folds)
    config = TrainConfig(folds=folds, seed=seed)
    data = open_training_data(store, encoders, "cpu", config.reads)
    if data.task not in METRICS:
        raise ConfigError(f"bench quality measures {' and '.join(METRICS)} tasks. {data.name} is {data.task}")
    data.train_rows()  # raises if there are none
    rows = data.rows(TRAIN, VAL)
    parts = data.folds(rows, folds, seed).numpy()
    texts, no_texts = read_texts(store, dataset, rows)
    inputs = Inputs(texts, read_features(store, data, rows))
    left_out = {name: why for name in names if (why := _why_left_out(name, inputs, no_texts))}
    names = [name for name in names if name not in left_out]
    settings: TrainConfig
    total, done, found = sum(1 if name in OWN else folds for name in names), 0, []

    def step(name: str, fold: str = "") -> None:
        nonlocal done
        on_progress(f"{data.name}: {name}{fold}", done, total)
        done += 1

    metrics = tuple(dict.fromkeys((data.metric, *METRICS[data.task])))
    for name in names:
        begun = time.perf_counter()
        if name in OWN:
            step(name)
            run = OWN[name](store, config, encoders, device)
            held_out, settings, kinds = run.held_out, run.config, [run.config.thresholds]
            assert held_out is not None, "folds hold rows out"
            assert np.array_equal(held_out.rows, rows.numpy()), "all are measured on the same rows"
        else:
            scores = out_of_fold(PIPELINES[name], inputs, data, rows, parts, seed, partial(step, name))
            held_out, settings, kinds = HeldOut(OUT_OF_FOLD, rows.numpy(), parts, scores), config, [*THRESHOLDS]
        found.append(_row(name, data, settings, held_out, kinds, metrics, time.perf_counter() - begun))
    return Quality(data.name, len(rows), len(data.classes), folds, metrics, found, left_out)


def out_of_fold(
    pipeline: Pipeline,
    inputs: Inputs,
    data: TrainingData,
    rows: Tensor,
    parts: np.ndarray,
    seed: int,
    on_fold: Callable[[str], None] = lambda fold: None,
) -> np.ndarray:
    """Return scores (n, C) float32 of rows (n,): each fold's by a pipeline that learnt from the other folds.

    ``inputs`` are of these rows, ``parts`` (n,) are their fold numbers.
    """
    targets, one_label = data.learnt(rows), data.tasks[0].one_label
    scores = np.zeros(targets.shape, np.float32)
    numbers = np.unique(parts)
    for k in numbers:
        on_fold(f", fold {k + 1} of {len(numbers)}")
        train, held_out = np.flatnonzero(parts != k), np.flatnonzero(parts == k)
        fold = Fold(inputs.take(train), targets[train], inputs.take(held_out), one_label, seed)
        with threadpool_limits(torch.get_num_threads()):  # threads that wait for a busy core take ten times as long
            scores[held_out] = pipeline.scores(fold)
    return scores


def read_texts(store: FeatureStore, dataset: Dataset | None, rows: Tensor) -> tuple[list[str] | None, str]:
    """Return the text of each of the rows (n,), "" for none, or None and why there are no texts.

    Several texts of a sample are joined.
    """
    if dataset is None:
        return None, "they read texts, which need the raw data"
    columns = [column for column in dataset.modalities.values() if column.is_text]
    numbers = {sample: row for row, sample in enumerate(dataset.ids)}
    ids = [str(sample) for sample in store.ids[rows.numpy()]]
    if unknown := [sample for sample in ids if sample not in numbers]:
        return None, f"the raw data lacks {len(unknown):,} samples of the store, such as {unknown[0]!r}"
    sources = ([x for column in columns for x in column[numbers[sample]]] for sample in ids)
    texts = [" ".join(x for x in of_sample if isinstance(x, str)) for of_sample in sources]
    return (texts, "") if any(map(WORD.search, texts)) else (None, f"{store.dataset} has no texts with words")


def read_features(store: FeatureStore, data: TrainingData, rows: Tensor) -> np.ndarray | None:
    """Return the pooled features of rows (n,) side by side, float32 (n, D); None if there are none.

    Those of each encoder and modality have length 1, and are zeros where a sample lacks the modality.
    """
    found = []
    for modality, group in data.stored.items():
        shared, absent = store.shared_rows(modality), ~store.present(modality)[rows.numpy()]
        numbers = rows if shared is None else torch.from_numpy(shared)[rows]
        for features in group:
            if POOLED in features.views:
                x = features.rows(POOLED).index_select(0, numbers).float().numpy()
                x[absent] = 0
                found.append(normalize(x))
    return np.concatenate(found, axis=1) if found else None


def _why_left_out(name: str, inputs: Inputs, no_texts: str) -> str:
    """Return why a classifier cannot be measured; "" if it can."""
    if name in OWN:
        return ""
    if PIPELINES[name].texts and inputs.texts is None:
        return no_texts
    return "they read pooled features, and the store has none" if inputs.features is None else ""


def _row(
    name: str,
    data: TrainingData,
    config: TrainConfig,
    held_out: HeldOut,
    kinds: Sequence[str],
    metrics: Sequence[str],
    seconds: float,
) -> QualityRow:
    """Return the figures with the kind of thresholds that is the best of ``kinds`` in the main metric."""
    targets, bound = data.targets(torch.from_numpy(held_out.rows)), data.bind(metrics)
    rows = []
    for kind in [HIGHEST] if data.tasks[0].one_label else kinds:
        thresholds = "auto" if kind == HIGHEST else kind
        predictions = held_out.predictions(data, replace(config, thresholds=thresholds))
        figures = {metric: f(targets, held_out.scores, predictions) for metric, f in bound.items()}
        rows.append(QualityRow(name, kind, figures, seconds))
    return max(rows, key=lambda row: row.metrics[data.metric])
