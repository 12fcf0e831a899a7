"""How good a run is on labelled rows of its store: figures with bootstrap intervals, those of each class, ablations."""

from collections.abc import Callable, Collection
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cachefuse.cache.store import FeatureStore
from cachefuse.data.splits import ordered_splits
from cachefuse.errors import ConfigError, DataError, RunError
from cachefuse.fusion.base import modalities_of
from cachefuse.metrics import bootstrap_intervals, evaluation_metrics
from cachefuse.training.measure import HeldOut, figures
from cachefuse.training.problem import TRAIN, VAL, Problem
from cachefuse.training.run import Run, split_digest
from cachefuse.training.used import StoreTables


@dataclass(frozen=True)
class Evaluation:
    """Figures of a run on ``n_rows`` of a split, "oof" for train and val out of fold, ``without`` some modalities.

    ``intervals`` are (low, high) by metric, ``per_class`` (C,) by figure. Where fusions of the run weigh the
    modalities (gated, cma), ``gates`` are their mean weights, and ``gates_per_class`` (C,) those over each class's
    positive rows. ``caution``
    says why the figures may tell little of new rows. They are of ``rows`` (n,), numbers in the store, with targets and
    predictions (n, C) bool, and scores (n, C).
    """

    run: str
    dataset: str
    split: str
    without: tuple[str, ...]
    n_rows: int
    classes: tuple[str, ...]
    metrics: dict[str, float]
    intervals: dict[str, tuple[float, float]]
    per_class: dict[str, list[float]]
    gates: dict[str, float]
    gates_per_class: dict[str, list[float]]
    caution: str | None
    rows: np.ndarray = field(compare=False, repr=False)
    targets: np.ndarray = field(compare=False, repr=False)
    scores: np.ndarray = field(compare=False, repr=False)
    predictions: np.ndarray = field(compare=False, repr=False)

    def as_dict(self) -> dict[str, Any]:
        """Return the figures and what they are of, but not the rows one by one."""
        return {name: value for name, value in vars(self).items() if not isinstance(value, np.ndarray)}


