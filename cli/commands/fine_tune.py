"""`cachefuse fine-tune`."""

from typing import Annotated

import typer

from cachefuse.alignment.config import TUNING_RATE
from cachefuse.metrics import metric_title
from cachefuse_cli.shared.align_options import AlignmentName, open_alignment
from cachefuse_cli.shared.options import WORKSPACE, Device, Json, Seed, StoreName, Threads, Workspace

STEP = 20  # epochs between the printed figures, as in the paper's tables


def fine_tune(
    dataset: StoreName = None,
    run: AlignmentName = None,
    modality: Annotated[str, typer.Option(metavar="NAME", help="The encoder to tune: image or text.")] = "image",
    epochs: Annotated[int, typer.Option(metavar="N", min=1, help="Number of epochs.")] = 100,
    batch_size: Annotated[int, typer.Option(metavar="N", min=1, help="Rows per step.")] = 256,
    lr: Annotated[float, typer.Option(metavar="X", help="Learning rate.")] = TUNING_RATE,
    weight_decay: Annotated[float, typer.Option(metavar="X", help="Decoupled from the gradient, as in AdamW.")] = 0.0,
    patience: Annotated[
        int, typer.Option(metavar="N", min=0, help="Stop after N epochs without a better val score; 0: never.")
    ] = 0,
    seed: Seed = 0,
    device: Device = "auto",
    threads: Threads = None,
    workspace: Workspace = WORKSPACE,
    json: Json = False,
) -> None:
    """Tune an aligned encoder together with a linear head on a labelled dataset; predict and others use the head.

    The encoders below the alignment stay frozen. For a linear probe on a frozen alignment use train-head --head linear.
    """
    from cachefuse_cli.shared import render

    with render.interruptible("nothing was written; run the same command again"):
        with render.status("loading features"):
            from cachefuse.alignment.finetune import fine_tune as run_fine_tune
            from cachefuse.runs.save import save_run
            from cachefuse.workspace import WorkspacePaths
            from cachefuse_cli.shared.options import open_store
            from cachefuse_cli.shared.progress import TrainProgress

            store = open_store(workspace, dataset)
            alignment = open_alignment(workspace, run)
            runs = WorkspacePaths(workspace).runs
        with TrainProgress(store.manifest.main_metric) as progress:
            tuned, head = run_fine_tune(
                alignment,
                store,
                runs,
                modality=modality,
                epochs=epochs,
                batch_size=batch_size,
                lr=lr,
                weight_decay=weight_decay,
                patience=patience,
                seed=seed,
                device=device,
                on_progress=progress.update,
            )
        save_run(head, runs)
    if json:
        render.print_json({**render.run_dict(head), "tuned": tuned.name})
    else:
        render.run_report(head)
        scores = {
            epoch.epoch: epoch.score for epoch in tuned.history.epochs[STEP - 1 :: STEP] if epoch.score is not None
        }
        if scores:
            shown = ", ".join(f"{score:.3f} at {epoch}" for epoch, score in scores.items())
            render.note(f"{metric_title(head.manifest.main_metric)} on val by epoch: {shown}")
        render.note(f"the tuned encoder is {tuned.path}")
    if tuned.history.interrupted:
        render.note(f"interrupted: kept epoch {tuned.history.best_epoch}, the best so far")
        raise typer.Exit(130)
