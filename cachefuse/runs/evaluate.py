"""Evaluation of a run on labelled rows: metrics with bootstrap intervals, figures per class, missing modalities."""

import csv
import io
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from cachefuse.data.splits import ordered_splits
from cachefuse.errors import ConfigError, DataError, RunError
from cachefuse.feature_spec import modalities_of
from cachefuse.files import JsonObject, write_atomically
from cachefuse.metrics import evaluation_metrics
from cachefuse.metrics.base import RIGHT
from cachefuse.metrics.bootstrap import bootstrap_intervals
from cachefuse.metrics.tasks import TaskSlice
from cachefuse.runs.run import Run, split_digest
from cachefuse.runs.tables import StoreTables
from cachefuse.store.store import FeatureStore
from cachefuse.training.data import TRAIN, VAL, TrainingData
from cachefuse.training.held_out import HeldOut, figures


@dataclass(frozen=True)
class Evaluation:
    """Figures of a run on ``n_rows`` of a split, without the modalities in ``without``; "oof" is out of fold.

    ``intervals`` are (low, high) by metric, ``per_class`` (C,) by figure. If fusions of the run weigh the modalities
    (gated, cma), ``gates`` are the mean weights, and ``gates_per_class`` (C,) the means over each class's positive
    rows. ``caution`` says why new rows may give other figures. ``rows`` (n,) are row numbers in the store, targets and
    predictions are (n, C) bool, and scores (n, C).

    There are K ``tasks``. ``labelled`` (n, K) bool marks the rows that have each task's label. ``weights`` (n, K, M)
    are the weights of the modalities in ``gates``, by row and task.
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
    tasks: tuple[TaskSlice, ...] = field(default=(), repr=False)
    labelled: np.ndarray = field(default_factory=lambda: np.empty((0, 0), bool), compare=False, repr=False)
    weights: np.ndarray = field(default_factory=lambda: np.empty((0, 0, 0)), compare=False, repr=False)

    @property
    def several(self) -> bool:
        """Whether the dataset declares tasks, each with its own figures."""
        return any(task.name for task in self.tasks)

    def of_task(self, task: TaskSlice) -> "Evaluation":
        """Return the evaluation of one task alone, on the rows that have its label."""
        k, columns = self.tasks.index(task), task.columns
        rows = self.labelled[:, k]
        weights = self.weights[rows, k : k + 1]  # (n_k, 1, M)

        def of_this_task(values: JsonObject) -> JsonObject:
            prefix = task.named("")
            return {name.removeprefix(prefix): value for name, value in values.items() if name.startswith(prefix)}

        return replace(
            self,
            n_rows=int(rows.sum()),
            classes=tuple(map(task.own_class, self.classes[columns])),
            metrics=of_this_task(self.metrics),
            intervals=of_this_task(self.intervals),
            per_class={name: values[columns] for name, values in self.per_class.items()},
            gates={m: _mean(weights[..., i]) for i, m in enumerate(self.gates)},
            gates_per_class={m: values[columns] for m, values in self.gates_per_class.items()},
            rows=self.rows[rows],
            targets=self.targets[rows, columns],
            scores=self.scores[rows, columns],
            predictions=self.predictions[rows, columns],
            tasks=(replace(task, name="", columns=slice(0, task.n_classes)),),
            labelled=np.ones((int(rows.sum()), 1), bool),
            weights=weights,
        )

    def as_dict(self) -> JsonObject:
        """Return all except the arrays by row; each of several tasks is under its name in "tasks"."""
        values = {name: x for name, x in vars(self).items() if name != "tasks" and not isinstance(x, np.ndarray)}
        if self.several:
            values["tasks"] = {task.name: self.of_task(task).as_dict() for task in self.tasks}
        return values


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
    """Evaluate a run on a labelled split, by default on the held-out rows.

    A held-out row is scored by models that have not seen it; its labels use thresholds chosen on other rows. On other
    splits, labels are predicted as by ``predict``. ``without`` names modalities to treat as absent; thresholds stay as
    chosen with them. The 95% intervals come from ``n_resamples`` bootstrap samples, 0 for none. ``on_progress(done,
    total)`` counts metrics.

    Raises DataError for a split that does not exist or has no labels; RunError if there are no held-out rows, if
    samples or splits changed since the training, or as ``StoreTables`` does; UnknownNameError for a modality that the
    run does not read; ConfigError if no modality is left.
    """
    absent = tuple(dict.fromkeys(without))
    if set(absent) >= set(run.modalities):
        raise ConfigError(f"run {run.name} reads only {' and '.join(run.modalities)}; keep at least one modality")
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
    )
    changed = split_digest(store) != run.split_digest
    caution = None
    if run.held_out is not None and _means_held_out(run.held_out, split, changed):
        split, rows = run.held_out.split, torch.from_numpy(run.held_out.rows)
        scores, predictions = _held_out(run, run.held_out, data, tables if absent else None, changed)
    else:
        split, rows = _labelled(run, store, data, split)
        caution = _caution(run, split, changed)
        scores = run.scores(tables, rows)
        predictions = run.decide(scores)
    more_metrics = (t.named(name) for t in data.tasks for name in evaluation_metrics(t.kind, t.n_classes))
    data = replace(data, metrics=tuple(dict.fromkeys((*data.metrics, *more_metrics))))
    result = figures(data, rows, scores, predictions)
    targets, intervals = data.targets(rows), {}
    if n_resamples:
        metrics = data.bind(data.metrics)
        intervals = bootstrap_intervals(
            targets, scores, predictions, metrics, n_resamples, seed, on_progress=on_progress
        )
    weights = _weights(run, tables, rows)
    return Evaluation(
        run=run.name,
        dataset=store.dataset,
        split=split,
        without=absent,
        n_rows=result.n_rows,
        classes=run.classes,
        metrics=result.metrics,
        intervals=intervals,
        per_class=result.per_class,
        gates={modality: float(values.mean()) for modality, values in weights.items()},
        gates_per_class={modality: _mean_by_class(targets, values, run.tasks) for modality, values in weights.items()},
        caution=caution,
        rows=rows.cpu().numpy(),
        targets=targets >= RIGHT,
        scores=scores,
        predictions=predictions,
        tasks=run.tasks,
        labelled=np.stack([task.labelled(targets) for task in run.tasks], axis=1),
        weights=np.stack([*weights.values()], axis=-1) if weights else np.empty((len(rows), len(run.tasks), 0)),
    )


def check_weighs(run: Run) -> None:
    """Raise RunError, before an evaluation starts, if no fusion of a run weighs modalities."""
    if not any(member.model.weighs for member in run.members):
        raise _weighs_none(run.name)


def _weighs_none(name: str) -> RunError:
    return RunError(f"run {name} does not weigh modalities; only the fusions gated and cma do")


def write_gates(evaluation: Evaluation, store: FeatureStore, path: Path) -> None:
    """Write the weights of the modalities, by row and task, to a csv file: id, color.image, ...

    Raises RunError if no fusion of the run weighs modalities.
    """
    if not evaluation.gates:
        raise _weighs_none(evaluation.run)
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["id", *(task.named(modality) for task in evaluation.tasks for modality in evaluation.gates)])
    by_row = evaluation.weights.reshape(len(evaluation.rows), -1)
    for row, weights in zip(evaluation.rows, by_row, strict=True):
        writer.writerow([store.ids[row], *(f"{weight:.4f}" for weight in weights)])
    write_atomically(path, text.getvalue().encode("utf-8"))


def _means_held_out(held_out: HeldOut, split: str | None, changed: bool) -> bool:
    """Whether a split means the held-out rows. If the store changed, "val" means its current val split."""
    return split is None or (split == held_out.split and (split != VAL or not changed))


def _held_out(
    run: Run, held_out: HeldOut, data: TrainingData, tables: StoreTables | None, changed: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Return scores and predictions (n, C) of the held-out rows: the kept scores, or new ones from ``tables``."""
    if changed:
        raise RunError(
            f"samples or splits of {data.name} changed since run {run.name} was trained (for example by an extract "
            f"with --refresh), so its held-out rows are unknown now; train again, or name a --split: "
            f"{', '.join(data.splits)}"
        )
    scores = held_out.scores if tables is None else run.held_out_scores(tables)
    return scores, held_out.predictions(data, run.config, scores)


