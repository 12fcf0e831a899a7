"""Tables of a sweep: a live table on a terminal while it runs, and the final table."""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Self

from rich.console import Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn

from cachefuse.files import JsonObject
from cachefuse.metrics import metric_title
from cachefuse.printable import listed
from cachefuse_cli.shared.console import Table, Text, err, lines, new_table, out
from cachefuse_cli.shared.render import note, run_dict, run_report

if TYPE_CHECKING:
    from cachefuse.experiments.results import SettingResult, SweepResult
    from cachefuse.runs.run import Run


MAX_METRICS, BESIDE_COSTS = 4, 2  # maximum of metrics in a table, and in one with costs; the files have all
COSTS = ("params", "MB", "ms/item", "steps/s")


class SweepProgress:
    """The current table above a bar of trials, on stderr and only on a terminal."""

    def __init__(self) -> None:
        console = err()
        self._bar = Progress(
            SpinnerColumn(), TextColumn("trials"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
            console=console,
        )  # fmt: skip
        self._title = ""
        self._live = Live(console=console, transient=True) if console.is_terminal else None

    def __enter__(self) -> Self:
        if self._live:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live:
            self._live.stop()

    def update(self, result: "SweepResult") -> None:
        if not self._live:
            return
        if result.title != self._title:  # a new sweep begins
            for task in self._bar.task_ids:
                self._bar.remove_task(task)
            self._bar.add_task("trials", total=result.n_trials, completed=result.n_done)
            self._title = result.title
        self._bar.update(self._bar.task_ids[0], completed=result.n_done)
        self._live.update(Group(sweep_table(result), self._bar))


def sweep_table(result: "SweepResult") -> Table:
    """Return a table with a row per setting with trials: means and standard deviations, the best mean in green."""
    shown = [setting for setting in result.settings if setting.trials]
    named = any(setting.label for setting in result.settings)
    seeds = f"mean ± std of {len(result.seeds)} seeds" if len(result.seeds) > 1 else "one seed"
    title = lines(result.title, f"{seeds}, {result.n_rows:,} rows of {result.split}", style="dim")
    columns = _columns(result, shown)
    table = new_table("" if named else ", ".join(result.fields), *columns, numbers=len(columns), title=title)
    for column in table.columns[1:]:
        column.no_wrap = True
    for setting in shown:
        table.add_row(Text(_label(result, setting)), *(cell(setting) for cell in columns.values()))
    return table


Cell = Callable[["SettingResult"], Text]


def _columns(result: "SweepResult", shown: Sequence["SettingResult"]) -> dict[str, Cell]:
    """Return the columns after the settings: metrics, as many as fit, then intervals, times, costs and others."""
    costs, curves = any(setting.costs for setting in shown), any(setting.curve for setting in shown)
    named = any(setting.label for setting in shown)
    metrics = result.shown or result.metrics[: 1 if curves else BESIDE_COSTS if costs or named else MAX_METRICS]
    columns: dict[str, Cell] = {}
    for metric in metrics:
        best = max((x for setting in shown if (x := setting.mean(metric)) == x), default=None)
        columns[metric_title(metric)] = partial(_figure, metric=metric, best=best, first=metric == metrics[0])
        if metric == metrics[0] and any(setting.interval for setting in shown) and not result.shown:
            columns["95%"] = lambda setting: Text(_interval(setting))
    if not result.shown:  # a paper's table has no space for more columns
        columns["s"] = lambda setting: Text(f"{setting.seconds:.1f}")
    if any(setting.published for setting in result.settings):
        columns["paper"] = lambda setting: Text(_paper(setting))
    for i, name in enumerate(COSTS[: 3 if result.shown else None] if costs else ()):
        if not curves or i >= 2:  # models of a curve have similar sizes and long names
            columns[name] = partial(_cost, i=i)
    if not costs and any(setting.trials[0].weights for setting in shown):  # there is no space beside costs
        columns["text weight"] = lambda setting: Text(_share(setting.weight("text")))
    return columns


def sweeps_report(results: Sequence["SweepResult"], folder: Path, run: "Run | None") -> None:
    """Print each sweep's table and diverged trials, the folder, and the last run of a chain of sweeps."""
    console = out()
    for result in results:
        console.print(sweep_table(result))
        for setting in result.settings:
            failed = [trial for trial in setting.trials if trial.diverged]
            if failed:
                seeds = listed(str(trial.seed) for trial in failed)
                console.print(Text(f"{_label(result, setting)}, seed {seeds}: {failed[0].diverged}"), soft_wrap=True)
        console.print()
    if caution := _caution(results):
        note(caution)
    if any(setting.published for result in results for setting in result.settings):
        console.print(Text(results[0].paper))
    console.print(Text.assemble(("wrote ", "dim"), str(folder)), soft_wrap=True)
    if run is not None:
        console.print(Text(f"the best settings, trained again on every labelled row: {_pipeline(results)}"))
        run_report(run)


def sweeps_dict(results: Sequence["SweepResult"], folder: Path, run: "Run | None") -> JsonObject:
    return {
        "path": str(folder),
        "sweeps": [_sweep_dict(result) for result in results],
        "run": None if run is None else run_dict(run),
        "caution": _caution(results),
    }


def _sweep_dict(result: "SweepResult") -> JsonObject:
    return {
        "title": result.title,
        "split": result.split,
        "rows": result.n_rows,
        "seeds": list(result.seeds),
        "settings": [
            {
                **({"label": setting.label} if setting.label else {}),
                "setting": {name: setting.values[name] for name in result.fields},
                "mean": {metric: setting.mean(metric) for metric in result.metrics},
                "std": {metric: setting.std(metric) for metric in result.metrics},
                "seconds": setting.seconds,
                "diverged": setting.n_diverged,
                "interval": setting.interval,
                "costs": vars(setting.costs) if setting.costs else None,
                "paper": setting.published,
                "trials": [asdict(trial) for trial in setting.trials],
            }
            for setting in result.settings
        ],
    }


def _caution(results: Sequence["SweepResult"]) -> str | None:
    """Return why figures may be too high: in some setting, the rows that are measured chose the epoch."""
    from cachefuse.runs.run import CHOSE_EPOCH  # with torch, which the help does not need

    chose = any(setting.config.chooses_epoch_on_val for result in results for setting in result.settings)
    return CHOSE_EPOCH if chose else None


def _pipeline(results: Sequence["SweepResult"]) -> str:
    return ", ".join(f"{name} {result.best.text(name)}" for result in results for name in result.fields)


def _label(result: "SweepResult", setting: "SettingResult") -> str:
    return setting.named(result.fields)


def _figure(setting: "SettingResult", metric: str, best: float | None, first: bool) -> Text:
    mean, std = setting.mean(metric), setting.std(metric)
    if setting.n_diverged and first:
        count = f"{setting.n_diverged} " if setting.n_diverged < len(setting.trials) else ""
        return Text(f"{count}diverged", "red")
    if math.isnan(mean):
        return Text("-")
    spread = "" if math.isnan(std) else f"±{std:.3f}".replace("±0", "±")
    return Text(f"{mean:.3f}{spread}", "bold green" if mean == best else "")


def _share(x: float) -> str:
    return "" if math.isnan(x) else f"{x:.2f}"


def _interval(setting: "SettingResult") -> str:
    return "-".join(f"{x:.3f}".removeprefix("0") for x in setting.interval) if setting.interval else ""


def _cost(setting: "SettingResult", i: int) -> Text:
    costs = setting.costs
    if costs is None:
        return Text("")
    parameters = f"{costs.parameters / 1e6:.2f}M"
    texts = (
        parameters,
        f"{costs.size_mb:.1f}",
        f"{costs.ms_per_item:.3g}",
        f"{costs.steps_per_second:.3g}" if costs.steps_per_second else "",
    )
    return Text(texts[i])


def _paper(setting: "SettingResult") -> str:
    if setting.published is None:
        return "-"
    return "diverged" if math.isnan(setting.published[0]) else f"{setting.published[0]:.3f}"
