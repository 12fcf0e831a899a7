"""`cachefuse auto`."""

from collections.abc import Callable
from typing import Annotated

import typer

from cachefuse.registry import Options
from cachefuse.training.config import TrainConfig
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
from cachefuse_cli.shared.setting_options import read, takes

CHOOSING = ("thresholds", "threshold_metric", "calibrate", "duplicates")


def _settings(given: Options) -> TrainConfig:
    return TrainConfig(**read(TrainConfig, given))


@takes(TrainConfig, _settings, CHOOSING)
def auto(
    config: Callable[..., TrainConfig],
    minutes: Annotated[
        float, typer.Option(metavar="M", help="The time to take, about. A later call with more minutes goes on.")
    ] = 5.0,
    trials: Annotated[
        int | None,
        typer.Option(metavar="N", help="Instead: try the first N candidates, for a result that no clock changes."),
    ] = None,
    max_size_mb: Annotated[
        float | None,
        typer.Option(metavar="MB", help="The most that the models may take, such as a competition's limit."),
    ] = None,
    max_ms: Annotated[
        float | None, typer.Option(metavar="MS", help="The most time for an item, after the encoders, on this machine.")
    ] = None,
    folds: Annotated[int, typer.Option(metavar="K", help="Folds, each scored by models that have not seen it.")] = 5,
    seed: Annotated[int, typer.Option(metavar="N", help="Of the folds and the models.")] = 0,
    dataset: StoreName = None,
    encoder: UsedEncoders = None,
    device: Device = "auto",
    threads: Threads = None,
    workspace: Workspace = WORKSPACE,
    json: Json = False,
) -> None:
    """Find the best model for your data in a few minutes: try many, and join the best.

    Each candidate is measured on rows that it has not seen; the better half goes
    on to more folds. The result is a run like any other: predict, evaluate and
    report take it. A labelled test split is never used to choose.
    """
    from cachefuse_cli.shared import render

    with render.interruptible("finished trials are kept; run the same command again to go on"):
        with render.status("loading features"):
            from cachefuse.experiments.auto import auto as run_auto
            from cachefuse.files import slug
            from cachefuse.runs.save import save_run
            from cachefuse.workspace import WorkspacePaths
            from cachefuse_cli.shared.auto_tables import AutoProgress, leaderboard_report

            store = open_store(workspace, dataset)
            base = config(folds=folds, seed=seed)
        with AutoProgress() as progress:
            run = run_auto(
                store,
                minutes=minutes,
                trials=trials,
                base=base,
                encoders=encoder or (),
                device=device,
                max_size_mb=max_size_mb,
                max_ms=max_ms,
                folder=workspace / "sweeps" / slug(f"{store.dataset}-auto"),
                on_trial=progress.update,
            )
        path = save_run(run, WorkspacePaths(workspace).runs)
    if json:
        render.print_json(render.run_dict(run))
    else:
        leaderboard_report(run, path)
