"""How good a run is on labelled rows of its store: figures with bootstrap intervals, those of each class, ablations."""

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
    """Figures of a run on ``n_rows`` of a split, "oof" for train and val out of fold, ``without`` some modalities.

    ``intervals`` are (low, high) by metric, ``per_class`` (C,) by figure. Where fusions of the run weigh the
    modalities (gated, cma), ``gates`` are their mean weights, and ``gates_per_class`` (C,) those over each class's
    positive rows. ``caution`` says why the figures may tell little of new rows. They are of ``rows`` (n,), numbers in
    the store, with targets and predictions (n, C) bool, and scores (n, C).

    There are K ``tasks``; ``labelled`` (n, K) bool says which rows have the label of each, and ``weights`` (n, K, M)
    how much each of the modalities in ``gates`` counts in each row for each task.
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
        """Whether the dataset declares tasks, each of which is to be looked at by itself."""
        return any(task.name for task in self.tasks)

    def of_task(self, task: TaskSlice) -> "Evaluation":
        """Return one task's part: of the rows that have its label, as if there were no other."""
        k, own = self.tasks.index(task), task.columns
        rows = self.labelled[:, k]
        weights = self.weights[rows, k : k + 1]  # (n_k, 1, M)

        def mine(values: JsonObject) -> JsonObject:
            own_names = {name: name.removeprefix(task.named("")) for name in values if name.startswith(task.named(""))}
            return {short: values[name] for name, short in own_names.items()}

        return replace(
            self,
            n_rows=int(rows.sum()),
            classes=tuple(map(task.own_class, self.classes[own])),
            metrics=mine(self.metrics),
            intervals=mine(self.intervals),
            per_class={name: values[own] for name, values in self.per_class.items()},
            gates={m: _mean(weights[..., i]) for i, m in enumerate(self.gates)},
            gates_per_class={m: values[own] for m, values in self.gates_per_class.items()},
            rows=self.rows[rows],
            targets=self.targets[rows, own],
            scores=self.scores[rows, own],
            predictions=self.predictions[rows, own],
            tasks=(replace(task, name="", columns=slice(0, task.n_classes)),),
            labelled=np.ones((int(rows.sum()), 1), bool),
            weights=weights,
        )

    def as_dict(self) -> JsonObject:
        """Return the figures and what they are of, but not the rows one by one; with those of several tasks by name."""
        found = {name: x for name, x in vars(self).items() if name != "tasks" and not isinstance(x, np.ndarray)}
        if self.several:
            found["tasks"] = {task.name: self.of_task(task).as_dict() for task in self.tasks}
        return found


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
        scores, predictions = _held_out(run, run.held_out, data, tables if gone else None, changed)
    else:
        split, rows = _labelled(run, store, data, split)
        caution = _caution(run, split, changed)
        scores = run.scores(tables, rows)
        predictions = run.decide(scores)
    usual = (t.named(name) for t in data.tasks for name in evaluation_metrics(t.kind, t.n_classes))
    data = replace(data, metrics=tuple(dict.fromkeys((*data.metrics, *usual))))
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
        without=gone,
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
    """Raise RunError if no fusion of a run weighs modalities: to be told before it is measured, not after."""
    if not any(member.model.weighs for member in run.members):
        raise _weighs_none(run.name)


def _weighs_none(name: str) -> RunError:
    return RunError(f"run {name} does not weigh modalities, as the fusions gated and cma do")


def write_gates(found: Evaluation, store: FeatureStore, path: Path) -> None:
    """Write how much each modality counts in each row, for each of several tasks, to a csv file: id, color.image, ...

    Raises RunError if no fusion of the run weighs modalities.
    """
    if not found.gates:
        raise _weighs_none(found.run)
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["id", *(task.named(modality) for task in found.tasks for modality in found.gates)])
    for row, weights in zip(found.rows, found.weights.reshape(len(found.rows), -1), strict=True):
        writer.writerow([store.ids[row], *(f"{weight:.4f}" for weight in weights)])
    write_atomically(path, text.getvalue().encode("utf-8"))


def _means_held_out(held_out: HeldOut, split: str | None, changed: bool) -> bool:
    """Whether a split is the rows held out; by its own name, "val" is whatever the store has there now."""
    return split is None or (split == held_out.split and (split != VAL or not changed))


def _held_out(
    run: Run, held_out: HeldOut, data: TrainingData, tables: StoreTables | None, changed: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Return scores and predictions (n, C) of the rows held out: those of the training, or of other tables."""
    if changed:
        raise RunError(
            f"samples or splits of {data.name} changed since run {run.name} was trained (rows were added or "
            f"refreshed, say), so its rows held out can't be told any more; train again, or name a --split: "
            f"{', '.join(data.splits)}"
        )
    scores = held_out.scores if tables is None else run.held_out_scores(tables)
    return scores, held_out.predictions(data, run.config, scores)


def _labelled(run: Run, store: FeatureStore, data: TrainingData, split: str | None) -> tuple[str, Tensor]:
    """Return a split with its labelled rows (n,). Raises RunError or DataError if there are none."""
    if split is None:
        raise RunError(f"run {run.name} has no rows held out; name a labelled --split: {', '.join(data.splits)}")
    if split not in store.splits:
        known = ", ".join(ordered_splits(store.splits))
        raise DataError(f"{store.dataset} has no rows in split {split!r}; its splits are: {known}")
    if split not in data.splits:
        known = ", ".join(data.splits) or "none"
        raise DataError(f"{store.dataset} has no labels in split {split!r}; those with labels are: {known}")
    return split, data.rows(split)


def _caution(run: Run, split: str, changed: bool) -> str | None:
    whole = any(member.config.folds or member.config.refit for member in run.members)
    if split == TRAIN or (split == VAL and whole):
        return f"run {run.name} was trained on {split} rows: its figures there do not tell how good it is on new ones"
    if changed:
        return f"samples or splits changed since run {run.name} was trained: it may have seen some of these rows"
    return None


def _weights(run: Run, tables: StoreTables, rows: Tensor) -> dict[str, np.ndarray]:
    """Return how much each modality counts in each of some rows (n,) for each task, (n, K).

    It is the average over the members that weigh modalities; one that does so once does it for all tasks.
    """
    weighing = [member for member in run.members if member.model.weighs]
    total = sum(member.weight for member in weighing)
    means: dict[str, np.ndarray] = {}
    for member in weighing:
        table = tables(member)
        model = member.model.to(table.targets.device).eval()
        found = table.map(model.modality_weights, rows.to(table.targets.device)).double().numpy()
        by_task = found if found.ndim == 3 else np.repeat(found[:, None], len(run.tasks), axis=1)  # (n, K, M)
        for m, modality in enumerate(modalities_of(model.specs.values())):
            means[modality] = means.get(modality, 0) + member.weight / total * by_task[..., m]
    return means


def _mean_by_class(targets: np.ndarray, values: np.ndarray, tasks: Sequence[TaskSlice]) -> list[float]:
    """Return the mean of a task's values, of (n, K), over the positive rows of each class, (C,); NaN without any."""
    return [_mean(values[targets[:, c] >= RIGHT, k]) for k, task in enumerate(tasks) for c in task.numbers]


def _mean(values: np.ndarray) -> float:
    return float(values.mean()) if values.size else float("nan")
