"""Progress bars of rows and of epochs, on stderr and only on a terminal."""

import time
from typing import TYPE_CHECKING, Self

from rich.progress import (
    BarColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    Task,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from cachefuse.metrics import metric_title
from cachefuse.printable import printable
from cachefuse_cli.shared.console import Text, err
from cachefuse_cli.shared.render import note

if TYPE_CHECKING:
    from cachefuse.extraction.extract import ExtractProgress
    from cachefuse.training.train import TrainingProgress


class _Rows(ProgressColumn):
    """The finished rows and all rows; empty until the total is known."""

    def render(self, task: Task) -> Text:
        return Text("" if task.total is None else f"{task.completed:,.0f}/{task.total:,.0f}")


class _Slowest(ProgressColumn):
    """The slowest stage; the other stages wait for it."""

    def render(self, task: Task) -> Text:
        return Text(task.fields.get("slowest", ""), style="dim")


class _Rate(ProgressColumn):
    """Samples per second, over the rows computed in this call."""

    def render(self, task: Task) -> Text:
        begun = task.fields.get("begun", 0)
        elapsed = task.finished_time or task.elapsed
        done = task.completed - begun
        return Text(f"{done / elapsed:7.1f}/s" if elapsed and done else "", style="green")


def _progress(*columns: ProgressColumn) -> Progress:
    console = err()
    return Progress(SpinnerColumn(), *columns, console=console, disable=not console.is_terminal)


class _RowBars:
    """A bar per name, with rows, samples per second and remaining time."""

    def __init__(self) -> None:
        self._progress = _progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=None),
            _Rows(),
            _Rate(),
            TimeRemainingColumn(compact=True),
            _Slowest(),
        )
        self._tasks: dict[str, TaskID] = {}

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def _show(self, name: str, done: int, total: int, begun: int = 0, slowest: str = "") -> None:
        if name not in self._tasks:
            self._tasks[name] = self._progress.add_task(printable(name, 60), total=total, completed=begun, begun=begun)
        self._progress.update(self._tasks[name], completed=done, total=total, slowest=slowest)


class ExtractBar(_RowBars):
    """A bar per encoder and modality, after the encoders are open. ``seconds`` has the time that each has taken."""

    def __init__(self) -> None:
        super().__init__()
        self.seconds: dict[tuple[str, str], float] = {}
        self._began: dict[tuple[str, str], float] = {}

    def __enter__(self) -> Self:
        self._opening = self._progress.add_task("opening the encoders", total=None)
        return super().__enter__()

    def update(self, state: "ExtractProgress") -> None:
        self._progress.update(self._opening, visible=False)
        if not state.encoder:
            self._show("hashing content", state.done, state.total)
            return
        key, now = (state.encoder, state.modality), time.perf_counter()
        self.seconds[key] = now - self._began.setdefault(key, now)
        if state.begun and state.done == state.begun:
            note(f"{state.encoder} {state.modality}: {state.begun:,} rows are already in the store; computing the rest")
        name = f"{_shorten(state.encoder, 20)} {state.modality}"
        self._show(name, state.done, state.total, state.begun, state.bottleneck)


class VerifyProgress(_RowBars):
    """A bar of blocks."""

    def update(self, done: int, total: int) -> None:
        self._show("verifying blocks", done, total)


class RowsProgress(_RowBars):
    """A bar of rows with one name."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self._name = name

    def update(self, done: int, total: int) -> None:
        self._show(self._name, done, total)


class EncodeProgress(_RowBars):
    """A bar per modality for new samples of a prediction."""

    def update(self, modality: str, done: int, total: int) -> None:
        self._show(f"encoding {modality}", done, total)


class TrainProgress:
    """A bar over the epochs of all models, with the loss and the validation score."""

    def __init__(self, metric: str) -> None:
        self._metric = metric_title(metric)
        self._progress = _progress(
            TextColumn("training{task.fields[model]}", markup=False),
            BarColumn(bar_width=None),
            TextColumn("epoch {task.fields[epoch]}{task.fields[state]}", markup=False),
            TimeRemainingColumn(),
        )
        self._task = self._progress.add_task("training", total=None, model="", epoch="", state="")

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def update(self, state: "TrainingProgress") -> None:
        epoch = state.epoch
        score = "" if epoch.score is None else f"  val {self._metric} {epoch.score:.3f}"
        stage = f" {state.stage}" if state.stage else ""
        self._progress.update(
            self._task,
            completed=(state.model - 1) * state.n_epochs + epoch.epoch,
            total=state.n_models * state.n_epochs,
            model=f" {state.model}/{state.n_models}{stage}" if state.n_models > 1 else stage,
            epoch=f"{epoch.epoch}/{state.n_epochs}",
            state=f"  loss {epoch.loss:.4f}{score}",
        )


class BenchProgress:
    """A bar of measurements, with the name of the current one."""

    def __init__(self) -> None:
        count = TextColumn("{task.completed:.0f}/{task.total:.0f}", markup=False)
        what = TextColumn("measuring {task.description}", markup=False)
        self._progress = _progress(what, BarColumn(bar_width=None), count, TimeElapsedColumn())
        self._task = self._progress.add_task("", total=1)

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def update(self, what: str, done: int, total: int) -> None:
        self._progress.update(self._task, description=printable(what, 60), completed=done, total=total)


def _shorten(text: str, width: int) -> str:
    return text if len(text) <= width else text[: width - 1] + "…"
