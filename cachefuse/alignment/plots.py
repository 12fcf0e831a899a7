"""The tolerance curve of sentence similarity, drawn."""

import io
from collections.abc import Mapping
from pathlib import Path

from cachefuse.alignment.similarity import TOLERANCES, Figures, ScoredPairs
from cachefuse.errors import ConfigError
from cachefuse.output import check_output, write_output

KINDS = (".png", ".svg", ".pdf")
WIDTH, HEIGHT, DPI = 3.4, 2.9, 120
MOST_COLUMNS = 3


def write_tolerance(results: Mapping[str, Mapping[str, Figures]], path: Path) -> Path:
    """Draw the share of pairs within e of their score over e, on the last split, with a panel per unit of the scale.

    As figure 3 of CBMF, with a line per encoder. Raises ConfigError for another kind of file, a missing folder, or
    paraphrases, which have no scores.
    """
    import matplotlib
    from matplotlib.figure import Figure

    if path.suffix.lower() not in KINDS:
        raise ConfigError(f"a plot must be a file of {', '.join(KINDS)}. Got {path.name!r} instead")
    check_output(path)
    last = {name: list(by_split.values())[-1] for name, by_split in results.items()}
    lines = {name: figures.tolerance for name, figures in last.items() if isinstance(figures, ScoredPairs)}
    if not lines:
        raise ConfigError("the tolerance curve needs pairs with scores; this dataset has paraphrase labels")
    panels = list(dict.fromkeys(panel for tolerance in lines.values() for panel in tolerance))
    n_columns = min(MOST_COLUMNS, len(panels))
    n_rows = -(-len(panels) // n_columns)
    figure = Figure(figsize=(WIDTH * n_columns, HEIGHT * n_rows + 0.4), layout="constrained")
    grid = figure.subplots(n_rows, n_columns, squeeze=False, sharex=True, sharey=True)
    for axes in grid.flat[len(panels) :]:
        axes.set_visible(False)
    for axes, panel in zip(grid.flat, panels, strict=False):
        for name, tolerance in lines.items():
            if panel in tolerance:
                axes.plot(TOLERANCES, tolerance[panel], label=name)
        axes.set_title("all pairs" if panel == "all" else f"scores {panel}")
        axes.set_ylim(0, 1)
        axes.grid(alpha=0.3)
        axes.set_xlabel("tolerance e")
    grid[0, 0].set_ylabel("share within e")
    handles, labels = grid[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(3, len(labels)), frameon=False)
    file = io.BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": "cachefuse", "text.parse_math": False}):
        undated = {".png": None, ".svg": {"Date": None}, ".pdf": {"CreationDate": None}}[path.suffix.lower()]
        figure.savefig(file, format=path.suffix.lower()[1:], dpi=DPI, metadata=undated)
    write_output(path, file.getvalue())
    return path
