"""The rows that a report is about: how well the run does on them, and what it says of each."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch

from cachefuse.cache.store import FeatureStore
from cachefuse.errors import RunError
from cachefuse.evaluation import Evaluation, evaluate
from cachefuse.training.problem import Problem
from cachefuse.training.run import Run, split_digest
from cachefuse.training.used import StoreTables

OnProgress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Measured:
    """An evaluation with its rows (n,), their targets and predictions (n, C) bool, and their scores (n, C).

    ``without`` holds the evaluations with one modality taken as absent, or ``why_not`` the reason that there are none.
    """

    evaluation: Evaluation
    rows: np.ndarray
    targets: np.ndarray
    scores: np.ndarray
    predictions: np.ndarray
    without: dict[str, Evaluation] = field(default_factory=dict)
    why_not: str = ""


def measure(run: Run, store: FeatureStore, split: str | None, device: str, on_progress: OnProgress) -> Measured | None:
    """Return what a run says of a labelled split, by default of the rows held out; None if there are none of those.

    Raises as ``evaluate`` does.
    """
    if split is None and run.held is None:
        return None
    measured = partial(evaluate, run, store, split, device=device)
    evaluation = measured(on_progress=partial(on_progress, "intervals"))
    table_of = StoreTables(run, store, device)
    about = run.manifest
    problem = Problem(
        name=store.dataset,
        table=table_of(run.members[0]),
        classes=run.classes,
        task=run.task,
        metrics=about.reported_metrics,
        min_labels=about.min_labels,
    )
    if run.held is not None and run.held.split == evaluation.split and split_digest(store) == run.split_digest:
        rows, scores = torch.from_numpy(run.held.rows), run.held.scores
        predictions = run.held.predictions(problem, run.config)
    else:
        rows = problem.rows(evaluation.split)
        scores = run.scores(table_of, rows)
        predictions = run.decide(scores)
    without: dict[str, Evaluation] = {}
    why_not = f"The run reads only {next(iter(run.features))}: there is nothing to leave out."
    try:
        for modality in run.features if len(run.features) > 1 else ():
            on_progress(f"without {modality}", len(without), len(run.features))
            without[modality] = measured(without=[modality], n_resamples=0)
    except RunError as error:  # models that have seen the rows held out, where other models' scores of them are kept
        why_not = f"This can't be told: {error}."
    targets = problem.targets(rows).astype(bool)
    return Measured(evaluation, rows.numpy(), targets, scores, predictions, without, why_not)
