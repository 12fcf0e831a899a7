"""A run as one self-contained HTML page: no network, no other file, no scripts."""

from pathlib import Path

import numpy as np

from cachefuse.data.dataset import Dataset
from cachefuse.metrics import CALIBRATION_ERROR, headline
from cachefuse.metrics.tasks import TaskSlice
from cachefuse.output import check_output, write_output
from cachefuse.report import formatting as words
from cachefuse.report import provenance as about
from cachefuse.report import tables
from cachefuse.report.curves import MAX_MODELS, precision_recall_chart, reliability_chart, training_charts
from cachefuse.report.evaluations import OnProgress, evaluate_for_report
from cachefuse.report.gallery import N_EXAMPLES, worst_examples
from cachefuse.report.render import render
from cachefuse.runs.evaluate import Evaluation
from cachefuse.runs.run import Run
from cachefuse.store.store import FeatureStore

TEMPLATE = "page.html.j2"


def write_report(
    run: Run,
    store: FeatureStore,
    path: Path,
    dataset: Dataset | None = None,
    *,
    split: str | None = None,
    device: str = "auto",
    on_progress: OnProgress = lambda what, done, total: None,
) -> Path:
    """Write the page of ``report_html`` to a file, and return its path.

    Raises ConfigError if the path is a folder or its folder is missing.
    """
    check_output(path)
    page = report_html(run, store, dataset, split=split, device=device, on_progress=on_progress)
    write_output(path, page.encode(), own=run.path)
    return path


def report_html(
    run: Run,
    store: FeatureStore,
    dataset: Dataset | None = None,
    *,
    split: str | None = None,
    device: str = "auto",
    on_progress: OnProgress = lambda what, done, total: None,
) -> str:
    """Return a run's report as one HTML page: the same run gives the same page.

    It evaluates the held-out rows of the run, or a labelled ``split`` of the store. The pictures and texts of the worst
    errors are from ``dataset``, the raw data; without it they are left out. Names and texts from data are escaped.

    Raises as ``evaluate`` does.
    """
    evaluation, without, why_not = evaluate_for_report(run, store, split, device, on_progress)
    calibrates = evaluation is not None and any(task.kind in CALIBRATION_ERROR for task in run.tasks)
    context: dict[str, object] = {
        "has_reliability": calibrates,
        "run": run,
        "evaluation": evaluation,
        "ablations": without,
        "why_not": why_not,
        "metrics": headline(run.manifest.reported_metrics),
        "warnings": _warnings(run, evaluation),
        "cooccurrences": [table for task in run.tasks if (table := _cooccurrence(run, store, task))],
        "splits_note": words.splits_note(run),
        "charts": training_charts(run),
        "training_note": words.training_note(run, MAX_MODELS) if run.histories else "",
        "facts": about.provenance(run) + about.long_texts(run.encoders, store),
        "settings": about.settings(run),
        "train_command": about.train_command(run),
        "predict_command": about.predict_command(run),
        "has_raw": dataset is not None,
    }
    if evaluation is None:
        tasks = [_classes_on_last_split(run, task) for task in run.tasks] if run.results else []
    else:
        tasks = [_task_context(run, evaluation, task, store.ids, dataset) for task in run.tasks]
    return render(TEMPLATE, {**context, "tasks": tasks})


def _task_context(
    run: Run, all_tasks: Evaluation, task: TaskSlice, ids: np.ndarray, dataset: Dataset | None
) -> dict[str, object]:
    """Return the template's values for one task of the dataset; a name of "" is the only task."""
    evaluation = all_tasks.of_task(task) if task.name else all_tasks
    multiclass, classes = task.kind == "multiclass", evaluation.classes
    chart, class_curves = precision_recall_chart(evaluation, classes)
    return {
        "name": task.name,
        "kind": task.kind,
        "evaluation": evaluation,
        "n_classes": task.n_classes,
        "verdict": words.verdict(evaluation, task.kind),
        "weakest": tables.weakest(evaluation.per_class, classes),
        "rows": words.rows_of(evaluation),
        "classes": tables.class_figures(evaluation.per_class, classes, _thresholds(run, task)),
        "thresholds_note": "" if task.one_label else words.thresholds_note(run, task.min_labels),
        "precision_recall": chart,
        "class_curves": class_curves,
        "reliability": reliability_chart(evaluation, task.kind),
        "calibration_note": words.calibration_note(evaluation, task.kind) if task.kind in CALIBRATION_ERROR else "",
        "confused": (tables.confusion if multiclass else tables.mistakes)(evaluation, classes),
        "pairs": tables.frequent_mistakes(evaluation, classes),
        "gates": tables.gates_by_class(evaluation),
        "examples": worst_examples(evaluation, classes, task.kind, ids, dataset, N_EXAMPLES // len(run.tasks)),
    }


def _thresholds(run: Run, task: TaskSlice) -> np.ndarray | None:
    return None if task.one_label else run.thresholds[task.columns]


def _cooccurrence(run: Run, store: FeatureStore, task: TaskSlice) -> dict[str, object] | None:
    """Return the co-occurrence of a multi-label task's labels in the store; None for a task with one label per row."""
    if task.one_label or task.n_classes < 2:
        return None
    (labelled,) = task.own(store.targets)
    classes = tuple(task.own_class(name) for name in run.classes[task.columns])
    return {"name": task.name, "heatmap": tables.cooccurrence(labelled > 0, classes), "n_labelled": len(labelled)}


def _classes_on_last_split(run: Run, task: TaskSlice) -> dict[str, object]:
    """Return the classes' figures on the last split of the run's results, even if the models were trained on it."""
    split, result = list(run.results.items())[-1]
    per_class = {name: values[task.columns] for name, values in result.per_class.items()}
    classes = tuple(task.own_class(name) for name in run.classes[task.columns])
    return {
        "name": task.name,
        "n_classes": task.n_classes,
        "classes": tables.class_figures(per_class, classes, _thresholds(run, task)),
        "thresholds_note": "" if task.one_label else words.thresholds_note(run, task.min_labels),
        "rows": f"{result.n_rows:,} {split} rows",
    }


def _warnings(run: Run, evaluation: Evaluation | None) -> list[str]:
    if evaluation is None:
        return [words.nothing_held_out(run)]
    caution = evaluation.caution
    return [f"{caution[:1].upper()}{caution[1:]}."] if caution else []
