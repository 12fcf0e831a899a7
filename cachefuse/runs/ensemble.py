"""An ensemble: several runs as one, with the mean of their scores."""

import logging
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from cachefuse.errors import ConfigError, RunError
from cachefuse.metrics.thresholds import HALF
from cachefuse.runs.results import compute_results, held_out_calibration_errors
from cachefuse.runs.run import Run, split_digest
from cachefuse.runs.tables import StoreTables
from cachefuse.store.store import FeatureStore
from cachefuse.training.data import TrainingData
from cachefuse.training.held_out import HeldOut, final_decision

logger = logging.getLogger(__name__)


def ensemble(runs: Sequence[Run], store: FeatureStore, *, thresholds: str | None = None, device: str = "auto") -> Run:
    """Join runs into one that averages their scores with equal weights, and evaluate it; nothing is written.

    The runs may differ in all settings and in their encoders. If all held out the same rows, thresholds are chosen on
    the mean scores of these rows, and evaluated there. Else they are the means of the runs' thresholds, with a warning,
    and only other labelled splits are evaluated. ``thresholds`` is "global", "class", "none" or "auto", by default as
    in the first run. Scores are averaged as they are before calibration; the mean is calibrated as in the first run.

    Raises RunError for fewer than two runs, for a run given twice, if dataset, classes or task differ, or if a run was
    trained on another store; ConfigError for thresholds that cannot be chosen, and for calibrated runs if there
    are no rows that all held out.
    """
    _check_together(runs, store)
    table_of, digest = StoreTables(runs, store, device), split_digest(store)
    members = [
        replace(member, weight=member.weight / sum(other.weight for other in run.members) / len(runs), fold=None)
        for run in runs
        for member in run.members
    ]
    data = TrainingData.of(store, table_of(members[0]))
    first = runs[0].config
    config = replace(
        first,
        thresholds=thresholds or first.thresholds,
        folds=max(run.config.folds for run in runs),  # folds and refit show which rows the models have seen
        refit=any(run.config.refit for run in runs),
    )
    held_out = _mean_held_out(runs, digest)
    calibration = None
    if held_out is not None:
        calibration, chosen = final_decision(data, config, held_out)
    elif any(run.calibration is not None for run in runs):
        raise ConfigError(
            "calibrated runs are joined on rows that all runs held out, but there are none; train them on the same "
            "splits, or without --calibrate"
        )
    elif thresholds in ("global", "class"):
        raise ConfigError(
            f"thresholds {thresholds!r} are chosen on rows that all runs held out, but there are none; "
            f"leave out --thresholds"
        )
    elif thresholds == "none":
        chosen = np.full(len(data.classes), HALF)
    else:
        chosen = np.mean([run.thresholds for run in runs], axis=0)
        config = replace(config, thresholds="auto")
    joined = Run(
        name=f"{store.dataset}-ensemble",
        dataset=store.dataset,
        manifest=store.manifest,
        classes=data.classes,
        config=config,
        members=members,
        thresholds=chosen,
        calibration=calibration,
        histories=[history for run in runs for history in run.histories],
        held_out=held_out,
        # If a run was trained on other splits, the ensemble may have seen rows that are held out now.
        split_digest=next((run.split_digest for run in runs if run.split_digest != digest), digest),
        sources=tuple(run.name for run in runs),
        seconds=sum(run.seconds for run in runs),
    )
    joined.results = compute_results(data, joined, table_of)
    joined.calibration_errors = held_out_calibration_errors(data, joined)
    return joined


def _check_together(runs: Sequence[Run], store: FeatureStore) -> None:
    if len(runs) < 2:
        raise RunError(f"an ensemble needs at least 2 runs. Got {len(runs)} instead")
    first, *others = runs
    keys = [id(run) if run.path is None else run.path.resolve() for run in runs]
    for run, key in zip(runs, keys, strict=True):
        if keys.count(key) > 1:
            raise RunError(f"run {run.name} is given twice; give each run once")
    for run in others:
        if run.dataset != first.dataset:
            raise RunError(f"run {run.name} is of dataset {run.dataset}, but run {first.name} is of {first.dataset}")
        if run.task != first.task:
            raise RunError(f"run {run.name} is for a {run.task} task, but run {first.name} is for a {first.task} task")
        if run.classes != first.classes or run.tasks != first.tasks:
            raise RunError(f"run {run.name} has other classes than run {first.name}; train one of them again")
    if store.dataset != first.dataset:
        raise RunError(f"the runs are of dataset {first.dataset}, but {store.path} has features of {store.dataset}")


def _mean_held_out(runs: Sequence[Run], digest: str) -> HeldOut | None:
    """Return the runs' mean scores of the held-out rows. If these rows differ, return None and log a warning."""
    all_held_out: list[HeldOut] = []
    for run in runs:
        if run.held_out is None:
            why = f"run {run.name} held out no rows"
        elif run.split_digest != digest:
            why = f"samples or splits of {run.dataset} changed since run {run.name} was trained"
        elif all_held_out and not np.array_equal(run.held_out.rows, all_held_out[0].rows):
            first = f"run {runs[0].name} ({all_held_out[0].split})"
            why = f"run {run.name} held out other rows ({run.held_out.split}) than {first}"
        else:
            all_held_out.append(run.held_out)
            continue
        logger.warning("%s: there are no figures of held-out rows, and thresholds are the mean over the runs", why)
        return None
    scores = np.stack([held_out.scores for held_out in all_held_out]).mean(axis=0, dtype=np.float32)
    return replace(all_held_out[0], scores=scores)
