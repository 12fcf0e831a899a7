"""`cachefuse retrieve`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cachefuse_cli.shared.align_options import AlignmentName, SpaceEncoder, open_space
from cachefuse_cli.shared.limit_options import reads_raw_data
from cachefuse_cli.shared.options import WORKSPACE, DataDir, Device, Json, Threads, Workspace

if TYPE_CHECKING:
    from cachefuse.data.dataset import Dataset
    from cachefuse.store.store import FeatureStore


@reads_raw_data
def retrieve(
    text: Annotated[str | None, typer.Option(metavar="TEXT", help="The query as text.")] = None,
    image: Annotated[Path | None, typer.Option(metavar="FILE", help="The query as an image.")] = None,
    k: Annotated[int, typer.Option("-k", metavar="N", min=1, help="Number of matches.")] = 10,
    among: Annotated[
        str | None,
        typer.Option(metavar="MODALITY", help="Search images or texts.", show_default="the other one than the query's"),
    ] = None,
    split: Annotated[
        str | None, typer.Option(metavar="NAME", help="Search only this split.", show_default="all")
    ] = None,
    html: Annotated[Path | None, typer.Option(metavar="FILE", help="Also write a page with the images.")] = None,
    run: AlignmentName = None,
    encoder: SpaceEncoder = None,
    dataset: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="The dataset to search.", show_default="the alignment's dataset"),
    ] = None,
    data_dir: DataDir = None,
    device: Device = "auto",
    threads: Threads = None,
    workspace: Workspace = WORKSPACE,
    json: Json = False,
) -> None:
    """Find the images or texts in a store that are nearest to a text or an image; every row is compared."""
    from cachefuse.errors import ConfigError
    from cachefuse_cli.shared import render

    if (text is None) == (image is None):
        raise ConfigError("give a query, either --text or --image")
    with render.interruptible("run the same command again"):
        with render.status("loading the encoders"):
            from cachefuse.alignment.retrieve import matched_texts
            from cachefuse.alignment.retrieve import retrieve as run_retrieve
            from cachefuse.output import check_output
            from cachefuse_cli.shared import align_tables
            from cachefuse_cli.shared.options import open_store
            from cachefuse_cli.shared.progress import RowsProgress

            if html is not None:
                check_output(html, image)
            space, space_dataset = open_space(workspace, run, encoder, device)
            store = open_store(workspace, dataset or space_dataset)
        with RowsProgress("aligning and comparing rows") as progress:
            result = run_retrieve(
                space, store, text=text, image=image, k=k, modality=among, split=split, on_rows=progress.update
            )
        raw = _raw_data(store, dataset, workspace, data_dir, needed=html is not None)
        texts = matched_texts(result, raw) if raw is not None and "text" in raw.modalities else None
        if html is not None and raw is not None:
            from cachefuse.data.images import FileImage
            from cachefuse.report.matches_page import write_matches

            write_matches(result, html, space.name, raw, FileImage(image) if image is not None else None)
    if json:
        render.print_json(align_tables.matches_dict(result, texts))
        return
    align_tables.matches_report(result, texts, space.name, store)
    if html is not None:
        render.page_written(html)


def _raw_data(
    store: "FeatureStore", name: str | None, workspace: Path, data_dir: Path | None, needed: bool
) -> "Dataset | None":
    """Return the raw data, whose texts and images are shown; None if it is missing and not needed."""
    from cachefuse.errors import MissingDataError
    from cachefuse_cli.shared.options import reopen_dataset

    try:
        return reopen_dataset(store, name, workspace, data_dir)
    except MissingDataError:
        if needed or data_dir is not None:
            raise
        return None
