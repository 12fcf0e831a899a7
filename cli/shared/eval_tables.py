"""Tables of finished runs: an evaluation, a list of runs, an ensemble beside its runs."""

import math
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING

from cachefuse.files import JsonObject
from cachefuse.metrics import MEAN, headline, lower_is_better, main_metric, metric_title
from cachefuse.printable import listed
from cachefuse.settings import settings_of
from cachefuse.training.config import TrainConfig
from cachefuse_cli.shared.console import Console, Table, Text, lines, new_table, out
from cachefuse_cli.shared.render import MAX_CLASSES, calibrated, note, title_lines

if TYPE_CHECKING:
    from cachefuse.runs.evaluate import Evaluation
    from cachefuse.runs.files import RunSummary
    from cachefuse.runs.run import Run


IN_NAME = ("fusion", "head", "loss")  # settings in a run's name
PER_CLASS = {"precision": "precision", "recall": "recall", "f1": "F1", "ap": "AP", "recall_at_p90": "R@P90"}
CALIBRATION = {"calibration_error": "ECE"}


def evaluation_dict(everything: "Evaluation", ablated: "Evaluation | None") -> JsonObject:
    """Return the evaluation with all modalities; if some are dropped, also the evaluation without them."""
    if ablated is None:
        return everything.as_dict()
    return {**ablated.as_dict(), "everything": everything.as_dict(), "difference": _differences(everything, ablated)}


def evaluation_report(everything: "Evaluation", ablated: "Evaluation | None") -> None:
    """Print metrics with intervals, figures per class and gate weights, or the loss without some modalities.

    With several tasks, print all of it for each task.
    """
    console = out()
    console.print(Text(f"{everything.dataset}, {everything.split}: {everything.n_rows:,} rows", style="dim"))
    if not everything.several:
        _report(console, everything, ablated)
        return
    mean = _ablation(everything, ablated, [MEAN]) if ablated else _metrics(everything, [MEAN])
    console.print(mean)
    for task in everything.tasks:
        of_task = everything.of_task(task)
        console.print()
        console.print(Text.assemble((task.name, "bold"), (f" ({of_task.n_rows:,} rows have its label)", "dim")))
        _report(console, of_task, None if ablated is None else ablated.of_task(task))


def _report(console: Console, everything: "Evaluation", ablated: "Evaluation | None") -> None:
    order, title = _order(everything)
    if ablated is None:
        console.print(_metrics(everything, list(everything.metrics)))
        if everything.calibration_errors:
            console.print(f"calibrated: {calibrated(everything.calibration_errors)}")
        console.print(_per_class(everything, order, title))
    else:
        console.print(_ablation(everything, ablated, list(everything.metrics)))
        console.print(_ablation_per_class(everything, ablated, order, title))
    if everything.gates:
        console.print(_gates(everything, order))
    for name in everything.kinds:
        console.print(_kinds(everything, ablated, name))


def _order(evaluation: "Evaluation") -> tuple[list[int], str]:
    """Return the classes to show, and the table's title."""
    order = list(range(len(evaluation.classes)))
    if len(order) <= MAX_CLASSES:
        return order, "classes"
    order = sorted(order, key=lambda c: (evaluation.per_class["f1"][c], c))[:MAX_CLASSES]
    return order, f"classes, the {MAX_CLASSES} lowest F1 of {len(evaluation.classes)}"


def _metrics(evaluation: "Evaluation", names: Sequence[str]) -> Table:
    columns = ["value", *(["95% interval"] if evaluation.intervals else [])]
    table = new_table("metric", *columns, numbers=len(columns))
    for name in names:
        table.add_row(metric_title(name), *_value(evaluation, name))
    return table


def _kinds(everything: "Evaluation", ablated: "Evaluation | None", name: str) -> Table:
    """Return the main metric by a kind of rows, such as the type of the answer."""
    kinds = everything.kinds[name]
    shown = list(kinds.items())[:MAX_CLASSES]
    title = f"the {len(shown)} most frequent of {len(kinds)}" if len(shown) < len(kinds) else None
    columns = [metric_title(main_metric(everything.metrics)), *([] if ablated is None else ["without"])]
    table = new_table(name.replace("_", " "), "rows", *columns, numbers=1 + len(columns), title=title)
    for value, (n, figure) in shown:
        without = [] if ablated is None else [_figure(ablated.kinds[name][value][1])]
        table.add_row(value, f"{n:,}", _figure(figure), *without)
    return table


def _per_class(evaluation: "Evaluation", order: Sequence[int], title: str) -> Table:
    figures = {**PER_CLASS, **(CALIBRATION if CALIBRATION.keys() <= evaluation.per_class.keys() else {})}
    table = new_table("class", "rows", *figures.values(), numbers=1 + len(figures), title=title)
    for c in order:
        values = (_figure(evaluation.per_class[name][c]) for name in figures)
        table.add_row(evaluation.classes[c], _support(evaluation, c), *values)
    return table


def _ablation(everything: "Evaluation", ablated: "Evaluation", names: Sequence[str]) -> Table:
    columns = "with everything", _without(ablated), "difference"
    table = new_table("metric", *columns, numbers=3)
    differences = _differences(everything, ablated)
    for name in names:
        values = (Text(" ").join(_value(evaluation, name)) for evaluation in (everything, ablated))
        table.add_row(metric_title(name), *values, _signed(differences[name]))
    return table


