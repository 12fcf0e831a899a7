"""The plots of an alignment's report, as PNG files."""

import io
import warnings
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import numpy as np

from cachefuse.alignment.run import Alignment, shown_split
from cachefuse.printable import printable
from cachefuse.report.charts import log_ticks, text
from cachefuse.report.formatting import cut
from cachefuse.report.retrieval_page import curves

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DPI = 150
COLOURS = ("tab:blue", "tab:orange")
LABEL, TITLE = 40, 60  # maximum numbers of characters


def retrieval_png(run: Alignment) -> bytes | None:
    """Draw the precision within the top k of each direction over k, on the split that the report shows.

    As figure 4 of CBMF, on a logarithmic axis from 100 on, or from 1 for smaller galleries. None without figures.
    """
    split = shown_split(run.results)
    lines = [] if split is None else curves(run, split)
    if not lines:
        return None

    def draw(figure: "Figure") -> None:
        axes = figure.add_subplot()
        for i, curve in enumerate(lines):
            colour = COLOURS[i % 2]
            mark = "o" if len(curve.k) == 1 else None
            axes.plot(curve.k, curve.precision, color=colour, marker=mark, label=cut(printable(curve.name), LABEL))
            axes.plot(curve.k, curve.chance, color=colour, linewidth=1, linestyle=":", label="by chance")
        low, high = min(curve.k[0] for curve in lines), max(curve.k[-1] for curve in lines)
        _log_axis(axes, float(low), float(max(high, low + 1)))
        axes.set_xlabel("k")
        axes.set_ylabel("precision within the top k")
        axes.set_title(cut(printable(f"{run.name}, {split}"), TITLE))
        axes.grid(alpha=0.3)
        axes.legend(frameon=False)

    return _png((6.0, 4.2), draw)


def training_png(run: Alignment) -> bytes | None:
    """Draw the loss and the validation score (R@1, or the head's metric) over the epochs; None without epochs."""
    epochs = run.history.epochs
    if not epochs:
        return None
    panels: dict[str, dict[str, list[float | None]]] = {
        "loss": {"training": [epoch.loss for epoch in epochs], "validation": [epoch.val_loss for epoch in epochs]},
        "validation " + ("score" if run.parent else "R@1"): {"validation": [epoch.score for epoch in epochs]},
    }
    shown: dict[str, dict[str, np.ndarray]] = {
        title: {name: np.array(y, float) for name, y in lines.items() if any(value is not None for value in y)}
        for title, lines in panels.items()
    }

    def draw(figure: "Figure") -> None:
        titles = [title for title, lines in shown.items() if lines]
        for axes, title in zip(figure.subplots(1, len(titles), squeeze=False).flat, titles, strict=True):
            for name, y in shown[title].items():
                colour, mark = COLOURS[name == "validation"], "o" if len(epochs) == 1 else None
                axes.plot([epoch.epoch for epoch in epochs], y, color=colour, marker=mark, label=name)
            if run.history.best_epoch:
                axes.axvline(run.history.best_epoch, color="grey", linewidth=1, linestyle=":", label="kept")
            axes.xaxis.get_major_locator().set_params(integer=True)
            axes.set_xlabel("epoch")
            axes.set_ylabel(title)
            axes.grid(alpha=0.3)
            axes.legend(frameon=False)
        figure.suptitle(cut(printable(run.name), TITLE))

    return _png((9.0, 3.8), draw)


PLOTS: Mapping[str, Callable[[Alignment], bytes | None]] = {
    "retrieval.png": retrieval_png,
    "training.png": training_png,
}


def _log_axis(axes: "Axes", low: float, high: float) -> None:
    places = log_ticks(low, high)
    axes.set_xscale("log")
    axes.set_xlim(low, high)
    axes.set_xticks(places, [text(x) for x in places])
    axes.set_xticks([], minor=True)


def _png(size: tuple[float, float], draw: Callable[["Figure"], None]) -> bytes:
    """Return a figure as a PNG file. Names from data are not formulas, and may have characters that the font lacks."""
    import matplotlib
    from matplotlib.figure import Figure

    file = io.BytesIO()
    with matplotlib.rc_context({"text.parse_math": False}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")
        figure = Figure(figsize=size, layout="constrained")
        draw(figure)
        figure.savefig(file, format="png", dpi=DPI)
    return file.getvalue()
