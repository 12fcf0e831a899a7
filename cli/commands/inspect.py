"""`cachefuse inspect`."""

from typing import Annotated

import typer

from cachefuse_cli.shared.options import WORKSPACE, Json, StoreName, Workspace, open_store


def inspect(
    dataset: StoreName = None,
    bad: Annotated[bool, typer.Option("--bad", help="List the samples that can't be used, and why.")] = False,
    workspace: Workspace = WORKSPACE,
    json: Json = False,
) -> None:
    """Show what is in a store: arrays, sizes, progress, what made them, and what could not be used."""
    from cachefuse_cli.shared import render

    with render.interruptible("nothing was written"):
        with render.status("reading the store"):
            from cachefuse.store.inspect import inspect_store
            from cachefuse_cli.shared import store_tables

            found = inspect_store(open_store(workspace, dataset))
        if json:
            render.print_json(store_tables.inspect_dict(found))
        elif bad:
            store_tables.bad_report(found)
        else:
            store_tables.inspect_report(found)
