"""Output for people: tables to stdout, messages to stderr."""

import errno
import logging
import math
import os
import signal
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from rich.console import Group
from rich.text import Text as RichText

from cachefuse.files import JsonObject, to_json
from cachefuse.metrics import MEAN, metric_title
from cachefuse.printable import escape_json, listed
from cachefuse_cli.shared.console import Console, Table, Text, err, lines, new_table, out

if TYPE_CHECKING:
    from cachefuse.data.dataset import Dataset
    from cachefuse.encoders import Family
    from cachefuse.runs.predict import Predictions
    from cachefuse.runs.run import Run


MAX_CLASSES = 30


class _NoteHandler(logging.Handler):
    """Prints each message once, even if several steps of a command log it."""

    def __init__(self) -> None:
        super().__init__()
        self.printed: set[str] = set()

    def emit(self, record: logging.LogRecord) -> None:
        message = record.getMessage()
        if message not in self.printed:
            self.printed.add(message)
            note(message)


def error(data: BaseException) -> None:
    """Print an error in one red line, and its notes below it."""
    message = _message(data)
    console = err()
    _print_message(console, Text.assemble(("error: ", "bold red"), (message, "red")))
    for line in getattr(data, "__notes__", ()):
        console.print(Text(line), soft_wrap=True)


def usage_error(data: Any) -> None:
    """Print an error of the command line, as typer raises it, below the command's usage."""
    console = err()
    if (context := data.ctx) is not None:
        console.print(" ".join(context.get_usage().split()), soft_wrap=True)
        console.print(f"Try '{context.command_path} -h' for help.", soft_wrap=True)
    error(ValueError(data.format_message()))


def _message(data: BaseException) -> str:
    """Return what is wrong, in which file, and what to do."""
    if out_of_memory(data):
        return (
            "out of memory; try a smaller --batch-size, --memory, --layers or --limit, or allow this process more "
            "(ulimit -v)"
        )
    if out_of_threads(data):
        return "the system allows no more threads; allow this user more of them, or more memory (ulimit -u, ulimit -v)"
    if not isinstance(data, OSError) or not data.strerror:
        return str(data) or type(data).__name__
    where = f"{data.filename}: " if data.filename else ""
    if data.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"{where}the disk is full; free some space and run the same command again: finished work is kept"
    if data.errno == errno.EFBIG and data.strerror == os.strerror(errno.EFBIG):  # of the system, not of our limits
        return f"{where}{data.strerror}; allow larger files here (ulimit -f, or another file system)"
    if data.strerror.startswith("No usable temporary directory"):
        return f"{data.strerror}; free space there, allow larger files (ulimit -f), or name another folder in TMPDIR"
    if data.errno in (errno.EIO, errno.ESTALE, errno.ENOTCONN, errno.ETIMEDOUT):
        return f"{where}{data.strerror}; the disk or mount fails: mend it and run the same command again"
    return f"{where}{data.strerror}" if where else str(data)


def out_of_memory(data: BaseException) -> bool:
    """Whether an error means out of memory: in Python, in torch on CUDA or the CPU, or of the system."""
    if isinstance(data, OSError):
        return data.errno == errno.ENOMEM
    words = str(data).lower() if isinstance(data, RuntimeError | ImportError) else ""
    named = isinstance(data, MemoryError) or type(data).__name__ == "OutOfMemoryError"
    return named or any(sign in words for sign in ("allocate memory", "failed to map segment"))


def out_of_threads(data: BaseException) -> bool:
    """Whether an error means that the system gives no more threads or processes."""
    if isinstance(data, OSError):
        return data.errno == errno.EAGAIN
    return isinstance(data, RuntimeError) and "can't start new thread" in str(data)


def _print_message(console: Console, text: RichText) -> None:
    """Print text: wrapped between words on a terminal, on one line for other programs."""
    console.print(text, soft_wrap=not console.is_terminal)


