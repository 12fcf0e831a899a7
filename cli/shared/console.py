r"""Consoles, texts and tables that show data safely, on a terminal and in a file.

A string is text, never markup. Controls, bidirectional marks and line breaks in it are escaped, as in ``\x1b``, before
widths are computed; long text is cut. Line breaks of our own are several prints, or ``lines``.
"""

import os
import signal
import sys
import threading
import warnings
from _thread import interrupt_main
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TextIO, cast

import rich.console
import rich.table
import rich.text
from rich.console import Group, RenderableType
from rich.segment import Segment

from cachefuse.printable import MAX_MESSAGE, printable, printable_lines

MAX_CELL = 200  # characters
PIPED_WIDTH = 200  # files and pipes need no wrapped lines


class Text(rich.text.Text):
    """A text that is escaped as it is made; Rich's own class leaves out some controls."""

    def __init__(self, text: str = "", *args: Any, **options: Any) -> None:
        super().__init__(printable(text), *args, **options)

    def append(self, text: rich.text.Text | str, style: Any = None) -> rich.text.Text:
        return super().append(printable(text) if isinstance(text, str) else text, style)


class Console(rich.console.Console):
    """A console that escapes and cuts each text that it renders."""

    def __init__(self, stream: TextIO, width: int | None = None) -> None:
        super().__init__(file=_unwrapped(stream), width=width, highlight=False, markup=False, emoji=False)

    def render(self, renderable: RenderableType, options: Any = None) -> Iterable[Segment]:
        safe = _safe(renderable, MAX_MESSAGE) if isinstance(renderable, rich.text.Text) else renderable
        return super().render(safe, options)

    def render_str(self, text: str, **options: Any) -> rich.text.Text:
        return super().render_str(printable(text), **options)


class Table(rich.table.Table):
    """A table that escapes and cuts its cells."""

    def add_row(self, *cells: RenderableType | None, **options: Any) -> None:
        super().add_row(*map(_cell, cells), **options)


def out() -> Console:
    """Return the console for results."""
    piped = not sys.stdout.isatty() and "COLUMNS" not in os.environ
    return Console(sys.stdout, PIPED_WIDTH if piped else None)


def err() -> Console:
    """Return the console for progress and messages."""
    return Console(sys.stderr)


def new_table(*columns: RenderableType, numbers: int = 0, title: RenderableType | None = None) -> Table:
    """Return a table; its last ``numbers`` columns are right-aligned."""
    heading: Any = title  # Rich renders a group of lines too
    table = Table(title=heading, title_justify="left", title_style="dim", header_style="bold", box=None, pad_edge=False)
    for i, column in enumerate(columns):
        numeric = i >= len(columns) - numbers
        table.add_column(_cell(column), justify="right" if numeric else "left", overflow="fold")
    return table


def lines(*parts: rich.text.Text | str, style: str = "") -> Group:
    """Return texts that stand one below the other, in a cell or a title."""
    return Group(*(_cell(Text(part, style) if isinstance(part, str) else part) for part in parts))


def _safe(text: rich.text.Text, limit: int) -> rich.text.Text:
    parts = [printable(character) for character in text.plain] if printable(text.plain) != text.plain else []
    if parts:
        offsets = [0]
        for part in parts:
            offsets.append(offsets[-1] + len(part))
        spans = [rich.text.Span(offsets[span.start], offsets[span.end], span.style) for span in text.spans]
        text = text.blank_copy("".join(parts))
        text.spans = spans
    if len(text) <= limit:
        return text
    tail = (limit - 5) // 3  # as in shorten
    short = text[: limit - 5 - tail] + " ... " + text[len(text) - tail :]
    short.style, short.end, short.no_wrap = text.style, text.end, text.no_wrap
    return short


def _cell(cell: RenderableType | None) -> RenderableType:
    if isinstance(cell, str) or cell is None:
        return Text(printable(cell or "", MAX_CELL))
    return _safe(cell, MAX_CELL) if isinstance(cell, rich.text.Text) else cell


class _PlainStream:
    """What Python and other libraries write to stderr: warnings, logs, tracebacks. It is escaped line by line."""

    def __init__(self, stream: TextIO) -> None:
        self.wrapped = stream

    def write(self, text: str) -> int:
        self.wrapped.write(printable_lines(text, MAX_MESSAGE))
        return len(text)

    def isatty(self) -> bool:
        return False  # so that others send no colors and no bars, which would be escaped

    def __getattr__(self, name: str) -> Any:
        return getattr(self.wrapped, name)


def _unwrapped(stream: Any) -> Any:
    """Return the stream below Rich's proxy, which a live display sets up, and below a plain stream."""
    while below := getattr(stream, "wrapped" if isinstance(stream, _PlainStream) else "rich_proxied_file", None):
        stream = below
    return stream


@contextmanager
def safe_streams() -> Iterator[None]:
    """Let nothing reach stderr unescaped, let no character fail to print, and let closed streams be empty.

    A file that is opened while stdout or stderr is closed would take its number, and get what libraries print there.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    sys.stdout = sys.stdout or open(os.devnull, "w")  # noqa: SIM115 (open until the end)
    sys.stderr = sys.stderr or open(os.devnull, "w")  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    before, sys.stderr = sys.stderr, cast("TextIO", _PlainStream(sys.stderr))
    show, warnings.showwarning = warnings.showwarning, _show_warning
    try:
        yield
    finally:
        sys.stderr, warnings.showwarning = before, show


def on_unraisable(unraisable: "sys.UnraisableHookArgs") -> None:
    """Give a Ctrl-C again that fell into a destructor or an extension, which would lose it; after it, print nothing.

    Objects that it left half built fail to be destroyed. Use it as ``sys.unraisablehook``.
    """
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # the program is ending: render.interrupted
        return
    if not issubclass(unraisable.exc_type, KeyboardInterrupt):
        sys.__unraisablehook__(unraisable)
        return
    again = threading.Timer(0.01, interrupt_main)  # not here, where it would be lost again
    again.daemon = True
    again.start()


def _show_warning(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, *_: object, **__: object
) -> None:
    if "was never awaited" in str(message):
        return  # by zarr-python, after an error that has its own line, as where the system gives no more threads
    err().print(Text(f"{category.__name__}: {message} ({filename}:{lineno})"), soft_wrap=True)
