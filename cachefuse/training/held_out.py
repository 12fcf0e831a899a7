"""How good models are: on rows held out, with thresholds chosen on others, and on the splits they were not made for."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from cachefuse.errors import ConfigError
from cachefuse.metrics import METRICS, TaskSlice, decide_tasks, per_task_class
from cachefuse.metrics.thresholds import HALF, THRESHOLD_METRICS, choose_thresholds, crossfit_decisions
from cachefuse.training.config import TrainConfig
from cachefuse.training.data import Problem

if TYPE_CHECKING:
    pass


CROSSFIT_PARTS = 5  # of a validation split: each is decided on by thresholds chosen on the others


@dataclass(frozen=True)
class HeldOut:
    """What models said of rows (n,) that they had not seen: scores (n, C) float32.

    ``split`` is "val", or "oof" for all of train and val, out of fold. ``parts`` (n,) int64 divides the rows: each part
    is decided on by thresholds chosen on the others, so that no figure sees the rows that chose its thresholds.
    """

    split: str
    rows: np.ndarray
    parts: np.ndarray
    scores: np.ndarray

    @classmethod
    def join(cls, split: str, problem: Problem, rows: list[Tensor], scores: list[np.ndarray]) -> "HeldOut | None":
        """Put the parts' rows and scores together, in the table's order; None if there are no rows."""
        numbers = [part.numpy() for part in rows]
        all_rows = np.concatenate(numbers)
        if not len(all_rows):
            return None
        if len(rows) > 1:
            parts = np.repeat(np.arange(len(rows)), [len(part) for part in numbers])
        elif len(all_rows) < 2 or all(task.one_label for task in problem.tasks):
            parts = np.zeros(len(all_rows), np.int64)  # there are no thresholds to choose
        else:
            parts = problem.folds(rows[0], min(CROSSFIT_PARTS, problem.n_groups(rows[0])), 0).numpy()
        order = np.argsort(all_rows, kind="stable")
        places = np.split(order.argsort(), np.cumsum([len(part) for part in numbers])[:-1])
        all_scores = np.empty((len(all_rows), len(problem.classes)), np.float32)
        for place, values in zip(places, scores, strict=True):
            all_scores[place] = values
        return cls(split, all_rows[order], parts[order], all_scores)

    def predictions(self, problem: Problem, config: TrainConfig, scores: np.ndarray | None = None) -> np.ndarray:
        """Return the labels (n, C) bool that are decided on, each part by what was chosen on the others.

        ``scores`` (n, C) of the same rows may take the place of its own once the thresholds are chosen.
        """
        scores = self.scores if scores is None else scores
        predictions = decide_tasks(scores, problem.tasks)
        if not chooses(problem, config, len(self.rows)):
            return predictions
        targets, per = problem.targets(torch.from_numpy(self.rows)), config.thresholds == "class"
        for task in problem.tasks:
            rows = np.flatnonzero(task.labelled(targets))  # no figure is of the others
            if task.kind == "multilabel" and len(np.unique(self.parts[rows])) > 1:
                metric, own = _threshold_metric(problem, config, task), np.ix_(rows, task.numbers)
                predictions[own] = crossfit_decisions(
                    targets[own], self.scores[own], self.parts[rows], metric, per, task.min_labels, scores[own]
                )
        return predictions


@dataclass(frozen=True)
class Result:
    """Figures of one split: metrics by name, and those of each class, (C,) by name; ``n_rows`` were measured."""

    n_rows: int
    metrics: dict[str, float]
    per_class: dict[str, list[float]]


def chooses(problem: Problem, config: TrainConfig, n_held: int) -> bool:
    """Whether thresholds are chosen, on so many rows. Raises ConfigError if they were asked for and can't be."""
    if not any(task.kind == "multilabel" for task in problem.tasks):
        if config.thresholds in ("global", "class"):
            raise ConfigError(
                "thresholds are for multi-label tasks; where a row gets one label, the highest score decides"
            )
        return False
    if n_held >= 2 or config.thresholds in ("none", "auto"):
        return n_held >= 2 and config.thresholds != "none"
    raise ConfigError(
        f"{problem.name} has {n_held} labelled validation rows, too few to choose thresholds on; take --folds 5, or "
        f"--thresholds none"
    )


def choose_for(problem: Problem, config: TrainConfig, held: HeldOut | None) -> np.ndarray:
    """Return the thresholds (C,) to predict with: chosen on all rows held out that have a task's label, or 0.5."""
    thresholds = np.full(len(problem.classes), HALF)
    if held is None or not chooses(problem, config, len(held.rows)):
        return thresholds
    targets, per = problem.targets(torch.from_numpy(held.rows)), config.thresholds == "class"
    for task in problem.tasks:
        own_targets, scores = task.own(targets, held.scores)
        if task.kind == "multilabel" and len(own_targets) >= 2:
            metric = _threshold_metric(problem, config, task)
            thresholds[task.columns] = choose_thresholds(own_targets, scores, metric, per, task.min_labels)
    return thresholds


def figures(problem: Problem, rows: Tensor, scores: np.ndarray, predictions: np.ndarray) -> Result:
    """Return the dataset's metrics, and each class's figures, of scores and predictions (n, C) for some rows."""
    decided = problem.targets(rows), scores, predictions
    by_class: dict[str, Any] = per_task_class(*decided, problem.tasks)
    return Result(
        n_rows=len(rows),
        metrics={str(name): METRICS[name](*decided) for name in problem.metrics},
        per_class={name: values.tolist() for name, values in by_class.items()},
    )


def _threshold_metric(problem: Problem, config: TrainConfig, task: TaskSlice) -> str:
    """Return the metric to choose thresholds for: the one asked for, or the task's first that is one of F1."""
    names = {task.named(name): name for name in THRESHOLD_METRICS}
    listed = [names[name] for name in problem.metrics if name in names]
    return config.threshold_metric or next(iter(listed), next(iter(THRESHOLD_METRICS)))
