"""`cachefuse train-head`."""

from typing import Annotated

import typer

from cachefuse.fusion import FUSIONS
from cachefuse.registry import ACTIVATIONS, HEADS, LOSSES, OPTIMIZERS
from cachefuse_cli.options import WORKSPACE, Device, Json, Seed, Workspace

MODEL, TRAINING = "Model", "Training"


def _choices(table: dict[str, str]) -> str:
    return ", ".join(table) + "."


def train_head(
    fusion: Annotated[str, typer.Option(metavar="NAME", help=_choices(FUSIONS), rich_help_panel=MODEL)] = "sum",
    head: Annotated[str, typer.Option(metavar="NAME", help=_choices(HEADS), rich_help_panel=MODEL)] = "mlp",
    layers: Annotated[
        str | None,
        typer.Option(metavar="LIST", help="Hidden widths: 2048,512.", rich_help_panel=MODEL, show_default="512"),
    ] = None,
    activation: Annotated[
        str, typer.Option(metavar="NAME", help=_choices(ACTIVATIONS), rich_help_panel=MODEL)
    ] = "gelu",
    dropout: Annotated[float, typer.Option(metavar="P", rich_help_panel=MODEL, help="In hidden layers.")] = 0.5,
    loss: Annotated[
        str | None,
        typer.Option(
            metavar="NAME", help=_choices(LOSSES), rich_help_panel=TRAINING, show_default="bce, multi-class: ce"
        ),
    ] = None,
    optimizer: Annotated[
        str, typer.Option(metavar="NAME", help=_choices(OPTIMIZERS), rich_help_panel=TRAINING)
    ] = "adam",
    lr: Annotated[float, typer.Option(metavar="X", help="Learning rate.", rich_help_panel=TRAINING)] = 1e-3,
    weight_decay: Annotated[float, typer.Option(metavar="X", help="L2 penalty.", rich_help_panel=TRAINING)] = 0.0,
    epochs: Annotated[int, typer.Option(metavar="N", help="At most.", rich_help_panel=TRAINING)] = 100,
    batch_size: Annotated[
        str, typer.Option(metavar="N", help="Rows a step, or all.", rich_help_panel=TRAINING)
    ] = "256",
    patience: Annotated[
        int,
        typer.Option(
            metavar="N",
            help="Stop after N epochs without a better validation score; 0: never.",
            rich_help_panel=TRAINING,
        ),
    ] = 15,
    seed: Seed = 0,
    dataset: Annotated[
        str | None,
        typer.Option("--dataset", metavar="NAME", help="Whose features.", show_default="the one extracted last"),
    ] = None,
    encoder: Annotated[
        list[str] | None,
        typer.Option("--encoder", metavar="SPEC", help="Which features; repeatable.", show_default="all in the store"),
    ] = None,
    device: Device = "auto",
    workspace: Workspace = WORKSPACE,
    json: Json = False,
) -> None:
    """Stage 2: train a light head over cached features and measure it; minutes, again and again."""
    from cachefuse_cli import render

    with render.interruptible("nothing was written; run the same command again"):
        with render.status("loading features"):
            from cachefuse.runtime import Workspace as WorkspacePaths
            from cachefuse.training.config import TrainConfig
            from cachefuse.training.train import train_head as run_train_head
            from cachefuse_cli.options import open_store
            from cachefuse_cli.progress import TrainProgress

            config = TrainConfig(
                fusion=fusion,
                head=head,
                loss=loss,
                layers=_parse_layers(layers),
                activation=activation,
                dropout=dropout,
                optimizer=optimizer,
                lr=lr,
                weight_decay=weight_decay,
                epochs=epochs,
                batch_size=_parse_batch_size(batch_size),
                patience=patience,
                seed=seed,
            )
            store = open_store(workspace, dataset)
        with TrainProgress(epochs, store.manifest.reported_metrics) as progress:
            run = run_train_head(store, config, encoders=encoder or (), device=device, on_epoch=progress.update)
        run.save(WorkspacePaths(workspace).runs)
    if json:
        render.print_json(render.run_dict(run))
    else:
        render.run_report(run)
    if run.history.interrupted:
        render.note(f"interrupted: kept epoch {run.history.best_epoch}, the best so far; predict uses it")
        raise typer.Exit(130)


def _parse_layers(text: str | None) -> tuple[int, ...] | None:
    from cachefuse.errors import ConfigError

    if text is None:
        return None
    try:
        return tuple(int(part) for part in text.split(",") if part.strip())
    except ValueError:
        raise ConfigError(f"layers must be whole numbers such as 2048,512. Got {text!r} instead") from None


def _parse_batch_size(text: str) -> int:
    from cachefuse.errors import ConfigError

    if text == "all":
        return 0
    if not text.isdecimal() or int(text) < 1:
        raise ConfigError(f"batch-size must be a whole number of at least 1, or all. Got {text!r} instead")
    return int(text)
