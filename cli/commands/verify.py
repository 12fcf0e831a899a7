"""`cachefuse verify`."""

from typing import Annotated

import typer

from cachefuse_cli.shared.limit_options import reads_raw_data
from cachefuse_cli.shared.options import (
    WORKSPACE,
    DataDir,
    Device,
    Json,
    StoreName,
    Threads,
    Workspace,
    open_store,
    reopen_dataset,
)


@reads_raw_data
def verify(
    dataset: StoreName = None,
    repair: Annotated[
        bool, typer.Option("--repair", help="Compute damaged and missing blocks, from the raw data.")
    ] = False,
    forget: Annotated[
        str | None, typer.Option("--forget", metavar="ENCODER", help="Remove an encoder's features from the store.")
    ] = None,
    data_dir: DataDir = None,
    device: Device = "auto",
    threads: Threads = None,
    workspace: Workspace = WORKSPACE,
    json: Json = False,
) -> None:
    """Check that a store holds all that it ever held or was asked for, undamaged. Else the exit code is 1."""
    from cachefuse_cli.shared import render

    with render.interruptible("repaired blocks are kept; run the same command again"):
        with render.status("reading the store"):
            from cachefuse.extraction.verify import repair as run_repair
            from cachefuse.extraction.verify import verify as run_verify
            from cachefuse.store.lock import only_writer
            from cachefuse_cli.shared import store_tables
            from cachefuse_cli.shared.progress import ExtractBar, VerifyProgress

            store = open_store(workspace, dataset)
            if forget is not None:
                with only_writer(store.path):
                    store.forget_encoder(forget)
        with VerifyProgress() as progress:
            verification = run_verify(store, on_progress=progress.update)
        if repair and verification.damage:
            store_tables.damage_report(verification)
            with render.status("reading the dataset"):
                samples = reopen_dataset(store, dataset, workspace, data_dir)
            with ExtractBar() as bar:
                run_repair(store, verification, samples, device=device, on_progress=bar.update)
            with VerifyProgress() as progress:
                verification = run_verify(open_store(workspace, dataset), on_progress=progress.update)
    if json:
        render.print_json(store_tables.verify_dict(verification))
    else:
        store_tables.verify_report(verification)
    if verification.damage:
        raise typer.Exit(1)
