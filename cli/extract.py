"""`cachefuse extract`."""

from typing import Annotated

import typer

from cachefuse_cli.options import WORKSPACE, DataDir, Device, Encoders, Json, Workspace


def extract(
    dataset: Annotated[
        str, typer.Option("--dataset", metavar="NAME", help="A built-in dataset, or a manifest: ./mine.toml.")
    ],
    encoder: Encoders = None,
    data_dir: DataDir = None,
    views: Annotated[str, typer.Option(metavar="LIST", help="pooled, tokens, or pooled,tokens.")] = "pooled",
    device: Device = "auto",
    batch_size: Annotated[
        int | None, typer.Option(metavar="N", help="Samples at a time.", show_default="32, on CUDA 256")
    ] = None,
    dtype: Annotated[str, typer.Option(metavar="NAME", help="float16 or float32.")] = "float16",
    limit: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Only N samples, in a store of their own.")
    ] = None,
    max_bad: Annotated[
        float, typer.Option(metavar="SHARE", help="Stop if more than this share of samples can't be used.")
    ] = 0.05,
    workspace: Workspace = WORKSPACE,
    json: Json = False,
) -> None:
    """Stage 1: encode every image and text once and keep the features. Run it again to go on or to add encoders."""
    from cachefuse_cli import render

    with render.interruptible("finished blocks are kept; run the same command again to go on"):
        with render.status("reading the dataset"):
            from cachefuse.data.dataset import load_dataset
            from cachefuse.data.manifest import load_manifest
            from cachefuse.runtime import Workspace as WorkspacePaths
            from cachefuse_cli.options import data_root

            paths = WorkspacePaths(workspace)
            manifest, folder = load_manifest(dataset)
            loaded = load_dataset(manifest, data_root(paths, manifest, folder, data_dir))
            if limit is not None:
                loaded = loaded.limit(limit)
        render.dataset_line(loaded)
        with render.status("loading torch and the encoders"):
            from cachefuse.cache.extract import extract as run_extract
            from cachefuse.encoders import DEFAULT_ENCODER
            from cachefuse_cli.progress import ExtractProgress
        with ExtractProgress() as progress:
            report = run_extract(
                loaded,
                encoder or [DEFAULT_ENCODER],
                paths.store(loaded.name),
                views=tuple(view.strip() for view in views.split(",")),
                device=device,
                batch_size=batch_size,
                dtype=dtype,
                max_bad=max_bad,
                on_progress=progress.update,
            )
    if json:
        render.print_json(render.extract_dict(report))
    else:
        render.extract_report(report, trainable=manifest.task != "retrieval")
