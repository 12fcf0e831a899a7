"""The curves of a report: loss and score over epochs, precision over recall."""

from dataclasses import dataclass

import numpy as np

from cachefuse.metrics import CALIBRATION_ERROR
from cachefuse.metrics.calibration import reliability
from cachefuse.report.charts import MAIN, SECOND, THIN, Chart, Line, line_chart, path
from cachefuse.report.formatting import cut, long_title
from cachefuse.runs.evaluate import Evaluation
from cachefuse.runs.run import Run
from cachefuse.training.loop import History

MAX_MODELS = 50
MAX_CLASSES = 12  # with a precision-recall curve
MAX_STEPS = 200  # points of a precision-recall curve
FEWEST_SCORES = 10  # in a bin, for a point of a reliability curve


@dataclass(frozen=True)
class ClassCurve:
    """A class's precision-recall curve in a box of 100 by 100, and its average precision."""

    name: str
    path: str
    ap: float


def training_charts(run: Run) -> list[Chart]:
    """Return charts of the loss and, with validation rows, of the score over the epochs, with a line per model."""
    histories = [history for history in run.histories if history.epochs][:MAX_MODELS]
    if not histories:
        return []
    losses, monitors = (
        {getattr(member.config, name) for member in run.members} for name in ("loss", "monitored_metric")
    )
    loss = losses.pop() if len(losses) == 1 else "loss"
    metric = long_title(monitors.pop() or run.manifest.main_metric) if len(monitors) == 1 else "score"
    averaged = any(epoch.raw_score is not None for history in histories for epoch in history.epochs)
    kept = "averaged weights (EMA)" if averaged else "validation"
    charts = []
    for stage in ("",) if run.sources else run.config.stages or ("",):
        of_stage, suffix = [_in_stage(history, stage) for history in histories], f", {stage}" if stage else ""
        names = {"raw_score": "weights without averaging", "score": kept}
        charts += [
            epochs_chart(f"Loss{suffix}", loss, of_stage, {"loss": "training", "val_loss": kept}),
            epochs_chart(f"Validation {metric}{suffix}", metric, of_stage, names),
        ]
    return [chart for chart in charts if chart.paths]


def _in_stage(history: History, stage: str) -> History:
    """Return the history of one stage of a training."""
    if stage not in history.earlier:
        return history  # the last stage
    return History(history.earlier[stage], history.stages[stage])


def epochs_chart(title: str, y_label: str, histories: list[History], names: dict[str, str]) -> Chart:
    """Return a chart of figures over epochs; ``names`` are {field of Epoch: legend}.

    Fields without values are left out. The last of the others is the main line, with a dot on the kept epoch.
    """
    shown = [name for name in names if any(getattr(epoch, name) is not None for h in histories for epoch in h.epochs)]
    lines, legend = [], []
    for name in shown:
        kind = MAIN if name == shown[-1] else SECOND
        legend.append((kind, names[name]))
        for i, history in enumerate(histories):
            x = np.array([epoch.epoch for epoch in history.epochs], float)
            y = np.array([getattr(epoch, name) for epoch in history.epochs], float)
            model = f", model {i + 1}" if len(histories) > 1 else ""
            mark = history.best_epoch - 1 if kind == MAIN and 0 < history.best_epoch <= len(y) else None
            lines.append(Line(kind, x, y, names[name] + model, mark))
    n_epochs = max(len(history.epochs) for history in histories)
    about = f"{title}: {' and '.join(what for _, what in legend)} over {n_epochs:,} epochs."
    return line_chart(lines, title=title, about=about, x_label="epoch", y_label=y_label, legend=legend)


def precision_recall_chart(evaluation: Evaluation, classes: tuple[str, ...]) -> tuple[Chart | None, list[ClassCurve]]:
    """Return the precision-recall chart of all labels pooled, with a thin line per class, and a curve per class.

    The chart is None if no row has a label.
    """
    targets, scores = evaluation.targets, evaluation.scores
    support = targets.sum(axis=0)
    shown = [c for c in np.argsort(-support, kind="stable")[:MAX_CLASSES] if support[c]]
    if not shown:
        return None, []
    by_class = {c: precision_recall(targets[:, c], scores[:, c]) for c in shown}
    several = len(classes) > 1
    lines = [Line(THIN, *by_class[c], title=classes[c]) for c in shown if several]
    together = "all labels together" if several else cut(classes[0])
    lines.append(Line(MAIN, *precision_recall(targets.ravel(), scores.ravel()), title=together))
    chart = line_chart(
        lines,
        title="All labels together" if several else cut(classes[0]),
        about=f"Precision over recall{' of all labels together, and of each class' if several else ''}.",
        x_label="recall",
        y_label="precision",
        legend=[(MAIN, "all labels together"), (THIN, "one class each")] if several else [],
        unit=True,
    )
    ap = evaluation.per_class["ap"]
    each = [ClassCurve(classes[c], path(100 * by_class[c][0], 100 - 100 * by_class[c][1]), ap[c]) for c in shown]
    return chart, each


def reliability_chart(evaluation: Evaluation, kind: str) -> Chart | None:
    """Return the share of right labels over their score, in bins, after and before calibration.

    It is None for answers to questions, which may be right in part, and without rows.
    """
    if kind not in CALIBRATION_ERROR or not len(evaluation.rows):
        return None
    before = {"before calibration": evaluation.raw_scores} if len(evaluation.raw_scores) else {}
    lines, even = [], np.array([0.0, 1.0])
    after = "after calibration" if before else "scores"
    for name, scores in {**before, after: evaluation.scores}.items():
        x, y, counts = reliability(evaluation.targets, scores, kind)
        some = counts >= FEWEST_SCORES
        lines.append(Line(SECOND if name in before else MAIN, x[some], y[some], name))
    lines = [line for line in lines if len(line.x)]
    return line_chart(
        [Line(THIN, even, even, "as it should be"), *lines],
        title="The highest score of each row" if kind == "multiclass" else "All scores",
        about="The share of labels that are right, over their score.",
        x_label="score",
        y_label="share that is right",
        legend=[(THIN, "as it should be"), *((line.kind, line.title) for line in lines)],
        unit=True,
    )


def precision_recall(targets: np.ndarray, scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return recall, ascending, and precision (T,) at up to 200 of the positives' scores; ``targets`` (n,) are bool."""
    positives = np.sort(scores[targets])
    places = np.linspace(0, len(positives) - 1, min(MAX_STEPS, len(positives))).round().astype(int)
    thresholds = np.unique(positives[places])
    hits = len(positives) - np.searchsorted(positives, thresholds)
    reached = np.bincount(np.searchsorted(thresholds, scores, side="right"), minlength=len(thresholds) + 1)
    predicted = reached[::-1].cumsum()[::-1][1:]  # scores that reach each threshold
    return (hits / len(positives))[::-1], (hits / predicted)[::-1]