def _labelled(run: Run, store: FeatureStore, data: TrainingData, split: str | None) -> tuple[str, Tensor]:
    """Return a split with its labelled rows (n,). Raises RunError or DataError if there are none."""
    if split is None:
        raise RunError(f"run {run.name} has no held-out rows; name a labelled --split: {', '.join(data.splits)}")
    if split not in store.splits:
        known = ", ".join(ordered_splits(store.splits))
        raise DataError(f"{store.dataset} has no rows in split {split!r}; its splits are: {known}")
    if split not in data.splits:
        known = ", ".join(data.splits) or "none"
        raise DataError(f"{store.dataset} has no labels in split {split!r}; splits with labels: {known}")
    return split, data.rows(split)


def _caution(run: Run, split: str, changed: bool) -> str | None:
    with_val = any(member.config.folds or member.config.refit for member in run.members)
    if split == TRAIN or (split == VAL and with_val):
        return f"run {run.name} was trained on {split} rows: on new rows its figures may be lower"
    if changed:
        return f"samples or splits changed since run {run.name} was trained: it may have seen some of these rows"
    return None


def _weights(run: Run, tables: StoreTables, rows: Tensor) -> dict[str, np.ndarray]:
    """Return each modality's weight by row and task, (n, K), as the mean over the members that weigh modalities.

    A member may have one weight for all tasks.
    """
    weighing = [member for member in run.members if member.model.weighs]
    total = sum(member.weight for member in weighing)
    means: dict[str, np.ndarray] = {}
    for member in weighing:
        table = tables(member)
        model = member.model.to(table.targets.device).eval()
        weights = table.map(model.modality_weights, rows.to(table.targets.device)).double().numpy()
        by_task = weights if weights.ndim == 3 else np.repeat(weights[:, None], len(run.tasks), axis=1)  # (n, K, M)
        for m, modality in enumerate(modalities_of(model.specs.values())):
            means[modality] = means.get(modality, 0) + member.weight / total * by_task[..., m]
    return means


def _mean_by_class(targets: np.ndarray, values: np.ndarray, tasks: Sequence[TaskSlice]) -> list[float]:
    """Return the mean of values (n, K) over each class's positive rows, (C,); NaN for a class without such rows."""
    return [_mean(values[targets[:, c] >= RIGHT, k]) for k, task in enumerate(tasks) for c in task.numbers]


def _mean(values: np.ndarray) -> float:
    return float(values.mean()) if values.size else float("nan")
