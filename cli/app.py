"""The `cachefuse` program: its commands, errors and exit codes."""

import sys
from collections.abc import Sequence
from typing import Annotated

import typer

from cachefuse.errors import CachefuseError
from cachefuse_cli.commands.align import align
from cachefuse_cli.commands.bench import bench
from cachefuse_cli.commands.compare import compare
from cachefuse_cli.commands.datasets import datasets
from cachefuse_cli.commands.demo import demo
from cachefuse_cli.commands.encoders import encoders
from cachefuse_cli.commands.ensemble import ensemble
from cachefuse_cli.commands.evaluate import evaluate
from cachefuse_cli.commands.extract import extract
from cachefuse_cli.commands.fine_tune import fine_tune
from cachefuse_cli.commands.inspect import inspect
from cachefuse_cli.commands.pairs import pairs
from cachefuse_cli.commands.plan import plan
from cachefuse_cli.commands.predict import predict
from cachefuse_cli.commands.report import report
from cachefuse_cli.commands.retrieve import retrieve
from cachefuse_cli.commands.runs import runs
from cachefuse_cli.commands.similarity import similarity
from cachefuse_cli.commands.sweep import sweep
from cachefuse_cli.commands.train_head import train_head
from cachefuse_cli.commands.verify import verify
from cachefuse_cli.commands.zero_shot import zero_shot
from cachefuse_cli.shared.setting_options import Command

app = typer.Typer(
    name="cachefuse",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Start with: cachefuse demo",
)
for command in (
    demo,
    extract,
    train_head,
    sweep,
    compare,
    predict,
    evaluate,
    runs,
    ensemble,
    report,
    align,
    retrieve,
    zero_shot,
    similarity,
    pairs,
    fine_tune,
    plan,
    inspect,
    verify,
    datasets,
    encoders,
):
    app.command(cls=Command)(command)
app.add_typer(bench)


def _version(show: bool) -> None:
    if show:
        from cachefuse import __version__  # read from the installed package: takes a while

        print(__version__)
        raise typer.Exit()


@app.callback()
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
        app(given, prog_name="cachefuse")
    except Exception as error:
        from cachefuse_cli.shared import render

        expected = isinstance(error, CachefuseError | OSError) or render.out_of_memory(error)
        if debug or not expected:
            raise
        render.error(error)
        sys.exit(1)
