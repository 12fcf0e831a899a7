"""Classification metrics: ``metric(targets, scores, predictions) -> float``; and the step from scores to predictions.

Targets (N, C) are 0 or 1 (one-hot for multi-class), of answers to questions also between: how right each is. Scores
(N, C) are higher for likelier labels, predictions (N, C) are bool. All C classes count, whether or not they occur. What
is not defined for want of positives counts as 0, an average over nothing is NaN. Importing this package imports no
SciPy.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from cachefuse.errors import ConfigError
from cachefuse.metrics.base import RIGHT, Metric, checked, divide
from cachefuse.metrics.calibration import calibration_error, top_calibration_error
from cachefuse.metrics.decisions import (
    TOP,
    accuracy,
    class_counts,
    decide,
    macro_f1,
    micro_f1,
    samples_f1,
    top5_accuracy,
    vqa_accuracy,
    weighted_f1,
)
from cachefuse.metrics.ranking import (
    average_precision,
    class_figures,
    macro_ap,
    micro_ap,
    recall_at_p90,
    recall_at_precision,
)
from cachefuse.metrics.tasks import MeanOf, OfTask, TaskMetric, TaskSlice, decide_tasks
from cachefuse.registry import MEAN, lookup

__all__ = [
    "LOWER_IS_BETTER", "METRICS", "RIGHT", "TaskSlice", "bind_metrics", "bootstrap_intervals", "decide", "decide_tasks",
    "evaluation_metrics", "headline", "main_metric", "per_class", "per_task_class",
]  # fmt: skip

CHUNK = 1 << 23  # numbers in the largest array that a bootstrap makes
MAX_TOGETHER = 64  # resamples


class _Metrics(dict[str, Any]):
    """Metrics by name; the name of one task's metric, which is in no table, knows it itself."""

    def __missing__(self, name: str) -> Any:
        return name.metric if isinstance(name, TaskMetric) else lookup(self, name, "metric")


METRICS: dict[str, Any] = _Metrics(
    {
        "accuracy": Metric(accuracy),
        "calibration_error": Metric(calibration_error),
        "exact_match": Metric(accuracy),  # what it is called in multi-label tasks
        "macro_ap": Metric(macro_ap),
        "macro_f1": Metric(macro_f1),
        "micro_ap": Metric(micro_ap),
        "micro_f1": Metric(micro_f1),
        "recall_at_p90": Metric(recall_at_p90),
        "samples_f1": Metric(samples_f1),
        "top5_accuracy": Metric(top5_accuracy),
        "top_calibration_error": Metric(top_calibration_error),
        "vqa_accuracy": Metric(vqa_accuracy, graded=True),
        "weighted_f1": Metric(weighted_f1),
    }
)
LOWER_IS_BETTER = frozenset({"calibration_error", "top_calibration_error"})

EVALUATION_METRICS = {
    "multiclass": (
        "accuracy", "top5_accuracy", "macro_f1", "weighted_f1", "macro_ap", "micro_ap", "recall_at_p90",
        "top_calibration_error",
    ),
    "multilabel": (
        "micro_f1", "macro_f1", "samples_f1", "weighted_f1", "exact_match", "macro_ap", "micro_ap", "recall_at_p90",
        "calibration_error",
    ),
    "vqa": ("vqa_accuracy", "top5_accuracy", "macro_ap"),
}  # fmt: skip


def main_metric(names: Sequence[str]) -> str:
    """Return the metric to prefer a model by: the first that is higher for a better one."""
    return next((name for name in names if name not in LOWER_IS_BETTER), "accuracy")


def headline(names: Iterable[str]) -> list[str]:
    """Return those of a list of metrics that stand for all of it: of several tasks the mean, and the first of each."""
    first: dict[str, str] = {}
    for name in names:
        first.setdefault(name.rpartition(".")[0] or name, name)
    return list(first.values())


def bind_metrics(names: Sequence[str], tasks: Sequence[TaskSlice]) -> tuple[str, ...]:
    """Return names of metrics that know what they measure: "color.accuracy" that task's, "mean" the tasks' main ones.

    The main metric of a task is the first of the names that is its own. Those of a dataset's only task are as they are.
    Raises UnknownNameError for a task or a metric that is not there.
    """
    named = {task.name: task for task in tasks}
    if "" in named:
        return tuple(names)
    own = {name: [full.removeprefix(f"{name}.") for full in names if full.startswith(f"{name}.")] for name in named}

    def bind(name: str) -> TaskMetric:
        if name == MEAN:
            return TaskMetric(name, MeanOf(tuple(of_task(t, main_metric(own[t])) for t in named)))
        task, _, metric = name.partition(".")
        return TaskMetric(name, of_task(task, metric))

    def of_task(task: str, metric: str) -> OfTask:
        return OfTask(lookup(METRICS, metric, "metric").definition, lookup(named, task, "task"))

    return tuple(bind(name) for name in names)


