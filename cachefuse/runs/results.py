"""The figures of a run on the held-out rows and on each labelled split."""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from cachefuse.metrics import CALIBRATION_ERROR
from cachefuse.metrics.thresholds import HALF
from cachefuse.runs.run import Member, Run
from cachefuse.training.data import OUT_OF_FOLD, TRAIN, VAL, TrainingData
from cachefuse.training.feature_table import FeatureTable
from cachefuse.training.held_out import Result, figures
from cachefuse.training.inference import CHECKED_ROWS, spread


def calibration_errors(
    data: TrainingData, rows: Tensor, before: np.ndarray, after: np.ndarray
) -> dict[str, tuple[float, float]]:
    """Return the calibration error of rows' scores (n, C), before and after they are calibrated, of each task."""
    names = [task.named(CALIBRATION_ERROR[task.kind]) for task in data.tasks if task.kind in CALIBRATION_ERROR]
    targets = data.targets(rows)
    return {
        name: (metric(targets, before, before > HALF), metric(targets, after, after > HALF))
        for name, metric in data.bind(names).items()
    }


def held_out_calibration_errors(data: TrainingData, run: Run) -> dict[str, tuple[float, float]]:
    """Return the ``calibration_errors`` of the rows that a run held out; none if it is not calibrated."""
    if run.held_out is None or run.calibration is None:
        return {}
    scores, _ = run.held_out.decided(data, run.config)
    return calibration_errors(data, torch.from_numpy(run.held_out.rows), run.held_out.scores, scores)


def compute_results(data: TrainingData, run: Run, table_of: Callable[[Member], FeatureTable]) -> dict[str, Result]:
    """Return a run's figures on the held-out rows and on the other labelled splits.

    ``train`` is included, with at most 100,000 of its rows, only if the models were trained on it alone.
    """
    results = {}
    trained_on_more = run.config.folds or run.config.refit
    for split in data.splits:
        if split == VAL or (split == TRAIN and trained_on_more):
            continue
        rows = data.rows(split)
        rows = spread(rows, CHECKED_ROWS) if split == TRAIN else rows
        scores = run.scores(table_of, rows)
        results[split] = figures(data, rows, scores, run.decide(scores))
    if run.held_out is not None:
        rows = torch.from_numpy(run.held_out.rows)
        results[run.held_out.split] = figures(data, rows, *run.held_out.decided(data, run.config))
    order = {TRAIN: 0, VAL: 1, OUT_OF_FOLD: 1}
    return dict(sorted(results.items(), key=lambda item: order.get(item[0], 2)))
