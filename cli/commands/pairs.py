"""`cachefuse pairs`."""

from pathlib import Path
from typing import Annotated

import typer

from cachefuse.printable import listed
from cachefuse_cli.shared.limit_options import reads_raw_data
from cachefuse_cli.shared.options import WORKSPACE, DataDir, Device, Json, StoreName, Threads, Workspace


@reads_raw_data
def pairs(
    dataset: StoreName = None,
    encoder: Annotated[
        str | None,
        typer.Option(metavar="SPEC", help="The text encoder that compares.", show_default="the only one in the store"),
    ] = None,
    threshold: Annotated[float, typer.Option(metavar="X", help="The minimum cosine of a pair.")] = 0.7,
    within_samples: Annotated[
        bool, typer.Option("--within-samples", help="Pair every two texts of a sample instead, as CBMF's authors do.")
    ] = False,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            metavar="DIR",
            help="The folder to write.",
            show_default="<workspace>/data/<dataset>-pairs",
        ),
    ] = None,
    data_dir: DataDir = None,
    device: Device = "auto",
    threads: Threads = None,
    workspace: Workspace = WORKSPACE,
    json: Json = False,
) -> None:
    """Mine pairs of captions with the same meaning, as a new dataset to align two text encoders on.

    All texts of a split are compared. Each sample is in at most one pair; the nearest pairs come first. With
    --within-samples all pairs of a sample's texts that are near enough are taken.
    """
    from cachefuse_cli.shared import render

    with render.interruptible("nothing was written; run the same command again"):
        with render.status("loading features"):
            from cachefuse.alignment.pairs import mine_pairs, write_pairs
            from cachefuse.errors import ConfigError
            from cachefuse.training.selection import select_features
            from cachefuse.workspace import WorkspacePaths
            from cachefuse_cli.shared import align_tables
            from cachefuse_cli.shared.options import open_store, reopen_dataset
            from cachefuse_cli.shared.progress import RowsProgress

            store = open_store(workspace, dataset)
            texts = select_features(store, [encoder] if encoder else ()).get("text", [])
            if len(texts) != 1:
                names = listed(features.encoder for features in select_features(store).get("text", []))
                choose = f"choose it with --encoder from: {names}" if names else f"{store.path} has none"
                raise ConfigError(f"pairs needs one text encoder; {choose}")
            raw = reopen_dataset(store, dataset, workspace, data_dir)
        with RowsProgress("comparing texts") as progress:
            captions = [tuple(map(str, raw.sources("text", row))) for row in range(len(raw))]
            mined = mine_pairs(
                texts[0], captions, threshold, within_samples=within_samples, device=device, on_rows=progress.update
            )
        folder = output or WorkspacePaths(workspace).data(f"{store.dataset}-pairs")
        manifest = write_pairs(mined, raw, folder, texts[0].encoder)
    if json:
        render.print_json(align_tables.pairs_dict(mined, manifest))
    else:
        align_tables.pairs_report(mined, raw, manifest)
