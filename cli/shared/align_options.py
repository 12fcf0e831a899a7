"""The options of an alignment, one per field of AlignConfig, and functions that open alignments."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cachefuse.alignment.config import AlignConfig
from cachefuse_cli.shared.setting_options import from_command_line, read, takes

if TYPE_CHECKING:
    from cachefuse.alignment.run import Alignment
    from cachefuse.alignment.space import Space


def given_options(context: typer.Context) -> list[str]:
    """Return the settings of an alignment that are on the command line."""
    return from_command_line(AlignConfig, context)


takes_align_config = takes(AlignConfig, lambda given: AlignConfig(**read(AlignConfig, given)))

AlignmentName = Annotated[
    str | None,
    typer.Option("--run", metavar="NAME", help="An alignment's name or folder.", show_default="the latest"),
]
SpaceEncoder = Annotated[
    str | None,
    typer.Option("--encoder", metavar="SPEC", help="Instead of --run: an encoder of images and texts, such as CLIP."),
]


def open_alignment(workspace: Path, name: str | None) -> "Alignment":
    """Open an alignment by its name or folder, by default the latest."""
    from cachefuse.alignment.run import Alignment
    from cachefuse.runs.files import find_run
    from cachefuse.runs.folder import ALIGNMENT
    from cachefuse.workspace import WorkspacePaths

    return Alignment.load(find_run(WorkspacePaths(workspace).runs, name, ALIGNMENT))


def open_space(workspace: Path, run: str | None, encoder: str | None, device: str) -> "tuple[Space, str | None]":
    """Return the space of an alignment or of an encoder, with the alignment's dataset (None for an encoder)."""
    from cachefuse.alignment.space import AlignedSpace, EncoderSpace
    from cachefuse.errors import ConfigError

    if encoder is None:
        alignment = open_alignment(workspace, run)
        return AlignedSpace(alignment, device), alignment.dataset
    if run is not None:
        raise ConfigError("give either --run or --encoder, not both")
    return EncoderSpace(encoder, device), None
