"""`cachefuse align`."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated

import typer

from cachefuse_cli.shared.align_options import given_options, takes_align_config
from cachefuse_cli.shared.options import WORKSPACE, Device, Json, StoreName, Threads, Workspace

if TYPE_CHECKING:
    from cachefuse.alignment.config import AlignConfig


@takes_align_config
def align(
    config: "Callable[[], AlignConfig]",
    context: typer.Context,
    preset: Annotated[
        str | None,
        typer.Option(
            metavar="NAME", help="A paper's settings: cbmf-paper (see cachefuse presets); options change them."
        ),
    ] = None,
    dataset: StoreName = None,
    encoder: Annotated[
        list[str] | None,
        typer.Option(metavar="SPEC", help="An encoder to align; give two.", show_default="the two in the store"),
    ] = None,
    device: Device = "auto",
    threads: Threads = None,
    workspace: Workspace = WORKSPACE,
    json: Json = False,
) -> None:
    """Align two encoders over cached features: images with texts, or two encoders of the same texts.

    Then retrieve, zero-shot and similarity use the alignment, evaluate measures it, and report draws it.
    """
    from cachefuse_cli.shared import render

    with render.interruptible("nothing was written; run the same command again"):
        with render.status("loading features"):
            from cachefuse.alignment.train import align as run_align
            from cachefuse.workspace import WorkspacePaths
            from cachefuse_cli.shared import align_tables
            from cachefuse_cli.shared.options import open_store
            from cachefuse_cli.shared.progress import TrainProgress

            settings = config()
            if preset is not None:
                from cachefuse.alignment.presets import ALIGNMENTS
                from cachefuse.registry import lookup

                given = {field: getattr(settings, field) for field in given_options(context)}
                settings = type(settings)(**{**lookup(ALIGNMENTS, preset, "preset").values(), **given})
            store = open_store(workspace, dataset)
        with TrainProgress("R@1") as progress:
            run = run_align(store, settings, encoders=encoder or (), device=device, on_progress=progress.update)
        run.save(WorkspacePaths(workspace).runs)
    if json:
        render.print_json(align_tables.alignment_dict(run))
    else:
        align_tables.alignment_report(run)
    if run.history.interrupted:
        render.note(f"interrupted: kept epoch {run.history.best_epoch}, the best so far")
        raise typer.Exit(130)
