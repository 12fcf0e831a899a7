"""The `cachefuse` program: its commands, errors and exit codes."""

import os
import sys
import traceback
from collections.abc import Iterable, Sequence
from typing import Annotated

import typer

from cachefuse.errors import CachefuseError
from cachefuse.registry import import_entry
from cachefuse_cli.shared.console import on_unraisable, safe_streams
from cachefuse_cli.shared.setting_options import Command

# In the order of the help. Each is a function, or a group of functions, in a file of its name in commands/.
COMMANDS = (
    "demo", "extract", "train-head", "auto", "sweep", "compare", "predict", "evaluate", "runs", "ensemble", "report",
    "align", "retrieve", "zero-shot", "similarity", "pairs", "fine-tune", "plan", "inspect", "verify",
    "datasets", "encoders", "presets", "bench",
)  # fmt: skip


def build_app(names: Iterable[str] = COMMANDS) -> typer.Typer:
    """Return the program with the named commands; only their modules are imported."""
    app = typer.Typer(
        name="cachefuse",
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
        rich_markup_mode="rich",
        context_settings={"help_option_names": ["-h", "--help"]},
        epilog="Start with: cachefuse demo",
    )
    for name in names:
        function = name.replace("-", "_")
        command = import_entry(f"cachefuse_cli.commands.{function}:{function}")
        if isinstance(command, typer.Typer):
            app.add_typer(command)
        else:
            app.command(cls=Command)(command)
    app.callback()(cachefuse)
    return app


def _version(show: bool) -> None:
    if show:
        from cachefuse import __version__  # imported late: reading the installed version takes time

        sys.stdout.write(f"{__version__}\n")
        raise typer.Exit()


def cachefuse(
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks of errors.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Encode images and texts once with frozen encoders, then train fusion heads over the cache in minutes."""


def main(args: Sequence[str] | None = None) -> None:
    """Run the program and exit: 0; 1 after an error, with one line; 2 for wrong usage; 130 after Ctrl-C."""
    given = list(sys.argv[1:] if args is None else args)
    sys.unraisablehook = on_unraisable
    with safe_streams():
        try:
            code = _run([arg for arg in given if arg != "--debug"], debug="--debug" in given)
        except KeyboardInterrupt:  # before or after the part that says how to go on
            from cachefuse_cli.shared import render

            code = render.interrupted("run the same command again").exit_code
        sys.exit(code)


def _run(given: list[str], *, debug: bool) -> int:
    """Run a command, print its error, and return the exit code."""
    try:
        app = build_app(given[:1] if given and given[0] in COMMANDS else COMMANDS)
        code = app(given, prog_name="cachefuse", standalone_mode=False)
        sys.stdout.flush()  # here, where a full disk is still an error
        return code or 0
    except BrokenPipeError:  # the reader of stdout, such as head, has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        from cachefuse_cli.shared import render

        if hasattr(error, "format_message"):  # of typer: wrong usage
            render.usage_error(error)
            return 2
        scarce = render.out_of_memory(error) or render.out_of_threads(error)
        expected = isinstance(error, CachefuseError | OSError) or scarce
        if debug or not expected:
            traceback.print_exc()
        else:
            render.error(error)
        return 1
