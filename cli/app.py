"""The `cachefuse` program: its commands, errors and exit codes."""

import sys
from collections.abc import Iterable, Sequence
from typing import Annotated

import typer

from cachefuse.errors import CachefuseError
from cachefuse.registry import import_entry
from cachefuse_cli.shared.setting_options import Command

# In the order of the help. Each is a function, or a group of functions, in a file of its name in commands/.
COMMANDS = (
    "demo", "extract", "train-head", "sweep", "compare", "predict", "evaluate", "runs", "ensemble", "report",
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

        print(__version__)
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
    debug = "--debug" in given
    given = [arg for arg in given if arg != "--debug"]
    try:
        app = build_app(given[:1] if given and given[0] in COMMANDS else COMMANDS)
        app(given, prog_name="cachefuse")
    except Exception as error:
        from cachefuse_cli.shared import render

        expected = isinstance(error, CachefuseError | OSError) or render.out_of_memory(error)
        if debug or not expected:
            raise
        render.error(error)
        sys.exit(1)