def _ablation_per_class(everything: "Evaluation", ablated: "Evaluation", order: Sequence[int], title: str) -> Table:
    table = new_table("class", "rows", "F1", "without", "AP", "without", numbers=5, title=title)
    for c in order:
        values = (
            _figure(evaluation.per_class[name][c]) for name in ("f1", "ap") for evaluation in (everything, ablated)
        )
        table.add_row(everything.classes[c], _support(everything, c), *values)
    return table


def _gates(evaluation: "Evaluation", order: Sequence[int]) -> Table:
    table = new_table("class", *evaluation.gates, numbers=len(evaluation.gates), title="mean gate weights")
    table.add_row(Text("all rows", "bold"), *map(_figure, evaluation.gates.values()))
    for c in order:
        table.add_row(evaluation.classes[c], *(_figure(values[c]) for values in evaluation.gates_per_class.values()))
    return table


def runs_dict(summaries: "Sequence[RunSummary]") -> list[JsonObject]:
    return [{**asdict(run), "path": str(run.path)} for run in summaries]


def runs_report(summaries: "Sequence[RunSummary]") -> None:
    """Print a table per dataset, because their metrics differ."""
    console = out()
    for dataset in dict.fromkeys(run.dataset for run in summaries):
        runs = [run for run in summaries if run.dataset == dataset]
        names = list(dict.fromkeys(name for run in runs for name in headline(run.metrics)))
        titles = map(title_lines, names)
        title = f"{dataset}: {len(runs):,} run{'s' * (len(runs) > 1)}, measured on rows held out"
        table = new_table("run", "rows", *titles, "MB", numbers=len(names) + 2, title=title)
        for run in runs:
            about = f"{run.created[:16].replace('T', ' ')}, {run.n_models} model{'s' * (run.n_models > 1)}"
            if run.split:
                about += f", {run.split}"
            if run.caution:
                about += ", which chose the epoch"
            known = settings_of(TrainConfig)
            settings = {name: value for name, value in run.settings.items() if name not in IN_NAME}
            shown = (f"{known[name].option} {known[name].text(value)}" for name, value in settings.items())
            about = "; ".join([about, *shown])
            values = (_figure(run.metrics.get(name)) for name in names)
            rows = f"{run.n_rows:,}" if run.split else "-"
            named = lines(Text(run.name, "bold"), Text(about, "dim"))
            table.add_row(named, rows, *values, f"{run.size_mb:.2f}")
        console.print(table)


def ensemble_report(joined: "Run", runs: "Sequence[Run]") -> None:
    """Print the runs and their ensemble on the rows held out; mark the best values if these rows are the same."""
    console = out()
    names = headline(joined.manifest.reported_metrics)
    all_runs = [*runs, joined]
    metrics = [{} if run.held_out is None else run.metrics.get(run.held_out.split, {}) for run in all_runs]
    best = {name: _best(name, metrics) for name in names} if joined.held_out is not None else {}
    table = new_table("run", "held out", *map(metric_title, names), numbers=len(names) + 1)
    for run, run_metrics in zip(all_runs, metrics, strict=True):
        held_out = "-" if run.held_out is None else f"{len(run.held_out.rows):,} {run.held_out.split}"
        figures = {name: _figure(run_metrics.get(name)) for name in names}
        cells = (
            Text(figure, "bold green" if name in best and run_metrics.get(name) == best[name] else "")
            for name, figure in figures.items()
        )
        table.add_row(run.name, held_out, *cells)
    console.print(table)
    console.print(f"{len(joined.members)} models, {joined.n_parameters:,} parameters in total, {joined.size_mb:.2f} MB")
    console.print(Text.assemble(("run   ", "dim"), str(joined.path)), soft_wrap=True)
    console.print(Text.assemble(("next  ", "dim"), "cachefuse predict"), soft_wrap=True)
    for caution in dict.fromkeys(run.caution for run in all_runs if run.caution):
        note(caution)


def _best(name: str, metrics: Sequence[dict[str, float]]) -> float | None:
    values = [run_metrics[name] for run_metrics in metrics if not math.isnan(run_metrics.get(name, math.nan))]
    return (min if lower_is_better(name) else max)(values, default=None)


def _differences(everything: "Evaluation", ablated: "Evaluation") -> dict[str, float]:
    return {name: ablated.metrics[name] - value for name, value in everything.metrics.items()}


def _value(evaluation: "Evaluation", name: str) -> list[Text]:
    """Return the cells of a metric and of its interval, if there is one."""
    value = Text(_figure(evaluation.metrics[name]))
    if not evaluation.intervals:
        return [value]
    low, high = evaluation.intervals[name]
    return [value, Text(f"{_figure(low)} - {_figure(high)}", "dim")]


def _without(ablated: "Evaluation") -> str:
    return f"without {listed(ablated.without)}"


def _support(evaluation: "Evaluation", c: int) -> str:
    return f"{evaluation.per_class['support'][c]:,.0f}"


def _figure(value: float | None) -> str:
    return "-" if value is None or math.isnan(value) else f"{value:.3f}"


def _signed(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:+.3f}"
