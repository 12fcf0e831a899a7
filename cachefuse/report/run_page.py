"""A run as one HTML page that needs nothing else: no network, no other file, no scripts."""

from pathlib import Path

import numpy as np

from cachefuse.data.dataset import Dataset
from cachefuse.files import write_atomically
from cachefuse.metrics import headline
from cachefuse.metrics.tasks import TaskSlice
from cachefuse.report import formatting as words
from cachefuse.report import provenance as about
from cachefuse.report import tables
from cachefuse.report.curves import MAX_MODELS, precision_recall_chart, training_charts
from cachefuse.report.gallery import N_EXAMPLES, worst_examples
from cachefuse.report.measured import OnProgress, measure
from cachefuse.report.render import check_target, render
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
    """Write a run's report, whole or not at all, and return its path. The rest is as in ``report_html``.

    Raises ConfigError if there can be no such file.
    """
    check_target(path)
    page = report_html(run, store, dataset, split=split, device=device, on_progress=on_progress)
    write_atomically(path, page.encode())
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

    It is about the rows that the run held out, or a labelled ``split`` of the store. ``dataset`` is the raw data, for
    the pictures and texts of the worst errors; without it they are left out. Names and texts from data are escaped.

    Raises as ``evaluate`` does.
    """
    measured, without, why_not = measure(run, store, split, device, on_progress)
    context: dict[str, object] = {
        "run": run,
        "measured": measured,
        "ablations": without,
        "why_not": why_not,
        "metrics": headline(run.manifest.reported_metrics),
        "warnings": _warnings(run, measured),
        "together_of": [part for task in run.tasks if (part := _together(run, store, task))],
        "splits_note": words.splits_note(run),
        "charts": training_charts(run),
        "training_note": words.training_note(run, MAX_MODELS) if run.histories else "",
        "facts": about.provenance(run),
        "settings": about.settings(run),
        "train_command": about.train_command(run),
        "predict_command": about.predict_command(run),
        "has_raw": dataset is not None,
    }
    if measured is None:
        parts = [_classes_on_last_split(run, task) for task in run.tasks] if run.results else []
    else:
        parts = [_part(run, measured, task, store.ids, dataset) for task in run.tasks]
    return render(TEMPLATE, {**context, "parts": parts})


def _part(
    run: Run, all_tasks: Evaluation, task: TaskSlice, ids: np.ndarray, dataset: Dataset | None
) -> dict[str, object]:
    """Return what the page says of one task, of the dataset's only one or of several."""
    measured = all_tasks.of_task(task) if task.name else all_tasks
    multiclass, classes = task.kind == "multiclass", measured.classes
    chart, class_curves = precision_recall_chart(measured, classes)
    return {
        "name": task.name,
        "kind": task.kind,
        "measured": measured,
        "n_classes": task.n_classes,
        "verdict": words.verdict(measured, task.kind),
        "weakest": tables.weakest(measured.per_class, classes),
        "rows": words.rows_of(measured),
        "classes": tables.class_figures(measured.per_class, classes, _thresholds(run, task)),
        "thresholds_note": "" if task.one_label else words.thresholds_note(run, task.min_labels),
        "precision_recall": chart,
        "class_curves": class_curves,
        "confused": (tables.confusion if multiclass else tables.mistakes)(measured, classes),
        "pairs": tables.frequent_mistakes(measured, classes),
        "gates": tables.gates_by_class(measured),
        "examples": worst_examples(measured, classes, task.kind, ids, dataset, N_EXAMPLES // len(run.tasks)),
    }


def _thresholds(run: Run, task: TaskSlice) -> np.ndarray | None:
    return None if task.one_label else run.thresholds[task.columns]


def _together(run: Run, store: FeatureStore, task: TaskSlice) -> dict[str, object] | None:
    """Return which labels of a multi-label task come together in the store; None if that can't be."""
    if task.one_label or task.n_classes < 2:
        return None
    (labelled,) = task.own(store.targets)
    classes = tuple(task.own_class(name) for name in run.classes[task.columns])
    together = tables.cooccurrence(labelled > 0, classes)
    return {"name": task.name, "together": together, "n_labelled": len(labelled)}


def _classes_on_last_split(run: Run, task: TaskSlice) -> dict[str, object]:
    """Return the classes' figures on the last split that the run was measured on, seen or not."""
    split, result = list(run.results.items())[-1]
    by = {name: values[task.columns] for name, values in result.per_class.items()}
    classes = tuple(task.own_class(name) for name in run.classes[task.columns])
    return {
        "name": task.name,
        "n_classes": task.n_classes,
        "classes": tables.class_figures(by, classes, _thresholds(run, task)),
        "thresholds_note": "" if task.one_label else words.thresholds_note(run, task.min_labels),
        "rows": f"{result.n_rows:,} {split} rows",
    }


def _warnings(run: Run, measured: Evaluation | None) -> list[str]:
    if measured is None:
        return [words.nothing_held_out(run)]
    caution = measured.caution
    return [f"{caution[:1].upper()}{caution[1:]}."] if caution else []
