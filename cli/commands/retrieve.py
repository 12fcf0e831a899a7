"""`cachefuse retrieve`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cachefuse_cli.shared.align_options import AlignmentName, SpaceEncoder, open_space
from cachefuse_cli.shared.options import WORKSPACE, DataDir, Device, Json, Threads, Workspace

if TYPE_CHECKING:
    from cachefuse.data.dataset import Dataset
    from cachefuse.store.store import FeatureStore


def retrieve(
    text: Annotated[str | None, typer.Option(metavar="TEXT", help="What to look for, in words.")] = None,
    image: Annotated[Path | None, typer.Option(metavar="FILE", help="Or by a picture.")] = None,
    k: Annotated[int, typer.Option("-k", metavar="N", min=1, help="How many to show.")] = 10,
    among: Annotated[
        str | None,
        typer.Option(metavar="MODALITY", help="Look among images or texts.", show_default="the other of the query's"),
    ] = None,
    split: Annotated[
        str | None, typer.Option(metavar="NAME", help="Only in this split.", show_default="everywhere")
    ] = None,
    html: Annotated[Path | None, typer.Option(metavar="FILE", help="Also write a page with the pictures.")] = None,
    run: AlignmentName = None,
    encoder: SpaceEncoder = None,
    dataset: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Whose images and texts.", show_default="what the alignment was made on"),
    ] = None,
    data_dir: DataDir = None,
    device: Device = "auto",
    threads: Threads = None,
    workspace: Workspace = WORKSPACE,
    json: Json = False,
) -> None:
    """Find what in a store is nearest to a text or a picture; every row is compared."""
    from cachefuse.errors import ConfigError
    from cachefuse_cli.shared import render

    if (text is None) == (image is None):
        raise ConfigError("give a --text or an --image to look for, one of them")
    with render.interruptible("run the same command again"):
        with render.status("loading the encoders"):
            from cachefuse.alignment.retrieve import matched_texts
            from cachefuse.alignment.retrieve import retrieve as run_retrieve
            from cachefuse_cli.shared import align_tables
            from cachefuse_cli.shared.options import open_store
            from cachefuse_cli.shared.progress import RowsProgress

            space, own = open_space(workspace, run, encoder, device)
            store = open_store(workspace, dataset or own)
        with RowsProgress("aligning and comparing rows") as progress:
            found = run_retrieve(
                space, store, text=text, image=image, k=k, modality=among, split=split, on_rows=progress.update
            )
        raw = _raw_data(store, dataset, workspace, data_dir, needed=html is not None)
        texts = matched_texts(found, raw) if raw is not None and "text" in raw.modalities else None
        if html is not None and raw is not None:
            from cachefuse.data.images import FileImage
            from cachefuse.report.found_page import write_found

            write_found(found, html, space.name, raw, FileImage(image) if image is not None else None)
    if json:
        render.print_json(align_tables.found_dict(found, texts))
        return
    align_tables.found_report(found, texts, space.name, store)
    if html is not None:
        render.page_written(html)


def _raw_data(
    store: "FeatureStore", name: str | None, workspace: Path, data_dir: Path | None, needed: bool
) -> "Dataset | None":
    """Return the raw data, whose texts and pictures are shown; None where it is not there and not needed."""
    from cachefuse.errors import MissingDataError
    from cachefuse_cli.shared.options import reopen_dataset

    try:
        return reopen_dataset(store, name, workspace, data_dir)
    except MissingDataError:
        if needed or data_dir is not None:
            raise
        return None
