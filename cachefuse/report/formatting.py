"""The sentences of a report, and how it writes names and figures."""

import math
from typing import TYPE_CHECKING

import numpy as np

from cachefuse.metrics import CALIBRATION_ERROR, metric_title
from cachefuse.metrics.thresholds import HALF
from cachefuse.training.data import OUT_OF_FOLD, TRAIN, VAL

if TYPE_CHECKING:
    from cachefuse.runs.evaluate import Evaluation
    from cachefuse.runs.run import Run


LONG_TITLES = {
    "calibration_error": "calibration error",
    "recall_at_p90": "recall at 90% precision",
    "top_calibration_error": "calibration error of the highest score",
}
MAX_NAME = 80
UNDEFINED, MINUS = "\N{EN DASH}", "\N{MINUS SIGN}"


def long_title(name: str) -> str:
    """Return a metric's long title."""
    return LONG_TITLES.get(name) or metric_title(name)


def figure(value: float | None) -> str:
    """Write a metric with three digits; an undefined one is a dash."""
    return UNDEFINED if value is None or math.isnan(value) else f"{value:.3f}".replace("-", MINUS)


def place(value: float) -> str:
    """Write a rank; a median may lie between two ranks."""
    return UNDEFINED if math.isnan(value) else f"{value:,.1f}".removesuffix(".0")


def signed(value: float) -> str:
    """Write a difference of metrics."""
    return UNDEFINED if math.isnan(value) else f"{value:+.3f}".replace("-", MINUS)


def interval(bounds: tuple[float, float]) -> str:
    """Write the ends of an interval."""
    return UNDEFINED if math.isnan(bounds[0]) else f"{bounds[0]:.3f} to {bounds[1]:.3f}"


def whole(n: int) -> str:
    return f"{n:,}"


def count(n: int) -> str:
    """Write a count with few characters, for a heatmap's cell."""
    return str(n) if n < 10_000 else f"{n // 1000}k" if n < 1_000_000 else f"{n // 1_000_000}M"


def cut(text: str, most: int = MAX_NAME) -> str:
    """Shorten a text to at most ``most`` characters."""
    return text if len(text) <= most else text[: most - 1].rstrip() + "…"


def ends(text: str, most: int = 22) -> str:
    """Shorten a name in the middle, since names may differ only at their ends."""
    return text if len(text) <= most else f"{text[: most - most // 2 - 1]}…{text[-(most // 2) :]}"


FILTERS = {
    "count": count, "cut": cut, "ends": ends, "figure": figure, "interval": interval, "metric": long_title,
    "place": place, "signed": signed, "whole": whole,
}  # fmt: skip


def rows_of(evaluation: "Evaluation") -> str:
    """Name the evaluated rows, and tell whether the models have seen them."""
    if evaluation.split == OUT_OF_FOLD:
        return f"{evaluation.n_rows:,} rows of train and val, each predicted by models that have not seen it"
    seen = "" if evaluation.caution else " that were not trained on"
    return f"{evaluation.n_rows:,} {evaluation.split} rows{seen}"


def verdict(evaluation: "Evaluation", task: str) -> str:
    """Return a sentence on the quality of the predictions."""
    right = f"{_percent(np.mean((evaluation.targets == evaluation.predictions).all(axis=1)))}"
    if task == "multiclass":
        return f"The class is right for {right} of {rows_of(evaluation)}."
    if task == "vqa":
        accuracy = _percent(evaluation.metrics["vqa_accuracy"])
        return f"VQA accuracy is {accuracy} on {rows_of(evaluation)}: an answer that four people gave is fully right."
    hits = (evaluation.targets & evaluation.predictions).sum()
    n_true, n_predicted = evaluation.targets.sum(), evaluation.predictions.sum()
    recall, precision = (_percent(hits / n) if n else "none" for n in (n_true, n_predicted))
    return (
        f"On {rows_of(evaluation)}, {recall} of the labels are found, {precision} of the predicted labels are right, "
        f"and {right} of the rows have every label right."
    )


def splits_note(run: "Run") -> str:
    """Tell which rows the models of each split's figures were trained on, and which rows chose the thresholds."""
    chosen = bool((run.thresholds != HALF).any())
    if OUT_OF_FOLD in run.results:
        thresholds = ", with thresholds chosen on the other folds" if chosen else ""
        return (
            f"oof (out of fold) is train and val: each fold is predicted by models trained on the other folds"
            f"{thresholds}."
        )
    if VAL in run.results:
        stopped = ", but val chose the epoch" if run.caution else ""
        thresholds = " Each part of val has thresholds chosen on the other parts." if chosen else ""
        refit = " Afterwards, the models that predict were trained on train and val." if run.config.refit else ""
        return f"The models of these figures were not trained on val{stopped}.{thresholds}{refit}"
    with_val = any(member.config.folds or member.config.refit for member in run.members)
    return f"The models were trained on {'train and val' if with_val else 'train'}."


def thresholds_note(run: "Run", least: int) -> str:
    """Tell how scores become labels; ``least`` is the minimum number of labels of a row."""
    others = "; held-out rows use one chosen on other rows" if run.held_out and (run.thresholds != HALF).any() else ""
    fewest = f" Each row gets at least {least} label{'s' * (least > 1)}." if least else ""
    return f"A label is predicted if its score reaches the threshold{others}.{fewest}"


def calibration_note(evaluation: "Evaluation", kind: str) -> str:
    """Tell how well scores agree with probabilities, and what calibration changed."""
    name = CALIBRATION_ERROR[kind]
    errors = evaluation.calibration_errors.get(name)
    before = f"; before calibration it was {figure(errors[0])}" if errors else ""
    return (
        f"Of labels with a score of 0.7, 70% should be right. The mean difference, the calibration error, is "
        f"{figure(evaluation.metrics[name])}{before}."
    )


def nothing_held_out(run: "Run") -> str:
    """Tell where to find, or how to get, figures on rows that the run has not seen."""
    new = [split for split in run.results if split not in (TRAIN, VAL)]
    if new:
        return f"This run held out no rows: only its figures on {' and '.join(new)} are on new rows."
    advice = "Its runs held out different rows, or none: name" if run.sources else "Train with --folds 5, or name"
    return (
        f"This run held out no rows, so its quality on new rows is unknown. {advice} a labelled split that it has not "
        f"seen with --split."
    )


def training_note(run: "Run", most: int) -> str:
    """Return the note above the training curves, which show up to ``most`` models."""
    n = len(run.histories)
    models = "One model" if n == 1 else f"{n:,} models, a line for each" + (f" of the first {most}" if n > most else "")
    best = sorted(history.best_epoch for history in run.histories)
    span = f"epoch {best[0]}" if best[0] == best[-1] else f"epochs {best[0]} to {best[-1]}"
    kept = f"{models}; the dot marks the epoch whose weights were kept ({span})."
    return f"{kept} Afterwards, the models that predict were trained on all rows." if run.config.refit else kept


def _percent(share: float) -> str:
    """Write a share in whole percent; only exact shares are written as 0% and 100%."""
    return "> 99%" if 0.995 <= share < 1 else "< 1%" if 0 < share < 0.005 else f"{100 * share:.0f}%"