def evaluate(
    run: Run,
    store: FeatureStore,
    split: str | None = None,
    *,
    without: Collection[str] = (),
    device: str = "auto",
    n_resamples: int = 1000,
    seed: int = 0,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> Evaluation:
    """Measure a run on a labelled split, by default the rows held out: each by models that have not seen it.

    No figure of those sees the rows that chose its thresholds; on any other split the run decides as ``predict`` does.
    ``without`` names modalities to take as absent, with thresholds chosen as if they were there. The 95% intervals are
    of ``n_resamples`` bootstrap samples, 0 for none; ``on_progress`` hears of the figures done, of all.

    Raises DataError for a split that is not there or has no labels; RunError without rows held out, if samples or
    splits changed since, or as ``StoreTables`` does; UnknownNameError for a modality that the run does not read,
    ConfigError if none is left.
    """
    gone = tuple(dict.fromkeys(without))
    if set(gone) >= set(run.modalities):
        raise ConfigError(f"run {run.name} reads {' and '.join(run.modalities)}; without them it has nothing to go by")
    tables = StoreTables([run], store, device, gone)
    manifest = run.manifest
    problem = Problem(
        name=store.dataset,
        table=tables(run.members[0]),
        classes=run.classes,
        task=run.task,
        metrics=manifest.reported_metrics,
        min_labels=manifest.min_labels,
    )
    changed = split_digest(store) != run.split_digest
    caution = None
    if run.held is not None and _means_held_out(run.held, split, changed):
        split, rows = run.held.split, torch.from_numpy(run.held.rows)
        scores, predictions = _held_out(run, run.held, problem, tables if gone else None, changed)
    else:
        split, rows = _labelled(run, store, problem, split)
        caution = _caution(run, split, changed)
        scores = run.scores(tables, rows)
        predictions = run.decide(scores)
    names = tuple(dict.fromkeys((*problem.metrics, *evaluation_metrics(run.task, len(run.classes)))))
    result = figures(replace(problem, metrics=names), rows, scores, predictions)
    targets, intervals = problem.targets(rows), {}
    if n_resamples:
        intervals = bootstrap_intervals(targets, scores, predictions, names, n_resamples, seed, on_progress=on_progress)
    weights = _gates(run, tables, rows)
    return Evaluation(
        run=run.name,
        dataset=store.dataset,
        split=split,
        without=gone,
        n_rows=result.n_rows,
        classes=run.classes,
        metrics=result.metrics,
        intervals=intervals,
        per_class=result.per_class,
        gates={modality: float(values.mean()) for modality, values in weights.items()},
        gates_per_class={modality: _mean_by_class(targets, values) for modality, values in weights.items()},
        caution=caution,
        rows=rows.cpu().numpy(),
        targets=targets > 0,
        scores=scores,
        predictions=predictions,
    )


def _means_held_out(held: HeldOut, split: str | None, changed: bool) -> bool:
    """Whether a split is the rows held out; by its own name, "val" is whatever the store has there now."""
    return split is None or (split == held.split and (split != VAL or not changed))


def _held_out(
    run: Run, held: HeldOut, problem: Problem, tables: StoreTables | None, changed: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Return scores and predictions (n, C) of the rows held out: those of the training, or of other tables."""
    if changed:
        raise RunError(
            f"samples or splits of {problem.name} changed since run {run.name} was trained (rows were added or "
            f"refreshed, say), so its rows held out can't be told any more; train again, or name a --split: "
            f"{', '.join(problem.splits)}"
        )
    scores = held.scores if tables is None else run.held_out_scores(tables)
    return scores, held.predictions(problem, run.config, scores)


def _labelled(run: Run, store: FeatureStore, problem: Problem, split: str | None) -> tuple[str, Tensor]:
    """Return a split with its labelled rows (n,). Raises RunError or DataError if there are none."""
    if split is None:
        raise RunError(f"run {run.name} has no rows held out; name a labelled --split: {', '.join(problem.splits)}")
    if split not in store.splits:
        known = ", ".join(ordered_splits(store.splits))
        raise DataError(f"{store.dataset} has no rows in split {split!r}; its splits are: {known}")
    if split not in problem.splits:
        known = ", ".join(problem.splits) or "none"
        raise DataError(f"{store.dataset} has no labels in split {split!r}; those with labels are: {known}")
    return split, problem.rows(split)


def _caution(run: Run, split: str, changed: bool) -> str | None:
    whole = any(member.config.folds or member.config.refit for member in run.members)
    if split == TRAIN or (split == VAL and whole):
        return f"run {run.name} was trained on {split} rows: its figures there do not tell how good it is on new ones"
    if changed:
        return f"samples or splits changed since run {run.name} was trained: it may have seen some of these rows"
    return None


@torch.inference_mode()
def _gates(run: Run, tables: StoreTables, rows: Tensor) -> dict[str, np.ndarray]:
    """Return how much each modality counts in each of some rows (n,), on average over the members that weigh them."""
    weighing = [member for member in run.members if hasattr(member.model.fusion, "weights")]
    total = sum(member.weight for member in weighing)
    means: dict[str, np.ndarray] = {}
    for member in weighing:
        table = tables(member)
        model = member.model.to(table.targets.device).eval()
        weights = table.map(model.modality_weights, rows.to(table.targets.device)).double().numpy()  # (n, M)
        for m, modality in enumerate(modalities_of(model.widths)):
            means[modality] = means.get(modality, 0) + member.weight / total * weights[:, m]
    return means


def _mean_by_class(targets: np.ndarray, values: np.ndarray) -> list[float]:
    """Return the mean of values (n,) over the positive rows of each class, (C,); NaN where there are none."""
    return [float(values[positive].mean()) if positive.any() else float("nan") for positive in targets.T > 0]