def note(message: str) -> None:
    """Print a message that is not a result."""
    _print_message(err(), Text.assemble(("note: ", "yellow"), message))


def print_json(value: object) -> None:
    """Print a result for machines: text stays readable where the output can hold it."""
    text = escape_json(to_json(value))
    try:
        text.encode(sys.stdout.encoding or "utf-8")
    except UnicodeEncodeError:
        text = escape_json(text, ascii_only=True)
    sys.stdout.write(text + "\n")


@contextmanager
def status(message: str) -> Iterator[None]:
    """Show a spinner during work of unknown length; log messages appear as notes."""
    logger = logging.getLogger("cachefuse")
    if not logger.handlers:
        logger.addHandler(_NoteHandler())
        logger.propagate = False
    console = err()
    if not console.is_terminal:
        yield
        return
    with console.status(f"{message} ..."):
        yield


@contextmanager
def interruptible(how_to_go_on: str) -> Iterator[None]:
    """Turn Ctrl-C into exit code 130 and a note that says what to do."""
    try:
        yield
    except KeyboardInterrupt:
        raise interrupted(how_to_go_on) from None


def interrupted(how_to_go_on: str) -> typer.Exit:
    """Print what to do after Ctrl-C, and return the exception that ends the command; another Ctrl-C changes nothing."""
    with suppress(ValueError):  # not of the main thread
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    note(f"interrupted; {how_to_go_on}")
    return typer.Exit(130)


def dataset_line(dataset: "Dataset") -> None:
    """Print the dataset in use."""
    err().print(
        Text.assemble(
            ("dataset ", "dim"), (dataset.name, "bold"),
            f": {len(dataset):,} samples ({split_counts(dataset.splits.tolist())}); {listed(dataset.modalities)}",
        ),
        soft_wrap=True,
    )  # fmt: skip


def split_counts(splits: Sequence[str]) -> str:
    """Return the rows per split, such as "train 2,425, val 632, test 620"."""
    from cachefuse.data.splits import ordered_splits

    counts = Counter(splits)
    return listed(f"{name} {counts[name]:,}" for name in ordered_splits(splits))


def run_line(run: "Run") -> None:
    """Print the run in use."""
    used = listed(f"{encoder} ({modality})" for encoder, modality in run.encoders)
    kind = f"{run.config.fusion} of"
    if len(run.models) > 1:
        kind = f"blend of {listed(f'{name} ({weight:.2f})' for name, weight in run.models.items())}; reads"
    if run.sources:
        kind = f"ensemble of {listed(run.sources)}; reads"
    err().print(Text.assemble(("run ", "dim"), (run.name, "bold"), f": {kind} {used}"), soft_wrap=True)


def run_dict(run: "Run") -> JsonObject:
    return {
        "run": run.name,
        "path": str(run.path),
        "dataset": run.dataset,
        "classes": list(run.classes),
        "rows": {split: result.n_rows for split, result in run.results.items()},
        "metrics": run.metrics,
        "caution": run.caution,
        "per_class": {split: result.per_class for split, result in run.results.items()},
        "thresholds": run.thresholds.tolist(),
        "calibration_errors": run.calibration_errors,
        "best_epochs": [history.best_epoch for history in run.histories],
        "models": len(run.members),
        "parameters": run.n_parameters,
        "size_mb": run.size_mb,
        "seconds": run.seconds,
        **({"leaderboard": asdict(run.leaderboard)} if run.leaderboard else {}),
    }


