"""Tables of paired comparisons: each fusion beside the best and the verdict; two runs on the same rows."""

import math
from dataclasses import asdict
from typing import TYPE_CHECKING

from cachefuse.files import JsonObject
from cachefuse.metrics import metric_title
from cachefuse.printable import listed
from cachefuse_cli.shared.console import Table, Text, lines, new_table, out
from cachefuse_cli.shared.render import MAX_CLASSES

if TYPE_CHECKING:
    from cachefuse.experiments.verdict import Comparison
    from cachefuse.metrics.paired import Difference
    from cachefuse.runs.against import PairedFigure, RunComparison

MAX_ROWS = 10  # rows of a table of differing rows


def comparison_dict(result: "Comparison") -> JsonObject:
    """Return the name of the fusion that is enough, or None, and what this rests on."""
    from cachefuse.experiments.verdict import CORRECTION

    return {
        "enough": result.enough.config.fusion if result.enough else None,
        "comparison": {
            "metric": result.metrics[0],
            "best": result.best.config.fusion if result.standings else None,
            "margin": result.margin,
            "rows": result.n_rows,
            "groups": result.n_groups,
            "correction": CORRECTION,
            "undecided": [setting.config.fusion for setting in result.undecided],
            "fusions": [asdict(standing) for standing in result.standings],
        },
    }


def comparison_report(result: "Comparison") -> None:
    """Print how far each fusion is behind the best, the verdict in one line, and the next step."""
    console = out()
    if len(result.standings) < 2:
        console.print(Text("there are no two trained fusions to compare"))
        return
    console.print(_standings(result))
    console.print()
    console.print(Text(_verdict(result)), soft_wrap=True)
    if result.enough:
        console.print(Text.assemble(("next  ", "dim"), f"cachefuse train-head --fusion {result.enough.config.fusion}"))


def _standings(result: "Comparison") -> Table:
    best = result.best.config.fusion
    n_pairs = len(result.standings) * (len(result.standings) - 1) // 2
    title = lines(
        f"{metric_title(result.metrics[0])}: how far each fusion is behind {best}, {_rows(result)}, paired",
        f"95%: of the one difference; p: corrected for all {n_pairs} pairs (Holm)",
        style="dim",
    )
    columns = "behind", "95%", "p", "p corrected", f"within {_margin(result)} of all"
    table = new_table("fusion", *columns, numbers=len(columns), title=title)
    for standing in result.standings:
        cells = (
            ["-"] * 4 if standing.method == best else [*difference_cells(standing.behind), p_text(standing.p_corrected)]
        )
        table.add_row(standing.method, *cells, standing.within)
    return table


def _verdict(result: "Comparison") -> str:
    title, margin = metric_title(result.metrics[0]), _margin(result)
    basis = f"{_rows(result)}, paired, Holm for {len(result.standings)} fusions"
    best, enough = result.best, result.enough
    undecided = listed(setting.config.fusion for setting in result.undecided)
    if enough is None:
        text = f"undecided: no fusion is shown to be within {margin} of all others in {title} ({basis})"
        return f"{text}; use more rows or a larger --margin"
    name, score = enough.config.fusion, enough.mean(result.metrics[0])
    text = f"{name} is enough: {title} {score:.3f}, within {margin} of all ({basis})"
    if enough is not best and best.costs and enough.costs:
        times = best.costs.ms_per_item / enough.costs.ms_per_item
        text += f"; {best.config.fusion} is the best, and takes {times:.1f} times as long per item"
    return f"{text}; undecided and faster: {undecided}" if undecided else text


def _rows(result: "Comparison | RunComparison") -> str:
    grouped = f" in {result.n_groups:,} groups" if result.n_groups < result.n_rows else ""
    return f"{result.n_rows:,} rows{grouped}"


def _margin(result: "Comparison") -> str:
    return f"{result.margin:g}".removeprefix("0")


def against_report(found: "RunComparison") -> None:
    """Print the differences of two runs by metric and by class, and the rows on which they differ most."""
    console = out()
    console.print(_by_metric(found))
    console.print(_by_class(found))
    if not found.rows:
        console.print(Text("both predict the same labels for all rows"))
        return
    most = min(MAX_ROWS, len(found.rows))
    title = f"{len(found.rows):,} of {found.n_rows:,} rows get other labels; the {most} that differ most:"
    console.print(Text(title, style="dim"))
    console.print(_differing(found))


def _held_out(found: "RunComparison") -> str:
    """Return how many rows each run held out, if these are not the rows compared."""
    if found.n_held_out == (found.n_rows, found.n_rows):
        return ""
    first, second = found.n_held_out
    return f" that both held out (of {first:,} and {second:,})"


def _by_metric(found: "RunComparison") -> Table:
    rows = f"{found.dataset}, {found.split}: {_rows(found)}{_held_out(found)}"
    title = lines(rows, f"{found.run} minus {found.against}, paired", style="dim")
    columns = "run", "against", "difference", "95%", "p"
    table = new_table("metric", *columns, numbers=len(columns), title=title)
    for name, figure in found.metrics.items():
        mark = " (McNemar)" if figure.difference.test == "exact McNemar" else ""
        table.add_row(f"{metric_title(name)}{mark}", *_figures(figure), *difference_cells(figure.difference))
    return table


def _by_class(found: "RunComparison") -> Table:
    order = sorted(found.per_class, key=lambda name: -abs(found.per_class[name].difference.value))
    some = f", the {MAX_CLASSES} most different of {len(order)}" if len(order) > MAX_CLASSES else ""
    title = f"F1 by class{some}; p: corrected for {len(order)} classes (Holm)"
    columns = "run", "against", "difference", "95%", "p"
    table = new_table("class", *columns, numbers=len(columns), title=title)
    for name in order[:MAX_CLASSES]:
        figure = found.per_class[name]
        *cells, _ = difference_cells(figure.difference)
        table.add_row(name, *_figures(figure), *cells, p_text(figure.p_corrected or 0.0))
    return table


def _differing(found: "RunComparison") -> Table:
    table = new_table("id", "truth", "run", "against")
    for row in found.rows[:MAX_ROWS]:
        table.add_row(*(text for text in (row.id, *map(", ".join, (row.truth, row.run, row.against)))))
    return table


def _figures(figure: "PairedFigure") -> list[str]:
    return ["-" if math.isnan(x) else f"{x:.3f}" for x in (figure.run, figure.against)]


def difference_cells(difference: "Difference") -> list[str]:
    """Return the cells of a difference, its interval, and its p."""
    interval = f"{signed(difference.low)} to {signed(difference.high)}"
    return [signed(difference.value), interval, p_text(difference.p)]


def signed(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:+.4f}".replace("0.", ".", 1)


def p_text(p: float) -> str:
    return "<.001" if p < 0.001 else f"{p:.3f}".removeprefix("0")
