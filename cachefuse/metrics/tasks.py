"""Several tasks in one dataset: the columns of each task, and its metrics over the rows that have its label.

Targets (N, C) are 0 or 1; if a row lacks a task's label, all columns of that task are -1.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from cachefuse.metrics import MEAN, METRICS, main_metric
from cachefuse.metrics.base import Metric, Weighted
from cachefuse.metrics.decisions import ONE_LABEL, decide
from cachefuse.registry import lookup

if TYPE_CHECKING:
    from torch import Tensor

Array = TypeVar("Array", np.ndarray, "Tensor")


@dataclass(frozen=True)
class TaskSlice:
    """One task: its kind ("multiclass", "multilabel" or "vqa") and its columns of targets, logits and scores (N, C).

    ``name`` is "" for a dataset's only task. Each row gets at least ``min_labels`` labels.
    """

    name: str
    kind: str
    columns: slice
    min_labels: int = 0

    @property
    def one_label(self) -> bool:
        """Whether a row gets the one label with the highest score, not all labels that reach a threshold."""
        return self.kind in ONE_LABEL

    @property
    def n_classes(self) -> int:
        return int(self.columns.stop - self.columns.start)

    @property
    def numbers(self) -> np.ndarray:
        """The column numbers of this task, (C_k,)."""
        return np.arange(self.columns.start, self.columns.stop)

    def named(self, metric: str) -> str:
        """Return the full name of a metric of this task: "color.accuracy"."""
        return f"{self.name}.{metric}" if self.name else metric

    def own_class(self, name: str) -> str:
        """Return a class's name without the task's: "red" for "color=red"."""
        return name.removeprefix(f"{self.name}=") if self.name else name

    def labelled(self, targets: Array) -> Array:
        """Return which rows have this task's label, (N,) bool; ``targets`` is an array or tensor (N, C)."""
        return targets[:, self.columns.start] >= 0

    def own(self, targets: np.ndarray, *others: np.ndarray) -> tuple[np.ndarray, ...]:
        """Return this task's columns of arrays (N, C), targets first, in the n rows that have its label: (n, C_k)."""
        labelled = self.labelled(targets)
        rows = slice(None) if labelled.all() else labelled  # a slice makes no copy
        return tuple(x[rows, self.columns] for x in (targets, *others))


def decide_tasks(scores: np.ndarray, tasks: Sequence[TaskSlice], thresholds: np.ndarray | None = None) -> np.ndarray:
    """Turn scores (N, C) into predictions (N, C) bool: ``decide`` for each task, by default at 0.5."""
    thresholds = np.full(scores.shape[1], 0.5) if thresholds is None else thresholds
    decided = [decide(scores[:, t.columns], t.kind, thresholds[t.columns], t.min_labels) for t in tasks]
    return np.concatenate(decided, axis=1) if len(decided) > 1 else decided[0]


class _Bound(ABC):
    """A metric of targets (N, C) of several tasks, with the interface of ``Metric``."""

    def __call__(self, targets: np.ndarray, scores: np.ndarray, predictions: np.ndarray) -> float:
        return float(self.weighted(targets, scores, predictions)(np.ones((len(targets), 1)))[0])

    @abstractmethod
    def weighted(self, targets: np.ndarray, scores: np.ndarray, predictions: np.ndarray) -> Weighted:
        """Return a function from weights (N, R) to R figures: see ``Metric``."""


@dataclass(frozen=True)
class OfTask(_Bound):
    """A metric of one task's columns over the rows that have its label; NaN if no row has it."""

    metric: Metric
    task: TaskSlice

    def weighted(self, targets: np.ndarray, scores: np.ndarray, predictions: np.ndarray) -> Weighted:
        rows = self.task.labelled(targets)
        figures = self.metric.weighted(*self.task.own(targets, scores, predictions))

        def of_labelled(weights: np.ndarray) -> np.ndarray:
            task_weights = weights[rows]
            drawn = task_weights.any(axis=0)  # the resamples that have such rows
            values = np.full(weights.shape[1], np.nan)
            values[drawn] = figures(task_weights[:, drawn])
            return values

        return of_labelled


@dataclass(frozen=True)
class MeanOf(_Bound):
    """The mean of several metrics without those that are NaN; NaN if all are."""

    metrics: tuple[OfTask, ...]

    def weighted(self, targets: np.ndarray, scores: np.ndarray, predictions: np.ndarray) -> Weighted:
        functions = [metric.weighted(targets, scores, predictions) for metric in self.metrics]

        def mean(weights: np.ndarray) -> np.ndarray:
            values = np.stack([figures(weights) for figures in functions])  # (K, R)
            defined = np.isfinite(values).sum(axis=0)
            return np.where(defined, np.nansum(values, axis=0) / np.maximum(defined, 1), np.nan)

        return mean


BoundMetric = Metric | OfTask | MeanOf


def bind_metrics(names: Iterable[str], tasks: Sequence[TaskSlice] = ()) -> dict[str, BoundMetric]:
    """Return metrics by name: "color.accuracy" is a task's metric, "mean" the mean of the tasks' main metrics.

    The main metric of a task is its first among ``names``. Names of a dataset's only task have no prefix.
    Raises UnknownNameError for an unknown task or metric.
    """
    names, by_name = list(names), {task.name: task for task in tasks if task.name}
    if not by_name:
        return {name: METRICS[name] for name in names}
    task_metrics = {
        task: [name.removeprefix(f"{task}.") for name in names if name.startswith(f"{task}.")] for task in by_name
    }

    def of_task(task: str, metric: str) -> OfTask:
        return OfTask(METRICS[metric], lookup(by_name, task, "task"))

    def bind(name: str) -> BoundMetric:
        if name == MEAN:
            return MeanOf(tuple(of_task(task, main_metric(task_metrics[task])) for task in by_name))
        task, _, metric = name.partition(".")
        return of_task(task, metric)

    return {name: bind(name) for name in names}