def run_report(run: "Run") -> None:
    """Print metrics per split, figures per class on the rows held out, size and time, and the next step."""
    console = out()
    run_line(run)
    console.print(_by_task(run) if run.several else _by_split(run))
    _per_class(console, run, list(run.metrics)[:2][-1] if run.held_out is None else run.held_out.split)
    if run.caution:
        note(run.caution)
    models = f"{len(run.members)} models with " if len(run.members) > 1 else ""
    console.print(f"{models}{run.n_parameters:,} parameters, {run.size_mb:.2f} MB; {run.seconds:.1f} s{_epochs(run)}")
    if (run.thresholds != 0.5).any():
        chosen = [x for task in run.tasks if not task.one_label for x in run.thresholds[task.columns]]
        low, high = min(chosen), max(chosen)
        thresholds = f"thresholds {low:.3f} to {high:.3f}, by class" if low < high else f"threshold {low:.3f}"
        console.print(f"{thresholds}: a label is predicted if its score reaches it")
    if run.calibration_errors:
        console.print(f"calibrated ({run.config.calibrate}): {calibrated(run.calibration_errors)}")
    console.print(Text.assemble(("run   ", "dim"), str(run.path)), soft_wrap=True)
    console.print(Text.assemble(("next  ", "dim"), "cachefuse predict"), soft_wrap=True)


def calibrated(errors: Mapping[str, tuple[float, float]]) -> str:
    """Return the calibration errors before and after calibration, in words."""
    named = (f"{metric_title(name)} {_figure(x)} before, {_figure(y)} after" for name, (x, y) in errors.items())
    return "; ".join(named)


def _by_split(run: "Run") -> Table:
    names = list(next(iter(run.metrics.values())))
    table = new_table("split", "rows", *(metric_title(name) for name in names), numbers=len(names) + 1)
    for split, result in run.results.items():
        table.add_row(split, f"{result.n_rows:,}", *(_figure(result.metrics[name]) for name in names))
    return table


def _by_task(run: "Run") -> Table:
    """Return a table with, for each split, the mean of the tasks' main metrics and a row per task."""
    metrics = next(iter(run.metrics.values()))
    names = list(dict.fromkeys(name.partition(".")[2] for name in metrics if "." in name))
    titles = map(title_lines, names)
    table = new_table("split", "task", MEAN, *titles, numbers=len(names) + 1)
    for split, result in run.results.items():
        table.add_row(split, Text(f"{result.n_rows:,} rows", "dim"), _figure(result.metrics[MEAN]))
        for task in run.tasks:
            figures = (result.metrics.get(task.named(name)) for name in names)
            table.add_row("", task.name, "", *("" if x is None else _figure(x) for x in figures))
    return table


def _epochs(run: "Run") -> str:
    best = [history.best_epoch for history in run.histories]
    if len(best) == 1:
        return f"; weights of epoch {best[0]} of {len(run.histories[0].epochs)}"
    return f"; epochs {min(best)} to {max(best)}" if best and min(best) < max(best) else ""


def _per_class(console: Console, run: "Run", split: str) -> None:
    figures = run.results[split].per_class
    order = list(range(len(run.classes)))
    title = f"classes on {split}"
    if len(run.classes) > MAX_CLASSES:
        order = sorted(order, key=lambda c: (figures["f1"][c], c))[:MAX_CLASSES]
        title += f", the {MAX_CLASSES} lowest F1 of {len(run.classes)}"
    table = new_table("class", "rows", "precision", "recall", "F1", "AP", numbers=5, title=title)
    for c in order:
        values = (_figure(figures[name][c]) for name in ("precision", "recall", "f1", "ap"))
        table.add_row(run.classes[c], f"{figures['support'][c]:,.0f}", *values)
    console.print(table)


def submission_report(
    predictions: "Predictions", path: Path, scores: Path | None = None, *, checked: Path | None
) -> None:
    """Print the number of rows, the number of labels, and the files."""
    n = predictions.labels.sum()
    against = f", checked against {checked.name}" if checked else ""
    out().print(
        Text(f"{len(predictions.ids):,} rows, {n:,} labels ({n / max(1, len(predictions.ids)):.2f} per row){against}")
    )
    for written in (path, scores):
        if written is not None:
            out().print(Text.assemble(("wrote ", "dim"), str(written)), soft_wrap=True)


