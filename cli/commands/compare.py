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
    margin: Annotated[
        float, typer.Option(metavar="X", help="The loss of the main metric at which a fusion is still enough.")
    ] = 0.01,
    seed: Annotated[int, typer.Option(metavar="N", help="Same seed, machine, libraries and threads: same result.")] = 0,
    dataset: StoreName = None,
    encoder: UsedEncoders = None,
    device: Device = "auto",
    threads: Threads = None,
    workspace: Workspace = WORKSPACE,
    json: Json = False,
) -> None:  # fmt: skip
    """Compare fusions over the same folds with equal budgets: score, interval, time, size.

    Every pair is compared on the same rows. The last lines name the fastest fusion that is shown to
    be not worse than any other by the margin, if there is one. No run is kept: train your choice
    with train-head.
    """
    from cachefuse_cli.shared import render

    with render.interruptible("finished trials are kept; run the same command again to resume"):
        with render.status("loading features"):
            from cachefuse.experiments.compare import compare as run_compare
            from cachefuse.files import slug
            from cachefuse_cli.shared import compare_tables, sweep_tables

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
                margin=margin,
                encoders=encoder or (),
                device=device,
                on_trial=progress.update,
            )
    if json:
        render.print_json(
            {**sweep_tables.sweeps_dict([result], folder, None), **compare_tables.comparison_dict(result)}
        )
    else:
        sweep_tables.sweeps_report([result], folder, None)
        compare_tables.comparison_report(result)
