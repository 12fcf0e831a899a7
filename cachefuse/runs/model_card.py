"""A run's model card in Markdown: model, figures, features, settings and use."""

import html
import re
from typing import TYPE_CHECKING

from cachefuse.metrics.tasks import TaskSlice
from cachefuse.printable import printable_lines
from cachefuse.settings import settings_of
from cachefuse.training.tasks import loss_of

if TYPE_CHECKING:
    from cachefuse.runs.run import Run


MOST_CLASSES = 100
KINDS = {
    "multiclass": "multi-class-classification",
    "multilabel": "multi-label-classification",
    "vqa": "visual-question-answering",
}


def model_card(run: "Run") -> str:
    """Return the text of a run's README.md; names from data cannot break its tables, add HTML or move a terminal."""
    config, n_models = run.config, len(run.members)
    heads = "a decoder" if config.is_generative else f"{config.head} heads"
    what = f"A {config.fusion} fusion of {' and '.join(run.modalities)} features with {heads}"
    if len(run.models) > 1:
        what = f"A blend of {' and '.join(f'{name} ({weight:.2f})' for name, weight in run.models.items())}"
    if run.sources:
        what = f"An ensemble of the runs {', '.join(_plain(name) for name in run.sources)}"
    kind = f"mean of {n_models} models" if n_models > 1 else "one model"
    lines = [
        "---",
        "library_name: cachefuse",
        f"tags: [{', '.join(sorted({KINDS[task.kind] for task in run.tasks}))}, "
        f"{', '.join(run.modalities)}, feature-cache]",
        "---",
        "",
        f"# {_plain(run.name)}",
        "",
        f"{what}, for the {len(run.classes)} classes of {_plain(run.dataset)} ({_task(run)}). {kind.capitalize()}, "
        f"{run.n_parameters:,} parameters, {run.size_mb:.2f} MB; trained in {run.seconds:.0f} s.",
        "",
    ]
    if run.leaderboard:
        lines += ["## How it was found", "", *map(_plain, run.leaderboard.reasons), ""]
    if run.results:
        lines += ["## Figures", ""]
        names = list(next(iter(run.results.values())).metrics)
        lines += _table(
            ["split", "rows", *names],
            [
                [split, f"{result.n_rows:,}", *(f"{result.metrics[name]:.4f}" for name in names)]
                for split, result in run.results.items()
            ],
        )
    if run.held_out is not None:
        unseen = {
            "oof": "`oof` is train and val; each row is scored by a model that has not seen it.",
        }.get(run.held_out.split, f"The models of these figures were not trained on `{run.held_out.split}`.")
        unseen += f" But {run.caution}." if run.caution else ""
        unseen += " Afterwards, the models in this folder were trained on all of it." if config.refit else ""
        chosen = " Each row's labels use thresholds chosen on other rows." if (run.thresholds != 0.5).any() else ""
        lines += ["", unseen + chosen]
    lines += ["", "## Features", ""]
    lines += _table(
        ["features", "encoder", "width", "key"],
        [
            [name, _plain(features.encoder), str(features.width), f"`{features.key}`"]
            for name, group in run.features.items()
            for features in group
        ],
    )
    lines += ["", "The model reads only features with these keys: encode new samples with the same encoders.", ""]
    lines += ["## Classes", ""]
    lines += _table(
        ["class", "threshold"],
        [
            [_plain(run.classes[c]), _threshold(task, run.thresholds[c])]
            for task in run.tasks
            for c in task.numbers[: max(0, MOST_CLASSES - task.columns.start)]
        ],
    )
    if len(run.classes) > MOST_CLASSES:
        lines += ["", f"and {len(run.classes) - MOST_CLASSES:,} more, in `run.json`"]
    if not run.sources and not run.leaderboard and len(run.models) == 1:
        given = {name: value for name, value in config.shown().items() if value not in (None, {}, ())}
        lines += ["", "## Settings", ""]
        known = settings_of(type(config))
        rows = [[name, _plain(known[name].text(value))] for name, value in given.items()]
        lines += _table(["setting", "value"], rows)
    meaning = "Scores rank labels; with this loss they are not probabilities."
    if run.calibration is not None:
        meaning = (
            "Scores are probabilities, calibrated on rows held out, for rows like these; on other rows they may be "
            "wrong."
        )
    elif run.leaderboard or all(loss_of(task, config.loss) in ("bce", "ce") for task in run.tasks):
        meaning = "Scores are probabilities for rows like the training rows; on other rows they may be wrong."
    lines += [
        "",
        "## Use",
        "",
        "```sh",
        f"cachefuse predict --run {run.name}",
        f'cachefuse predict --run {run.name} --image photo.jpg --text "what it shows"',
        "```",
        "",
        f"{meaning} Figures of a class with few rows are uncertain (`cachefuse evaluate` shows intervals).",
        "",
    ]
    return printable_lines("\n".join(lines))


def _task(run: "Run") -> str:
    """Return the kind of a run's task, or the names and kinds of several tasks."""
    return ", ".join(f"{task.name} {task.kind}" for task in run.tasks) if run.several else run.task


def _threshold(task: TaskSlice, threshold: float) -> str:
    if task.one_label:
        return "the highest score"
    return f"{threshold:.4f}" if threshold <= 1 else "more than 1: never predicted"


def _table(header: list[str], rows: list[list[str]]) -> list[str]:
    return [f"| {' | '.join(cells)} |" for cells in (header, ["---"] * len(header), *rows)]


def _plain(text: str) -> str:
    """Return untrusted text as one line that cannot end a cell or become HTML, a link, a mention or a formula."""
    escaped = html.escape(" ".join(text.split()), quote=False)
    marked = "".join(f"\\{c}" if c in "|[]`*_\\~$" else c for c in escaped)
    return re.sub(r"(?i)://|\bwww\.|@", lambda match: "".join(f"&#{ord(c)};" for c in match[0]), marked)
