"""Figures of each class: precision, recall, F1, average precision."""

from collections.abc import Sequence

import numpy as np

from cachefuse.metrics.base import RIGHT, Weighted, checked, divide
from cachefuse.metrics.decisions import class_counts
from cachefuse.metrics.ranking import average_precision, class_figures, recall_at_precision
from cachefuse.metrics.tasks import TaskSlice


def per_class(targets: np.ndarray, scores: np.ndarray, predictions: np.ndarray) -> dict[str, np.ndarray]:
    """Return each class's precision, recall, f1, ap, recall_at_p90 and support (number of positives), all (C,).

    ap and recall_at_p90 are NaN for a class without positives. Without samples all but the support are NaN. Raises
    DataError as the metrics do.
    """
    targets, scores, predictions = checked(targets, scores, predictions)
    weights = np.ones((len(targets), 1))
    hits, predicted, positives = (count[:, 0] for count in class_counts(targets, predictions)(weights))
    undefined = 0.0 if len(targets) else np.nan
    ap, recall_at_p90 = class_figures([average_precision, recall_at_precision], targets, scores)(weights)[..., 0].T
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
    """Return the figures of ``per_class``, (C,) each. A class counts only rows that have its task's label."""
    by_task = [per_class(*task.own(targets, scores, predictions)) for task in tasks]
    return {name: np.concatenate([figures[name] for figures in by_task]) for name in by_task[0]}


def class_f1(targets: np.ndarray, predictions: np.ndarray, tasks: Sequence[TaskSlice]) -> Weighted:
    """Return a function from weights (N, R) to the F1 of each class, (C, R), over rows that have its task's label."""
    counts = []
    for task in tasks:
        right, chosen = task.own(targets, predictions)
        counts.append((task.labelled(targets), class_counts(right >= RIGHT, chosen.astype(bool))))

    def figures(weights: np.ndarray) -> np.ndarray:
        by_task = [of_task(weights[rows]) for rows, of_task in counts]
        f1 = [divide(2 * hits, predicted + positives, 0.0) for hits, predicted, positives in by_task]
        return np.concatenate(f1)

    return figures
