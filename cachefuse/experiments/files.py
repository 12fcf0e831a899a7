"""The folder of a sweep.

trials.jsonl           a line per finished trial, with its checksum; the sweep resumes from it
held_out/KEY.safetensors  with kept scores: each trial's scores of the held-out rows
trials.csv             a row per trial
summary.csv            a row per setting: means and standard deviations over the seeds, published figures
sweep.png, sweep.svg   the main metric of each setting
curves.png, curves.svg  if settings are points of curves: the main metric and steps per second
"""

import hashlib
import io
import json
import logging
import math
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING

import filelock
import numpy as np
from pydantic import TypeAdapter, ValidationError

from cachefuse.csv_writer import csv_for_people
from cachefuse.errors import CacheError, ConfigError, RunError
from cachefuse.experiments.costs import Costs
from cachefuse.experiments.results import SettingResult, SweepResult, Trial
from cachefuse.files import make_folder, read_bounded, to_json, write_atomically
from cachefuse.registry import Options
from cachefuse.runs.files import held_out_bytes, held_out_limit, parse_held_out
from cachefuse.store.format import append_lines, n_damaged_lines, read_lines
from cachefuse.store.lock import take_lock
from cachefuse.training.held_out import HeldOut

if TYPE_CHECKING:
    from matplotlib.figure import Figure

logger = logging.getLogger(__name__)

JOURNAL, SCORES = "trials.jsonl", "held_out"
DPI = 150
MAX_LABEL = 50  # maximum characters of a setting's name in a plot
ROW_INCHES, MAX_INCHES = 0.32, 60.0  # the height per setting in a plot, and of a plot


@contextmanager
def only_sweep(folder: Path) -> Iterator[None]:
    """Lock a sweep's folder, and create it if needed. Raises ConfigError if another process holds the lock."""
    make_folder(folder)
    try:
        lock = take_lock(folder / ".lock")
    except filelock.Timeout:
        raise ConfigError(f"another sweep is running in {folder}; wait until it ends") from None
    try:
        yield
    finally:
        lock.release()


def append_trials(folder: Path, trials: Iterable[tuple[Trial, Options]]) -> None:
    """Append trials, each with its settings, and wait until they are on the disk."""
    lines = ({**asdict(trial), "settings": settings} for trial, settings in trials)
    append_lines(folder / JOURNAL, [json.loads(to_json(line)) for line in lines])  # NaN as null


def read_trials(folder: Path) -> Iterator[Trial]:
    """Yield the kept trials; incomplete or invalid lines are skipped, with a warning if they were whole once.

    Raises ConfigError, with the path, if their file is not a regular one.
    """
    adapter, path = TypeAdapter(Trial), folder / JOURNAL
    try:
        n_damaged, lines = n_damaged_lines(path), list(read_lines(path))
    except CacheError as error:
        raise ConfigError(
            f"{path} cannot be read: {error.__cause__}; delete it, and run the same command again"
        ) from error
    if n_damaged:
        logger.warning("%s has %d damaged lines: their trials are trained again", path, n_damaged)
    for line in lines:
        with suppress(ValidationError):
            yield adapter.validate_python(line)


def write_scores(folder: Path, key: str, held_out: HeldOut) -> str:
    """Keep a trial's scores of the held-out rows, and return the file's SHA-256 in hex."""
    make_folder(folder / SCORES)
    data = held_out_bytes(held_out)
    write_atomically(_scores_file(folder, key), data)
    return hashlib.sha256(data).hexdigest()


def read_scores(folder: Path, trial: Trial, rows: np.ndarray, n_classes: int) -> HeldOut | None:
    """Return the kept scores (n, C) of a trial's held-out ``rows`` (n,); None if they are damaged or gone."""
    file = _scores_file(folder, trial.key)
    try:
        data = read_bounded(file, held_out_limit(len(rows), n_classes))
        held_out = parse_held_out(file, data, n_classes)
    except (OSError, RunError):
        return None
    if not trial.scores:
        logger.warning(
            "scores in %s were kept before they had checksums, so damage to them may not be noticed; "
            "delete the folder to train all again",
            folder,
        )
    fits = trial.scores in ("", hashlib.sha256(data).hexdigest())
    return held_out if fits and np.array_equal(held_out.rows, rows) else None


def _scores_file(folder: Path, key: str) -> Path:
    return folder / SCORES / f"{key}.safetensors"


def write_results(result: SweepResult, folder: Path) -> None:
    """Write the tables and the plot."""
    make_folder(folder)
    write_atomically(folder / "trials.csv", csv_for_people(_trial_rows(result)))
    write_atomically(folder / "summary.csv", csv_for_people(_summary_rows(result)))
    for kind, data in plot(result).items():
        write_atomically(folder / f"sweep.{kind}", data)
    if all(setting.curve for setting in result.settings):
        for kind, data in plot_curves(result).items():
            write_atomically(folder / f"curves.{kind}", data)


def _trial_rows(result: SweepResult) -> Iterator[Sequence[object]]:
    labels = ["label"] * any(setting.label for setting in result.settings)
    yield *labels, *result.fields, "seed", "status", "split", *result.metrics, "epoch", "seconds", "message", "key"
    for setting in result.settings:
        values = [*[setting.label] * len(labels), *(setting.text(name) for name in result.fields)]
        for trial in setting.trials:
            figures = [trial.metrics.get(metric, math.nan) for metric in result.metrics]
            status = "diverged" if trial.diverged else "done"
            yield [
                *values, trial.seed, status, result.split, *figures, trial.epoch, round(trial.seconds, 3),
                trial.diverged, trial.key,
            ]  # fmt: skip


