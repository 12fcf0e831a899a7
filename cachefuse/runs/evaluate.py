"""Evaluation of a run on labelled rows: metrics with bootstrap intervals, figures per class, missing modalities."""

from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from cachefuse.csv_writer import csv_for_people
from cachefuse.errors import ConfigError, RunError
from cachefuse.feature_spec import modalities_of
from cachefuse.files import JsonObject
from cachefuse.metrics import CALIBRATION_ERROR, evaluation_metrics
from cachefuse.metrics.base import RIGHT
from cachefuse.metrics.bootstrap import bootstrap_intervals
from cachefuse.metrics.calibration import class_calibration_error
from cachefuse.metrics.tasks import TaskSlice
from cachefuse.output import write_output
from cachefuse.runs.measured import measure
from cachefuse.runs.results import calibration_errors
from cachefuse.runs.run import Run
from cachefuse.runs.tables import StoreTables
from cachefuse.store.store import FeatureStore
from cachefuse.training.data import TrainingData
from cachefuse.training.held_out import figures


@dataclass(frozen=True)
class Evaluation:
    """Figures of a run on ``n_rows`` of a split, without the modalities in ``without``; "oof" is out of fold.

    ``intervals`` are (low, high) by metric, ``per_class`` (C,) by figure. If fusions of the run weigh the modalities
    (gated, cma), ``gates`` are the mean weights, and ``gates_per_class`` (C,) the means over each class's positive
    rows. ``caution`` says why new rows may give other figures. ``rows`` (n,) are row numbers in the store, targets and
    predictions are (n, C) bool, and scores (n, C).

    ``kinds`` of rows, such as the "answer_type" of questions, have (number of rows, main metric) by value.

    There are K ``tasks``. ``labelled`` (n, K) bool marks the rows that have each task's label. ``weights`` (n, K, M)
    are the weights of the modalities in ``gates``, by row and task.

    If the run is calibrated, ``calibration_errors`` are (before, after), by metric, and ``raw_scores`` (n, C) are the
    scores before.
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
    kinds: dict[str, dict[str, tuple[int, float]]] = field(default_factory=dict)
    tasks: tuple[TaskSlice, ...] = field(default=(), repr=False)
    labelled: np.ndarray = field(default_factory=lambda: np.empty((0, 0), bool), compare=False, repr=False)
    weights: np.ndarray = field(default_factory=lambda: np.empty((0, 0, 0)), compare=False, repr=False)
    calibration_errors: dict[str, tuple[float, float]] = field(default_factory=dict)
    raw_scores: np.ndarray = field(default_factory=lambda: np.empty((0, 0)), compare=False, repr=False)

    @property
    def several(self) -> bool:
        """Whether the dataset declares tasks, each with its own figures."""
        return any(task.name for task in self.tasks)

    @property
    def known_targets(self) -> np.ndarray:
        """The targets (n, C) int8: 1 or 0, and -1 where a row lacks the label of the class's task."""
        known = np.zeros(self.targets.shape, bool)
        for k, task in enumerate(self.tasks):
            known[:, task.columns] = self.labelled[:, k : k + 1]
        return np.where(known, self.targets, -1).astype(np.int8)

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
            calibration_errors=of_this_task(self.calibration_errors),
            raw_scores=self.raw_scores[rows, columns] if len(self.raw_scores) else self.raw_scores,
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
    chosen with them. The 95% intervals come from ``n_resamples`` bootstrap samples, 0 for none; rows that share an
    input are drawn together. ``on_progress(done, total)`` counts metrics.

    Raises DataError for a split that does not exist or has no labels; RunError if there are no held-out rows, if
    samples or splits changed since the training, or as ``StoreTables`` does; UnknownNameError for a modality that the
    run does not read; ConfigError if no modality is left.
    """
    absent = tuple(dict.fromkeys(without))
    if set(absent) >= set(run.modalities):
        raise ConfigError(f"run {run.name} reads only {' and '.join(run.modalities)}; keep at least one modality")
    measured = measure(run, store, split, absent, device)
    rows, scores, predictions = measured.rows, measured.scores, measured.predictions
    data = with_evaluation_metrics(measured.data)
    result = figures(data, rows, scores, predictions)
    targets, intervals = data.targets(rows), {}
    if n_resamples:
        metrics, groups = data.bind(data.metrics), data.groups_of(rows)
        intervals = bootstrap_intervals(
            targets, scores, predictions, metrics, n_resamples, seed, on_progress=on_progress, groups=groups
        )
    weights = _weights(run, measured.tables, rows)
    caution = measured.caution or (run.caution if measured.held_out else None)
    return Evaluation(
        run=run.name,
        dataset=store.dataset,
        split=measured.split,
        without=absent,
        n_rows=result.n_rows,
        classes=run.classes,
        metrics=result.metrics,
        intervals=intervals,
        per_class={**result.per_class, **_calibration_by_class(targets, scores, run.tasks)},
        gates={modality: float(values.mean()) for modality, values in weights.items()},
        gates_per_class={modality: _mean_by_class(targets, values, run.tasks) for modality, values in weights.items()},
        caution="; ".join(filter(None, (caution, measured.copies))) or None,
        kinds=_by_kind(store, data, rows, scores, predictions),
        rows=rows.cpu().numpy(),
        targets=targets >= RIGHT,
        scores=scores,
        predictions=predictions,
        tasks=run.tasks,
        labelled=np.stack([task.labelled(targets) for task in run.tasks], axis=1),
        calibration_errors=calibration_errors(data, rows, measured.raw_scores, scores) if run.calibration else {},
        raw_scores=measured.raw_scores if run.calibration else np.empty((0, 0)),
        weights=np.stack([*weights.values()], axis=-1) if weights else np.empty((len(rows), len(run.tasks), 0)),
    )


def with_evaluation_metrics(data: TrainingData) -> TrainingData:
    """Return the same data with all metrics that an evaluation shows."""
    more = (task.named(name) for task in data.tasks for name in evaluation_metrics(task.kind, task.n_classes))
    return replace(data, metrics=tuple(dict.fromkeys((*data.metrics, *more))))


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
    rows = [["id", *(task.named(modality) for task in evaluation.tasks for modality in evaluation.gates)]]
    by_row = evaluation.weights.reshape(len(evaluation.rows), -1)
    for row, weights in zip(evaluation.rows, by_row, strict=True):
        rows.append([store.ids[row], *(f"{weight:.4f}" for weight in weights)])
    write_output(path, csv_for_people(rows))


def _calibration_by_class(
    targets: np.ndarray, scores: np.ndarray, tasks: Sequence[TaskSlice]
) -> dict[str, list[float]]:
    """Return the calibration error of each class, (C,); nothing for answers to questions, which are right in part."""
    if not all(task.kind in CALIBRATION_ERROR for task in tasks):
        return {}
    errors = [class_calibration_error(*task.own(targets, scores)) for task in tasks]
    return {"calibration_error": np.concatenate(errors).tolist()}


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


def _by_kind(
    store: FeatureStore, data: TrainingData, rows: Tensor, scores: np.ndarray, predictions: np.ndarray
) -> dict[str, dict[str, tuple[int, float]]]:
    """Return the number of rows of each kind, and the main metric over them; the most frequent value first."""
    metric = data.bind([data.metric])[data.metric]
    found: dict[str, dict[str, tuple[int, float]]] = {}
    for name, values in store.kinds.items():
        of_rows = values[rows.cpu().numpy()]
        found[name] = {}
        for value, n in Counter(of_rows.tolist()).most_common():
            mask = of_rows == value
            if value:
                targets = data.targets(rows[torch.from_numpy(mask).to(rows.device)])
                found[name][value] = n, metric(targets, scores[mask], predictions[mask])
    return found


def _mean_by_class(targets: np.ndarray, values: np.ndarray, tasks: Sequence[TaskSlice]) -> list[float]:
    """Return the mean of values (n, K) over each class's positive rows, (C,); NaN for a class without such rows."""
    return [_mean(values[targets[:, c] >= RIGHT, k]) for k, task in enumerate(tasks) for c in task.numbers]


def _mean(values: np.ndarray) -> float:
    return float(values.mean()) if values.size else float("nan")
