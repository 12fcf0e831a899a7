"""The settings of an alignment as options: one for each field of AlignConfig; and the space that queries are put to."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cachefuse.alignment import OPERATIONS
from cachefuse.alignment.config import AlignConfig
from cachefuse.training import OPTIMIZERS, SCHEDULES
from cachefuse_cli.shared.train_options import choices, option, takes

if TYPE_CHECKING:
    from cachefuse.alignment.run import Alignment
    from cachefuse.alignment.space import Space


MODEL, TRAINING = "Model", "Training"

OPTIONS = {
    "method": option(str, MODEL, "NAME", "dfe, the Deep Fusion Encoder, or projection: one for each side, no more."),
    "op": option(str, MODEL, "NAME", "How a dfe takes in the context: " + choices(OPERATIONS)),
    "targets": option(str, TRAINING, "NAME", "hard: every other pair is a negative; soft: less so one that is alike."),
    "view": option(str, MODEL, "NAME", "pooled, or tokens."),
    "width": option(int, MODEL, "N", "Of the common space."),
    "dropout": option(float, MODEL, "P", "In projections and the transformer block."),
    "optimizer": option(str, TRAINING, "NAME", choices([name for name in OPTIMIZERS if name != "lbfgs"])),
    "lr": option(float, TRAINING, "X", "Learning rate."),
    "weight_decay": option(float, TRAINING, "X", "Apart from the gradient in adamw."),
    "schedule": option(str, TRAINING, "NAME", choices(SCHEDULES)),
    "epochs": option(int, TRAINING, "N", "At most."),
    "batch_size": option(int, TRAINING, "N", "Pairs that are compared with one another."),
    "chunk_size": option(int, TRAINING, "N", "Of them, those in memory at a time; the gradient is the same. 0: all."),
    "ema": option(float, TRAINING, "D", "Decay of averaged weights; 0: none."),
    "patience": option(int, TRAINING, "N", "Stop after N epochs that were no better on val; 0: never."),
    "monitor": option(str, TRAINING, "NAME", "What better means: r1, recall at 1 both ways, or loss."),
    "seed": option(int, TRAINING, "N", "Same seed, machine, libraries and threads: same result."),
}

takes_align_config = takes(AlignConfig, OPTIONS, {}, lambda given: AlignConfig(**given))

AlignmentName = Annotated[
    str | None,
    typer.Option("--run", metavar="NAME", help="An alignment's name or folder.", show_default="the latest"),
]
SpaceEncoder = Annotated[
    str | None,
    typer.Option("--encoder", metavar="SPEC", help="Or an encoder of images and texts, such as CLIP's."),
]


def open_alignment(workspace: Path, name: str | None) -> "Alignment":
    """Open an alignment by its name or folder, by default the one made last."""
    from cachefuse.alignment.run import Alignment
    from cachefuse.runs.files import ALIGNMENT, find_run
    from cachefuse.workspace import WorkspacePaths

    return Alignment.load(find_run(WorkspacePaths(workspace).runs, name, ALIGNMENT))


def open_space(workspace: Path, run: str | None, encoder: str | None, device: str) -> "tuple[Space, str | None]":
    """Open the space of an alignment or of an encoder, and return it with the dataset that it was made on."""
    from cachefuse.alignment.space import AlignedSpace, EncoderSpace
    from cachefuse.errors import ConfigError

    if encoder is None:
        alignment = open_alignment(workspace, run)
        return AlignedSpace(alignment, device), alignment.dataset
    if run is not None:
        raise ConfigError("give a --run or an --encoder, not both")
    return EncoderSpace(encoder, device), None
