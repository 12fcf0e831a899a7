"""The figures of a run on the held-out rows and on each labelled split."""

from collections.abc import Callable

import torch

from cachefuse.runs.run import Member, Run
from cachefuse.training.data import OUT_OF_FOLD, TRAIN, VAL, TrainingData
from cachefuse.training.feature_table import FeatureTable
from cachefuse.training.held_out import Result, figures
from cachefuse.training.inference import CHECKED_ROWS, spread


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
        predictions = run.held_out.predictions(data, run.config)
        results[run.held_out.split] = figures(data, rows, run.held_out.scores, predictions)
    order = {TRAIN: 0, VAL: 1, OUT_OF_FOLD: 1}
    return dict(sorted(results.items(), key=lambda item: order.get(item[0], 2)))
