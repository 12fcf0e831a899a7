"""A run as one HTML page that needs nothing else: no network, no other file, no scripts."""

from pathlib import Path
from typing import Any

from cachefuse.cache.store import FeatureStore
from cachefuse.data.dataset import Dataset
from cachefuse.data.targets import is_labelled
from cachefuse.evaluation import Evaluation
from cachefuse.report import about, tables, words
from cachefuse.report.curves import MAX_MODELS, precision_recall_chart, training_charts
from cachefuse.report.gallery import worst_examples
from cachefuse.report.measured import OnProgress, measure
from cachefuse.report.render import check_target, render
from cachefuse.runtime import write_atomically
from cachefuse.training.run import Run

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
    multiclass = run.task == "multiclass"
    thresholds = None if multiclass else run.thresholds
    labelled = store.targets[is_labelled(store.targets)]
    several = not multiclass and len(run.classes) > 1
    context: dict[str, Any] = {
        "run": run,
        "measured": measured,
        "ablations": without,
        "why_not": why_not,
        "metrics": run.manifest.reported_metrics,
        "warnings": _warnings(run, measured),
        "together": tables.cooccurrence(labelled > 0, run.classes) if several else None,
        "n_labelled": len(labelled),
        "splits_note": words.splits_note(run),
        "has_thresholds": not multiclass,
        "thresholds_note": words.thresholds_note(run),
        "charts": training_charts(run),
        "training_note": words.training_note(run, MAX_MODELS) if run.histories else "",
        "facts": about.provenance(run),
        "settings": about.settings(run),
        "train_command": about.train_command(run),
        "predict_command": about.predict_command(run),
    }
    if measured is None:
        return render(TEMPLATE, {**context, **_classes_on_last_split(run)})
    figures = measured.per_class
    chart, class_curves = precision_recall_chart(measured, run.classes)
    confused = tables.confusion if multiclass else tables.mistakes
    context |= {
        "verdict": words.verdict(measured, run.task),
        "weakest": tables.weakest(figures, run.classes),
        "rows": words.rows_of(measured),
        "classes": tables.class_figures(figures, run.classes, thresholds),
        "precision_recall": chart,
        "class_curves": class_curves,
        "confused": confused(measured, run.classes),
        "pairs": tables.frequent_mistakes(measured, run.classes),
        "gates": tables.gates_by_class(measured),
        "examples": worst_examples(measured, run.classes, run.task, store.ids, dataset),
        "has_raw": dataset is not None,
    }
    return render(TEMPLATE, context)


def _classes_on_last_split(run: Run) -> dict[str, Any]:
    """Return the classes' figures on the last split that the run was measured on, seen or not."""
    if not run.results:
        return {"classes": []}
    split, result = list(run.results.items())[-1]
    thresholds = None if run.task == "multiclass" else run.thresholds
    figures = tables.class_figures(result.per_class, run.classes, thresholds)
    return {"classes": figures, "rows": f"{result.n_rows:,} {split} rows"}


def _warnings(run: Run, measured: Evaluation | None) -> list[str]:
    if measured is None:
        return [words.nothing_held_out(run)]
    caution = measured.caution
    return [f"{caution[:1].upper()}{caution[1:]}."] if caution else []
