"""The table of a bench of quality: a line per classifier."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING

from cachefuse.files import JsonObject
from cachefuse.metrics import metric_title
from cachefuse.printable import listed
from cachefuse_cli.shared.console import Text, new_table, out
from cachefuse_cli.shared.render import note

if TYPE_CHECKING:
    from cachefuse.bench.quality import Quality


def quality_dict(found: "Sequence[Quality]") -> JsonObject:
    return {"datasets": [asdict(quality) for quality in found]}


def quality_report(found: "Sequence[Quality]") -> None:
    """Print a table per dataset, the best figures marked; notes say which classifiers are left out, and why."""
    console = out()
    for i, quality in enumerate(found):
        if i:
            console.print()
        titles = map(metric_title, quality.metrics)
        rows = f"{quality.n_rows:,} rows, {quality.n_classes} classes, out of fold ({quality.folds} folds)"
        heads = ("classifier", "thresholds", *titles, "seconds")
        table = new_table(*heads, numbers=len(quality.metrics) + 1, title=f"{quality.dataset}: {rows}")
        for row in quality.rows:
            cells = [_figure(row.metrics[name], quality.best(name)) for name in quality.metrics]
            table.add_row(row.name, row.thresholds, *cells, f"{row.seconds:.1f}")
        console.print(table)
        for why in dict.fromkeys(quality.left_out.values()):
            names = listed(name for name in quality.left_out if quality.left_out[name] == why)
            note(f"{quality.dataset}: {names} left out: {why}")


def _figure(value: float, best: float) -> Text:
    """Return a figure, with a star if it is the best."""
    return Text(f"{value:.3f}*", "bold") if value == best else Text(f"{value:.3f} ")
