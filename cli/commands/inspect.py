"""`cachefuse inspect`."""

from typing import Annotated

import typer

from cachefuse_cli.shared.options import WORKSPACE, Json, StoreName, Workspace, open_store


def inspect(
    dataset: StoreName = None,
    bad: Annotated[bool, typer.Option("--bad", help="List the unusable samples with their reasons.")] = False,
    workspace: Workspace = WORKSPACE,
    json: Json = False,
) -> None:
    """Show a store's contents: arrays, sizes, progress, encoders and unusable samples."""
    from cachefuse_cli.shared import render

    with render.interruptible("nothing was written"):
        with render.status("reading the store"):
            from cachefuse.store.inspect import inspect_store
            from cachefuse_cli.shared import store_tables

            inspection = inspect_store(open_store(workspace, dataset))
        if json:
            render.print_json(store_tables.inspect_dict(inspection))
        elif bad:
            store_tables.bad_report(inspection)
        else:
            store_tables.inspect_report(inspection)
