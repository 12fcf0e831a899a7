"""The table of a bench: a line per figure, and the machine."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING

from cachefuse.files import JsonObject
from cachefuse_cli.shared.console import Text, new_table, out

if TYPE_CHECKING:
    from cachefuse.bench.timing import BenchRow


MARKS = {True: Text("✓", "green"), False: Text("✗", "red"), None: Text()}


def bench_dict(machine: JsonObject, rows: "Sequence[BenchRow]") -> JsonObject:
    return {"machine": machine, "rows": [{**asdict(row), "met": row.met} for row in rows]}


def bench_report(machine: JsonObject, rows: "Sequence[BenchRow]") -> None:
    """Print ours, the baseline, their ratio and the goal; notes come below."""
    console = out()
    table = new_table("what / baseline", "ours", "baseline", "ratio", "goal", "", numbers=5)
    for row in rows:
        limit = f"{'≤' if row.at_most else '≥'} {row.goal:g}" if row.goal is not None else ""
        goal = f"{limit} {row.unit}" if row.at_most else limit
        ratio = "" if row.ratio is None else _figure(row.ratio)
        table.add_row(row.what, _amount(row, row.ours), _amount(row, row.baseline), ratio, goal, MARKS[row.met])
    console.print(table)
    for row in rows:
        if row.note:
            console.print(Text(f"{row.name}: {row.note}", style="dim"))
    cores = f"{machine['cores']} cores"
    console.print(Text(f"{machine['cpu']}, {cores}; torch {machine['torch']} on {machine['device']}"))


def _amount(row: "BenchRow", value: float | None) -> str:
    return "" if value is None else f"{_figure(value)} {row.unit}"


def _figure(value: float) -> str:
    """Return a number with about three significant digits."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"
