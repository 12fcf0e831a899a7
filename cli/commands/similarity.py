"""`cachefuse similarity`."""

from pathlib import Path
from typing import Annotated

import typer

from cachefuse_cli.shared.align_options import open_alignment
from cachefuse_cli.shared.options import WORKSPACE, Device, Json, StoreName, Threads, UsedEncoders, Workspace


def similarity(
    dataset: StoreName = None,
    encoder: UsedEncoders = None,
    run: Annotated[
        str | None, typer.Option(metavar="NAME", help="Also measure an alignment.", show_default="none")
    ] = None,
    split: Annotated[str | None, typer.Option(metavar="NAME", help="Pairs to measure.", show_default="all")] = None,
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Draw the tolerance curve: a .png, .svg or .pdf file.")
    ] = None,
    device: Device = "auto",
    threads: Threads = None,
    workspace: Workspace = WORKSPACE,
    json: Json = False,
) -> None:
    """Measure text encoders on pairs of sentences: correlation with people's scores, or detection of paraphrases."""
    from cachefuse_cli.shared import render

    with render.interruptible("run the same command again"):
        with render.status("loading features"):
            from cachefuse.alignment.similarity import similarity as run_similarity
            from cachefuse_cli.shared import align_tables
            from cachefuse_cli.shared.options import open_store
            from cachefuse_cli.shared.progress import RowsProgress

            store = open_store(workspace, dataset)
            alignment = open_alignment(workspace, run) if run is not None else None
        with RowsProgress("aligning texts") as progress:
            results = run_similarity(
                store, encoders=encoder or (), run=alignment, split=split, device=device, on_rows=progress.update
            )
        if plot is not None:
            from cachefuse.alignment.plots import write_tolerance

            write_tolerance(results, plot)
    if json:
        render.print_json(align_tables.similarity_dict(results, store))
        return
    align_tables.similarity_report(results, store)
    if plot is not None:
        render.page_written(plot)
