"""`cachefuse compare`."""

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
    split_list,
)


def compare(
    methods: Annotated[
        str | None,
        typer.Option(metavar="LIST", help="Fusions to compare.", show_default="pooled ones, tirg, cma, midfusion"),
    ] = None,
    folds: Annotated[int, typer.Option(metavar="K", help="Folds, each measured by models that have not seen it.")] = 5,
    epochs: Annotated[int, typer.Option(metavar="N", help="Epochs of every fusion.")] = 10,
    batch_size: Annotated[int, typer.Option(metavar="N", help="Rows per step of every fusion.")] = 64,
    pool: Annotated[
        str | None,
        typer.Option(
            metavar="SPEC", help="How to pool tokens; none: use them all.",
            show_default="mean:16 for a modality with more than 64",
        ),
    ] = None,
    seed: Annotated[int, typer.Option(metavar="N", help="Same seed, machine, libraries and threads: same result.")] = 0,
    dataset: StoreName = None,
    encoder: UsedEncoders = None,
    device: Device = "auto",
    threads: Threads = None,
    workspace: Workspace = WORKSPACE,
    json: Json = False,
) -> None:  # fmt: skip
    """Compare fusions over the same folds with equal budgets: score, interval, time, size.

    The last line names the cheapest fusion with a score in the best fusion's interval. No run is
    kept: train your choice with train-head.
    """
    from cachefuse_cli.shared import render

    with render.interruptible("finished trials are kept; run the same command again to resume"):
        with render.status("loading features"):
            from cachefuse.experiments.compare import compare as run_compare
            from cachefuse.experiments.compare import fastest_near_best
            from cachefuse.files import slug
            from cachefuse_cli.shared import sweep_tables

            store = open_store(workspace, dataset)
        folder = workspace / "sweeps" / slug(f"{store.dataset}-compare")
        with sweep_tables.SweepProgress() as progress:
            result = run_compare(
                store,
                folder=folder,
                methods=split_list(methods) if methods is not None else None,
                folds=folds,
                epochs=epochs,
                batch_size=batch_size,
                pool="" if pool == "none" else pool,
                seed=seed,
                encoders=encoder or (),
                device=device,
                on_trial=progress.update,
            )
    best = fastest_near_best(result)
    if json:
        chosen = best.config.fusion if best else None
        render.print_json({**sweep_tables.sweeps_dict([result], folder, None), "enough": chosen})
    else:
        sweep_tables.sweeps_report([result], folder, None)
        sweep_tables.compare_verdict(result, best)
