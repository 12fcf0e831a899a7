"""`cachefuse train-head`."""

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated

import typer

from cachefuse_cli.options import WORKSPACE, Device, Json, StoreName, Threads, UsedEncoders, Workspace
from cachefuse_cli.train_options import given_options, takes_config

if TYPE_CHECKING:
    from cachefuse.training.config import TrainConfig


@takes_config
def train_head(
    config: "Callable[[], TrainConfig]",
    context: typer.Context,
    preset: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="A paper's settings, which other options change: cma-paper, lit-paper."),
    ] = None,
    dataset: StoreName = None,
    encoder: UsedEncoders = None,
    max_size_mb: Annotated[
        float | None, typer.Option(metavar="MB", help="Refuse a model above a competition's limit.")
    ] = None,
    device: Device = "auto",
    threads: Threads = None,
    workspace: Workspace = WORKSPACE,
    json: Json = False,
) -> None:
    """Stage 2: train a light head over cached features and measure it, in a minute or so."""
    from cachefuse_cli import render

    with render.interruptible("nothing was written; run the same command again"):
        with render.status("loading features"):
            from cachefuse.runtime import Workspace as WorkspacePaths
            from cachefuse.training.train import train_head as run_train_head
            from cachefuse_cli.options import open_store
            from cachefuse_cli.progress import TrainProgress

            settings = config()
            if preset is not None:
                from cachefuse.registry import lookup
                from cachefuse.training.token_presets import RECIPES

                given = {field: getattr(settings, field) for field in given_options(context)}
                settings = replace(lookup(RECIPES, preset, "preset"), **given)
            store = open_store(workspace, dataset)
        with TrainProgress(settings.monitor or store.manifest.main_metric) as progress:
            run = run_train_head(
                store,
                settings,
                encoders=encoder or (),
                device=device,
                max_size_mb=max_size_mb,
                on_progress=progress.update,
            )
        run.save(WorkspacePaths(workspace).runs)
    if json:
        render.print_json(render.run_dict(run))
    else:
        render.run_report(run)
    if run.interrupted:
        render.note(f"interrupted: kept epoch {run.histories[0].best_epoch}, the best so far; predict uses it")
        raise typer.Exit(130)
