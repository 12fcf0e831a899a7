"""What the report calls things, and how it writes figures."""

import math
from typing import TYPE_CHECKING

import numpy as np

from cachefuse.metrics import metric_title
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
    """Return a metric's title where there is room for it."""
    return LONG_TITLES.get(name) or metric_title(name)


def figure(value: float | None) -> str:
    """Write a metric with three digits, and a dash where it is not defined."""
    return UNDEFINED if value is None or math.isnan(value) else f"{value:.3f}".replace("-", MINUS)


def place(value: float) -> str:
    """Write a rank, which may lie between two."""
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
    """Write a count in the little room of a heatmap's cell."""
    return str(n) if n < 10_000 else f"{n // 1000}k" if n < 1_000_000 else f"{n // 1_000_000}M"


def cut(text: str, most: int = MAX_NAME) -> str:
    """Shorten a text that is too long for its place."""
    return text if len(text) <= most else text[: most - 1].rstrip() + "…"


def ends(text: str, most: int = 22) -> str:
    """Shorten a name in the middle, since names may differ in their ends alone."""
    return text if len(text) <= most else f"{text[: most - most // 2 - 1]}…{text[-(most // 2) :]}"


FILTERS = {
    "count": count, "cut": cut, "ends": ends, "figure": figure, "interval": interval, "metric": long_title,
    "place": place, "signed": signed, "whole": whole,
}  # fmt: skip


def rows_of(measured: "Evaluation") -> str:
    """Say which rows were measured, and whether the models have seen them."""
    if measured.split == OUT_OF_FOLD:
        return f"{measured.n_rows:,} rows of train and val, each judged by models that have not seen it"
    seen = "" if measured.caution else " that were not trained on"
    return f"{measured.n_rows:,} {measured.split} rows{seen}"


def verdict(measured: "Evaluation", task: str) -> str:
    """Say in a sentence how good the predictions are."""
    right = f"{_percent(np.mean((measured.targets == measured.predictions).all(axis=1)))}"
    if task == "multiclass":
        return f"The class is right for {right} of {rows_of(measured)}."
    if task == "vqa":
        accuracy = _percent(measured.metrics["vqa_accuracy"])
        return f"VQA accuracy is {accuracy} on {rows_of(measured)}: an answer that three people gave is wholly right."
    hits = (measured.targets & measured.predictions).sum()
    there, given = measured.targets.sum(), measured.predictions.sum()
    found, correct = (_percent(hits / n) if n else "none" for n in (there, given))
    return (
        f"On {rows_of(measured)}, {found} of the labels are found, {correct} of the predicted labels are right, and "
        f"{right} of the rows have every label right."
    )


def splits_note(run: "Run") -> str:
    """Say how the figures of each split came about."""
    chosen = bool((run.thresholds != HALF).any())
    decided = ", and decided on by thresholds chosen on the others" if chosen else ""
    if OUT_OF_FOLD in run.results:
        return f"oof, out of fold, is train and val: each part is judged by models trained on the others{decided}."
    if VAL in run.results:
        stopped = ", but says when training stops" if run.config.patience else ""
        parts = "; each part of it is" + decided.removeprefix(", and") if chosen else ""
        since = " The models that predict were trained on it after that." if run.config.refit else ""
        return f"val is not trained on{stopped}{parts}.{since}"
    whole = any(member.config.folds or member.config.refit for member in run.members)
    return f"The models were trained on {'train and val' if whole else 'train'}."


def thresholds_note(run: "Run", least: int) -> str:
    """Say how scores become labels, of which a row gets so many at least."""
    others = "; for rows held out, one that other rows chose" if run.held_out and (run.thresholds != HALF).any() else ""
    fewest = f" Each row gets at least {least} label{'s' * (least > 1)}." if least else ""
    return f"A label is given where its score reaches the threshold{others}.{fewest}"


def nothing_held_out(run: "Run") -> str:
    """Say where to look, or what to do, for figures of rows that the run has not seen."""
    new = [split for split in run.results if split not in (TRAIN, VAL)]
    if new:
        return f"This run held out no rows: only its figures on {' and '.join(new)} say how good it is on new ones."
    advice = "Its runs held out different rows, or none" if run.sources else "Train with --folds 5"
    return (
        f"This run held out no rows, so nothing here says how good it is on new ones. {advice}; or name a labelled "
        f"split that it has not seen by --split."
    )


def training_note(run: "Run", most: int) -> str:
    """Say what the curves show."""
    n = len(run.histories)
    models = "One model" if n == 1 else f"{n:,} models, a line for each" + (f" of the first {most}" if n > most else "")
    best = sorted(history.best_epoch for history in run.histories)
    span = f"epoch {best[0]}" if best[0] == best[-1] else f"epochs {best[0]} to {best[-1]}"
    kept = f"{models}; the dot marks the epoch whose weights were kept ({span})."
    return f"{kept} Models trained on all rows since then are those that predict." if run.config.refit else kept


def _percent(share: float) -> str:
    """Write a share in whole percent, but not as all or nothing where it is not."""
    return "> 99%" if 0.995 <= share < 1 else "< 1%" if 0 < share < 0.005 else f"{100 * share:.0f}%"
