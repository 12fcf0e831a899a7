"""`cachefuse zero-shot`."""

from typing import Annotated

import typer

from cachefuse_cli.shared.align_options import AlignmentName, SpaceEncoder, open_space
from cachefuse_cli.shared.limit_options import reads_raw_data
from cachefuse_cli.shared.options import WORKSPACE, Device, Json, StoreName, Threads, Workspace, split_list


@reads_raw_data
def zero_shot(
    dataset: StoreName = None,
    classes: Annotated[
        str | None,
        typer.Option(
            metavar="LIST",
            help="Class names instead of the dataset's, in the same order.",
            show_default="the dataset's",
        ),
    ] = None,
    prompt: Annotated[
        list[str] | None,
        typer.Option(
            metavar="TEXT", help="A sentence with {} for the class; repeatable.", show_default="a photo of a {}"
        ),
    ] = None,
    split: Annotated[
        str | None, typer.Option(metavar="NAME", help="Images to classify.", show_default="all labelled")
    ] = None,
    run: AlignmentName = None,
    encoder: SpaceEncoder = None,
    device: Device = "auto",
    threads: Threads = None,
    workspace: Workspace = WORKSPACE,
    json: Json = False,
) -> None:
    """Classify a dataset's images with only the names of its classes, without training a head."""
    from cachefuse_cli.shared import render

    with render.interruptible("run the same command again"):
        with render.status("loading the encoders"):
            from cachefuse.alignment.zero_shot import PROMPT
            from cachefuse.alignment.zero_shot import zero_shot as run_zero_shot
            from cachefuse_cli.shared import align_tables
            from cachefuse_cli.shared.options import open_store
            from cachefuse_cli.shared.progress import RowsProgress

            space, _ = open_space(workspace, run, encoder, device)
            store = open_store(workspace, dataset)
        with RowsProgress("aligning images") as progress:
            result = run_zero_shot(
                space,
                store,
                classes=split_list(classes) if classes else (),
                prompts=prompt or [PROMPT],
                split=split,
                on_rows=progress.update,
            )
    if json:
        render.print_json(align_tables.zero_shot_dict(result, space.name, store))
    else:
        align_tables.zero_shot_report(result, space.name, store)
