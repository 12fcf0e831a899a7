"""The leaderboard of a search: live on a terminal while it runs, and at its end with what was chosen and why."""

from pathlib import Path
from typing import TYPE_CHECKING, Self

from rich.console import Group
from rich.live import Live
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from cachefuse.metrics import metric_title
from cachefuse_cli.shared.console import Table, Text, err, lines, new_table, out
from cachefuse_cli.shared.render import run_report

if TYPE_CHECKING:
    from cachefuse.runs.leaderboard import Leaderboard
    from cachefuse.runs.run import Run

LIVE_ROWS = 12  # of the table while the search runs


class AutoProgress:
    """The best candidates so far above a bar of the budget, on stderr and only on a terminal."""

    def __init__(self) -> None:
        console = err()
        what = TextColumn("{task.description}", markup=False)
        self._bar = Progress(SpinnerColumn(), what, BarColumn(), TimeElapsedColumn(), console=console)
        self._task = self._bar.add_task("training the first models", total=None)
        self._live = Live(self._bar, console=console, transient=True) if console.is_terminal else None

    def __enter__(self) -> Self:
        if self._live:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live:
            self._live.stop()

    def update(self, board: "Leaderboard") -> None:
        if not self._live:
            return
        tried = f"{len(board.entries)} of {board.n_candidates} candidates"
        if board.minutes is not None:
            self._bar.update(self._task, description=tried, completed=board.seconds, total=60 * board.minutes)
        else:
            self._bar.update(self._task, description=tried, completed=len(board.entries), total=board.n_candidates)
        self._live.update(Group(leaderboard_table(board, LIVE_ROWS), self._bar))


def leaderboard_table(board: "Leaderboard", most: int | None = None) -> Table:
    """Return the table: the mix first, once there is one, then the candidates."""
    final, title = bool(board.metrics), metric_title(board.main)
    rows = f"{board.n_rows:,} rows, each scored by models that have not seen it, on up to {board.folds} folds"
    heads = ("weight", title, "95%", "log loss") if final else ("folds", "log loss")
    table = new_table("model", *heads, "s", "MB", "ms/item", numbers=len(heads) + 3, title=lines(rows, style="dim"))
    if final:
        chosen = board.chosen
        costs = [sum(getattr(entry, name) for entry in chosen) for name in ("seconds", "size_mb", "ms_per_item")]
        figures = [f"{board.metrics[board.main]:.3f}", _interval(board.interval), f"{board.log_loss:.3f}"]
        table.add_row(Text("the mix", "bold green"), "1.00", *figures, *_costs(*costs))
    for entry in board.entries[:most]:
        if final:
            weight = f"{entry.weight:.2f}" if entry.weight else ""
            figure = f"{entry.metrics[board.main]:.3f}" if entry.metrics else ""
            cells = [weight, figure, _interval(entry.interval)]
        else:
            cells = [str(entry.n_folds)]
        loss = f"{entry.log_loss:.3f}" if entry.log_loss == entry.log_loss else "diverged" if entry.problem else ""
        table.add_row(entry.name, *cells, loss, *_costs(entry.seconds, entry.size_mb, entry.ms_per_item))
    return table


def leaderboard_report(run: "Run", path: Path) -> None:
    """Print the leaderboard, what was chosen and why, and the run."""
    from cachefuse.runs.folder import LEADERBOARD

    board = run.leaderboard
    assert board is not None, "a search has a leaderboard"
    console = out()
    console.print(leaderboard_table(board))
    console.print()
    for reason in board.reasons:
        console.print(Text(reason), soft_wrap=True)
    console.print(Text.assemble(("table ", "dim"), str(path / LEADERBOARD)), soft_wrap=True)
    console.print()
    run_report(run)


def _interval(interval: tuple[float, float]) -> str:
    low, high = interval
    return "" if low != low else f"{low:.3f}-{high:.3f}".replace("0.", ".")


def _costs(seconds: float, size_mb: float, ms: float) -> list[str]:
    return [f"{seconds:.1f}", *("" if x != x else f"{x:.2g}" for x in (size_mb, ms))]