def evaluation_metrics(task: str, n_classes: int) -> tuple[str, ...]:
    """Return the names of the metrics that an evaluation shows, in order. Raises ConfigError for another task."""
    if task not in EVALUATION_METRICS:
        raise ConfigError(f"task must be one of {', '.join(EVALUATION_METRICS)} to evaluate. Got {task!r} instead.")
    idle = {"top5_accuracy"} if n_classes <= TOP else set()  # it is always 1
    return tuple(name for name in EVALUATION_METRICS[task] if name not in idle)


def per_class(targets: np.ndarray, scores: np.ndarray, predictions: np.ndarray) -> dict[str, np.ndarray]:
    """Return each class's precision, recall, f1, ap, recall_at_p90 and support (its number of positives), all (C,).

    The ap and recall_at_p90 are NaN for a class without positives; all but the support are NaN without samples. Raises
    DataError as the metrics do.
    """
    targets, scores, predictions = checked(targets, scores, predictions)
    once = np.ones((len(targets), 1))
    hits, predicted, positives = (count[:, 0] for count in class_counts(targets, predictions)(once))
    undefined = 0.0 if len(targets) else np.nan
    ap, recall_at_p90 = class_figures([average_precision, recall_at_precision], targets, scores)(once)[..., 0].T
    return {
        "precision": divide(hits, predicted, undefined),
        "recall": divide(hits, positives, undefined),
        "f1": divide(2 * hits, predicted + positives, undefined),
        "ap": ap,
        "recall_at_p90": recall_at_p90,
        "support": targets.sum(axis=0, dtype=np.int64),
    }


def per_task_class(
    targets: np.ndarray, scores: np.ndarray, predictions: np.ndarray, tasks: Sequence[TaskSlice]
) -> dict[str, np.ndarray]:
    """Return what ``per_class`` does, (C,) each: a class's figures are over the rows that have its task's label."""
    found = [per_class(*task.own(targets, scores, predictions)) for task in tasks]
    return {name: np.concatenate([figures[name] for figures in found]) for name in found[0]}


def bootstrap_intervals(
    targets: np.ndarray,
    scores: np.ndarray,
    predictions: np.ndarray,
    names: Sequence[str],
    n_resamples: int = 1000,
    seed: int = 0,
    level: float = 0.95,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, tuple[float, float]]:
    """Return the interval (low, high) of each metric by the percentile bootstrap: N rows drawn with replacement.

    Every metric sees the same resamples, whichever others are asked for. Those in which it is NaN are left out; its
    interval is NaN if none is left, and with fewer than two rows. ``on_progress`` hears of the figures done, of all.

    Repeated rows flatter a ranking: with few positives, recall_at_p90 and, less so, average precision tend to be higher
    on resamples, and the interval may lie above the figure itself.

    Raises UnknownNameError for an unknown metric, ConfigError for a level outside (0, 1) or no resamples, DataError as
    the metrics do.
    """
    metrics: dict[str, Metric | MeanOf] = {name: METRICS[name] for name in names}
    if n_resamples < 1:
        raise ConfigError(f"n_resamples must be at least 1. Got {n_resamples} instead.")
    if not 0 < level < 1:
        raise ConfigError(f"level must lie between 0 and 1. Got {level} instead.")
    n = len(targets)
    if n < 2:
        return dict.fromkeys(metrics, (float("nan"), float("nan")))
    together = min(MAX_TOGETHER, max(1, CHUNK // max(n, int(targets.sum()))))
    intervals = {}
    for i, (name, metric) in enumerate(metrics.items()):
        weighted = metric.weighted(targets, scores, predictions)
        generator = np.random.default_rng(seed)
        figures = np.empty(n_resamples)
        for first in range(0, n_resamples, together):
            part = figures[first : first + together]
            part[:] = weighted(_resamples(n, len(part), generator))
            on_progress(i * n_resamples + first + len(part), len(metrics) * n_resamples)
        defined = figures[~np.isnan(figures)]
        low, high = np.quantile(defined, [(1 - level) / 2, (1 + level) / 2]) if len(defined) else (np.nan, np.nan)
        intervals[name] = float(low), float(high)
    return intervals


def _resamples(n: int, resamples: int, generator: np.random.Generator) -> np.ndarray:
    """Return how often each of n rows is drawn in each of R resamples of n, (n, R) float64."""
    draws = [np.bincount(generator.integers(n, size=n), minlength=n) for _ in range(resamples)]
    return np.stack(draws, axis=1).astype(np.float64)
