"""`cachefuse inspect`."""

from pathlib import Path
from typing import Annotated

import typer

from cachefuse_cli.shared.options import (
    WORKSPACE,
    Device,
    Json,
    StoreName,
    Threads,
    UsedEncoders,
    Workspace,
    open_store,
)


def inspect(
    dataset: StoreName = None,
    bad: Annotated[bool, typer.Option("--bad", help="List the unusable samples with their reasons.")] = False,
    duplicates: Annotated[
        bool, typer.Option("--duplicates", help="Count equal and nearly equal samples, in and between splits.")
    ] = False,
    near: Annotated[
        float | None,
        typer.Option(metavar="X", help="The least cosine of near duplicates, less the mean.", show_default="0.95"),
    ] = None,
    encoder: UsedEncoders = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="FILE", help="Write the pairs of duplicates to a csv file.")
    ] = None,
    device: Device = "auto",
    threads: Threads = None,
    workspace: Workspace = WORKSPACE,
    json: Json = False,
) -> None:
    """Show a store's contents: arrays, sizes, progress, encoders and unusable samples.

    With --duplicates, samples with the same content and with nearly the same features are counted instead: rows of val
    or test that are copies of training rows make figures too high.
    """
    from cachefuse_cli.shared import render

    with render.interruptible("nothing was written"):
        with render.status("reading the store"):
            from cachefuse.errors import ConfigError
            from cachefuse.output import check_output
            from cachefuse.store.inspect import inspect_store
            from cachefuse_cli.shared import store_tables

            if not duplicates and (near is not None or encoder or output is not None):
                raise ConfigError("--near, --encoder and --output are for duplicates; add --duplicates")
            store = open_store(workspace, dataset)
            inspection = None if duplicates else inspect_store(store)
        if inspection is None:
            from cachefuse.training.duplicates import NEAR, find_duplicates, write_pairs
            from cachefuse_cli.shared.progress import RowsProgress

            if output is not None:
                check_output(output)
            limit = NEAR if near is None else near
            with RowsProgress("comparing samples") as progress:
                found = find_duplicates(
                    store, encoders=encoder or (), limit=limit, device=device, on_progress=progress.update
                )
            if output is not None and (left_out := write_pairs(found, store, output)):
                render.note(f"{output} lacks {left_out:,} pairs of these: there are too many to write")
            if json:
                render.print_json(store_tables.duplicates_dict(found))
            else:
                store_tables.duplicates_report(found)
        elif json:
            render.print_json(store_tables.inspect_dict(inspection))
        elif bad:
            store_tables.bad_report(inspection)
        else:
            store_tables.inspect_report(inspection)