def _summary_rows(result: SweepResult) -> Iterator[Sequence[object]]:
    published = any(setting.published for setting in result.settings)
    figures = [f"{metric}_{kind}" for metric in result.metrics for kind in ("mean", "std")]
    costs = any(setting.costs for setting in result.settings)
    cost_names = [field.name for field in fields(Costs)] if costs else []
    extra = [*(("paper", "paper_std") if published else ()), *(("low", "high") if costs else ()), *cost_names]
    labels = ["label"] * any(setting.label for setting in result.settings)
    yield *labels, *result.fields, "trials", "diverged", *figures, "seconds", *extra
    for setting in result.settings:
        yield [
            *[setting.label] * len(labels),
            *(setting.text(name) for name in result.fields),
            len(setting.trials),
            setting.n_diverged,
            *(of(metric) for metric in result.metrics for of in (setting.mean, setting.std)),
            round(setting.seconds, 3),
            *((setting.published or (math.nan, math.nan)) if published else ()),
            *((setting.interval or (math.nan, math.nan)) if costs else ()),
            *(getattr(setting.costs, name, math.nan) for name in cost_names),
        ]


def plot(result: SweepResult) -> dict[str, bytes]:
    """Return a plot of the main metric, as {"png": ..., "svg": ...}: means, spreads, seeds, published means."""
    from matplotlib.figure import Figure

    metric, settings = result.metrics[0], result.settings
    figure = Figure(figsize=(7.5, min(MAX_INCHES, 1.6 + ROW_INCHES * len(settings))), layout="constrained")
    axes = figure.add_subplot()
    rows = range(len(settings))
    seeds = [(trial.metrics[metric], y) for y in rows for trial in settings[y].trials if not trial.diverged]
    axes.plot(*zip(*seeds, strict=True) if seeds else ((), ()), ".", color="tab:blue", alpha=0.4)
    means, stds = [setting.mean(metric) for setting in settings], [setting.std(metric) for setting in settings]
    n_seeds = f"mean and std of {len(result.seeds)} seeds" if len(result.seeds) > 1 else "one seed"
    axes.errorbar(means, rows, xerr=stds, fmt="o", color="tab:blue", capsize=3, label=n_seeds)
    paper = [(setting.published[0], y) for y, setting in enumerate(settings) if setting.published]
    if paper:
        axes.plot(*zip(*paper, strict=True), "D", color="tab:orange", markerfacecolor="none", label="published")
    for y in rows:
        if settings[y].n_diverged:
            axes.text(0.01, y, "diverged", transform=axes.get_yaxis_transform(), color="tab:red", va="center")
    axes.set_yticks(rows, [textwrap.shorten(setting.named(result.fields), MAX_LABEL) for setting in settings])
    axes.set_ylim(len(settings) - 0.5, -0.5)
    axes.set_ylabel("" if settings[0].label else ", ".join(result.fields))
    axes.set_xlabel(f"{metric}, {result.n_rows:,} rows of {result.split}")
    axes.set_title(result.title, parse_math=False)
    axes.grid(axis="x", alpha=0.3)
    figure.legend(loc="outside lower center", ncols=2, frameon=False)
    return _drawn(figure)


def plot_curves(result: SweepResult) -> dict[str, bytes]:
    """Return a plot of the main metric and of steps per second along each curve, as {"png": ..., "svg": ...}."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4.2), layout="constrained")
    score, rate = figure.subplots(1, 2)
    lines: dict[str, list[tuple[float, SettingResult]]] = {}
    for setting in result.settings:
        if setting.curve and setting.costs:
            lines.setdefault(setting.curve.name, []).append((setting.curve.x, setting))
    for name, points in lines.items():
        x = [place for place, _ in points]
        means, stds = zip(*((s.mean(result.metrics[0]), s.std(result.metrics[0])) for _, s in points), strict=True)
        score.errorbar(x, means, yerr=stds if len(result.seeds) > 1 else None, marker="o", capsize=3, label=name)
        rate.plot(x, [s.costs.steps_per_second if s.costs else math.nan for _, s in points], marker="o")
    score.set_title(f"{result.metrics[0]}, {result.n_rows:,} rows of {result.split}")
    rate.set_title("steps per second")
    for axes in (score, rate):
        axes.set_xlabel(next((s.curve.what for s in result.settings if s.curve), ""))
        axes.grid(alpha=0.3)
        axes.xaxis.get_major_locator().set_params(integer=True)
    rate.set_yscale("log")
    figure.suptitle(result.title)
    figure.legend(loc="outside lower center", ncols=4, frameon=False)
    return _drawn(figure)


def _drawn(figure: "Figure") -> dict[str, bytes]:
    """Return a figure's files, with reproducible bytes."""
    import matplotlib

    files = {}
    with matplotlib.rc_context({"svg.hashsalt": "cachefuse"}):
        for kind, options in (("png", {"dpi": DPI}), ("svg", {"metadata": {"Date": None}})):
            file = io.BytesIO()
            figure.savefig(file, format=kind, **options)
            files[kind] = file.getvalue()
    return files