def page_written(path: Path) -> None:
    """Print the path and size of a page."""
    from cachefuse.files import format_bytes

    size = format_bytes(path.stat().st_size)
    out().print(Text.assemble(("wrote ", "dim"), f"{path} ({size})"), soft_wrap=True)


def prediction(predictions: "Predictions", *, as_json: bool) -> None:
    """Print the labels and the most likely classes of one new sample."""
    scores, chosen = predictions.scores[0], predictions.labels[0]
    groups = [task.numbers.tolist() for task in predictions.tasks] or [range(len(scores))]
    order = [sorted(group, key=lambda c: -scores[c]) for group in groups]
    if as_json:
        ranked = {predictions.classes[c]: float(scores[c]) for group in order for c in group}
        by_task = {"tasks": predictions.by_task(0)} if predictions.tasks else {}
        print_json({"labels": predictions.names(0), **by_task, "scores": ranked})
        return
    table = new_table("class", "score", "label", numbers=1)
    for group in order:
        for c in group[: max(10 // len(order), int(chosen[group].sum()))]:
            table.add_row(predictions.classes[c], f"{scores[c]:.3f}", Text("yes" if chosen[c] else "", "green"))
    out().print(table)


def datasets(rows: Sequence[JsonObject]) -> None:
    """Print the built-in datasets, and how to use another one."""
    table = new_table("dataset", "task", "size", "splits", "data")
    table.columns[2].justify = "right"
    for row in rows:
        data = Text("built in" if row["builtin"] else "yes", "green") if row["data"] else Text("no", "dim")
        size = f"{sum(row['rows'].values()):,}"
        table.add_row(Text(row["name"], "bold"), row["task"], size, listed(row["splits"]), data)
    out().print(table)
    out().print("Your own dataset: cachefuse extract --dataset ./mine.toml (the README shows a manifest)")


def encoders(families: "Mapping[str, Family]", default: str) -> None:
    """Print the encoder families, with an example for each."""
    table = new_table("family", "encodes", "example")
    for name, family in families.items():
        table.add_row(Text(name, "bold"), family.modalities, family.example)
        table.add_row("", "", Text(family.about, "dim"))
    out().print(table)
    out().print(f"The default is {default}. Weights come from model hubs or local files.")


def demo_report(runs: Sequence["Run"], store: Path, best: "Run", predictions: "Predictions", written: Path) -> None:
    """Print the demo's runs on the validation split, with the best value of each column in green."""
    console = out()
    names = list(best.metrics["val"])
    top = {name: max(run.metrics["val"][name] for run in runs) for name in names}
    title = f"{best.dataset}: validation, {best.results['val'].n_rows:,} samples that the heads have not seen"
    table = new_table("fusion", *(metric_title(name) for name in names), "seconds", numbers=len(names) + 1, title=title)
    for run in runs:
        values = [(run.metrics["val"][name], top[name]) for name in names]
        cells = (Text(f"{value:.3f}", "bold green" if value == best_value else "") for value, best_value in values)
        table.add_row(run.config.fusion, *cells, f"{run.seconds:.1f}")
    console.print(table)
    console.print("Some classes need only the image, some only the text, and some both:")
    console.print("fusion can predict all of them.")
    console.print(Text.assemble(("store ", "dim"), str(store)), soft_wrap=True)
    console.print(Text.assemble(("runs  ", "dim"), str(best.path.parent if best.path else "")), soft_wrap=True)
    console.print(
        Text.assemble(("wrote ", "dim"), f"{written} ({len(predictions.ids):,} rows, by {best.name})"), soft_wrap=True
    )
    console.print(Text.assemble(("next  ", "dim"), "cachefuse datasets, cachefuse encoders, cachefuse extract --help"))


def title_lines(metric: str) -> Group:
    """Return a metric's title for a narrow column: a word a line."""
    return lines(*metric_title(metric).replace("-", " ").split(" "))


def _figure(value: float | None) -> str:
    return "-" if value is None or math.isnan(value) else f"{value:.3f}"
