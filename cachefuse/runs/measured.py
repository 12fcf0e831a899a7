"""A run's scores and predictions of labelled rows: kept ones of rows held out, or new ones of any labelled split."""

from collections.abc import Collection
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from cachefuse.data.splits import ordered_splits
from cachefuse.errors import DataError, RunError
from cachefuse.printable import listed
from cachefuse.runs.run import Run, split_digest
from cachefuse.runs.tables import StoreTables
from cachefuse.store.store import FeatureStore
from cachefuse.training.data import OUT_OF_FOLD, TRAIN, VAL, TrainingData, groups_of
from cachefuse.training.held_out import HeldOut
from cachefuse.training.split import copies_message, count_copies


@dataclass(frozen=True)
class Measured:
    """Scores and predictions (n, C) of ``rows`` (n,) of a split, and the data and tables they come from.

    ``raw_scores`` (n, C) are those before calibration. ``held_out``: whether these are the rows that the run held out.
    ``caution`` says why new rows may give other figures, and ``copies`` that some are copies of training rows.
    """

    data: TrainingData
    tables: StoreTables
    split: str
    rows: Tensor
    scores: np.ndarray
    predictions: np.ndarray
    raw_scores: np.ndarray
    caution: str | None
    held_out: bool = False
    copies: str | None = None


def measure(
    run: Run, store: FeatureStore, split: str | None, absent: Collection[str] = (), device: str = "auto"
) -> Measured:
    """Return a run's scores and predictions on a labelled split, by default on the held-out rows.

    A held-out row is scored by models that have not seen it. Raises what ``evaluate`` does.
    """
    tables = StoreTables([run], store, device, absent)
    manifest = run.manifest
    data = TrainingData(
        name=store.dataset,
        table=tables(run.members[0]),
        classes=run.classes,
        task=run.task,
        tasks=run.tasks,
        metrics=manifest.reported_metrics,
        min_labels=manifest.min_labels,
        groups=groups_of(store),
        measures_answers=store.measures_answers,
    )
    changed = split_digest(store) != run.split_digest
    if run.held_out is not None and _means_held_out(run.held_out, split, changed):
        rows = torch.from_numpy(run.held_out.rows)
        raw = _held_out(run, run.held_out, data, tables if absent else None, changed)
        scores, predictions = run.held_out.decided(data, run.config, raw)
        name, copies = run.held_out.split, _copies_held_out(run.held_out, store, data)
        return Measured(data, tables, name, rows, scores, predictions, raw, None, held_out=True, copies=copies)
    split, rows = _labelled(run, store, data, split)
    raw = run.raw_scores(tables, rows)
    scores = run.calibrated(raw)
    trained = [TRAIN, VAL] if _trained_on_val(run) else [TRAIN]
    n = 0 if split in trained else count_copies(store.content, rows, data.rows(*trained))
    copies, caution = copies_message(n, len(rows), False, split) if n else None, _caution(run, split, changed)
    return Measured(data, tables, split, rows, scores, run.decide(scores), raw, caution, copies=copies)


def _means_held_out(held_out: HeldOut, split: str | None, changed: bool) -> bool:
    """Whether a split means the held-out rows. If the store changed, "val" means its current val split."""
    return split is None or (split == held_out.split and (split != VAL or not changed))


def _held_out(run: Run, held_out: HeldOut, data: TrainingData, tables: StoreTables | None, changed: bool) -> np.ndarray:
    """Return scores (n, C) of the held-out rows before calibration: the kept ones, or new ones from ``tables``."""
    if changed:
        raise RunError(
            f"samples or splits of {data.name} changed since run {run.name} was trained (for example by an extract "
            f"with --refresh), so its held-out rows are unknown now; train again, or name a --split: "
            f"{listed(data.splits)}"
        )
    return held_out.scores if tables is None else run.held_out_scores(tables)


def _labelled(run: Run, store: FeatureStore, data: TrainingData, split: str | None) -> tuple[str, Tensor]:
    """Return a split with its labelled rows (n,). Raises RunError or DataError if there are none."""
    if split is None:
        raise RunError(f"run {run.name} has no held-out rows; name a labelled --split: {listed(data.splits)}")
    if split not in store.splits:
        known = listed(ordered_splits(store.splits))
        raise DataError(f"{store.dataset} has no rows in split {split!r}; its splits are: {known}")
    if split not in data.splits:
        known = listed(data.splits) or "none"
        raise DataError(f"{store.dataset} has no labels in split {split!r}; splits with labels: {known}")
    return split, data.rows(split)


def _copies_held_out(held_out: HeldOut, store: FeatureStore, data: TrainingData) -> str | None:
    """Return the sentence on rows held out that are copies of rows which their models were trained on, or None."""
    rows, folds = torch.from_numpy(held_out.rows), held_out.split == OUT_OF_FOLD
    if folds:
        parts = [torch.from_numpy(held_out.parts == part) for part in np.unique(held_out.parts)]
        n = sum(count_copies(store.content, rows[part], rows[~part]) for part in parts)
    else:
        n = count_copies(store.content, rows, data.rows(TRAIN))
    return copies_message(n, len(rows), folds) if n else None


def _trained_on_val(run: Run) -> bool:
    return any(member.config.folds or member.config.refit for member in run.members)


def _caution(run: Run, split: str, changed: bool) -> str | None:
    if split == TRAIN or (split == VAL and _trained_on_val(run)):
        return f"run {run.name} was trained on {split} rows: on new rows its figures may be lower"
    if changed:
        return f"samples or splits changed since run {run.name} was trained: it may have seen some of these rows"
    return None
