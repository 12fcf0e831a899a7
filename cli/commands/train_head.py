"""`cachefuse train-head`."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated

import typer

from cachefuse_cli.shared.options import WORKSPACE, Device, Json, StoreName, Threads, UsedEncoders, Workspace
from cachefuse_cli.shared.train_options import given_options, takes_config

if TYPE_CHECKING:
    from cachefuse.training.config import TrainConfig


@takes_config
def train_head(
    config: "Callable[..., TrainConfig]",
    context: typer.Context,
    preset: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="A paper's settings: cma-paper, lit-paper, mmc-paper (see cachefuse presets); options change them.",
        ),
    ] = None,
    dataset: StoreName = None,
    encoder: UsedEncoders = None,
    max_size_mb: Annotated[
        float | None, typer.Option(metavar="MB", help="Refuse a model above this size, such as a competition's limit.")
    ] = None,
    device: Device = "auto",
    threads: Threads = None,
    workspace: Workspace = WORKSPACE,
    json: Json = False,
) -> None:
    """Stage 2: train a light head over cached features and measure it, in about a minute."""
    from cachefuse_cli.shared import render

    with render.interruptible("nothing was written; run the same command again"):
        with render.status("loading features"):
            from cachefuse.runs.save import save_run
            from cachefuse.runs.train import train_head as run_train_head
            from cachefuse.training.recommended import recommended
            from cachefuse.workspace import WorkspacePaths
            from cachefuse_cli.shared.options import open_store
            from cachefuse_cli.shared.progress import TrainProgress

            names = given_options(context)
            if preset is None:
                given, store = config(), open_store(workspace, dataset)
                settings = recommended(store, {name: getattr(given, name) for name in names})
            else:
                from cachefuse.experiments.recipes import TRAININGS
                from cachefuse.registry import lookup

                recipe = lookup(TRAININGS, preset, "preset")
                given = config() if "fusion" in names else config(fusion=recipe.values()["fusion"])
                store = open_store(workspace, dataset)
                task, kinds = store.manifest.task, [each.task for each in store.manifest.tasks.values()]
                settings = (recipe.train_config(task, kinds, {name: getattr(given, name) for name in names}),)
        with TrainProgress(settings[0].monitored_metric or store.manifest.main_metric) as progress:
            run = run_train_head(
                store,
                settings,
                encoders=encoder or (),
                device=device,
                max_size_mb=max_size_mb,
                on_progress=progress.update,
            )
        save_run(run, WorkspacePaths(workspace).runs)
    if json:
        render.print_json(render.run_dict(run))
    else:
        render.run_report(run)
    if run.interrupted:
        render.note(f"interrupted: kept epoch {run.histories[0].best_epoch}, the best so far; predict uses it")
        raise typer.Exit(130)
