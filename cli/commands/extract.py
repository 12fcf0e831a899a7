"""`cachefuse extract`."""

from typing import Annotated

import typer

from cachefuse_cli.shared.extraction import extract_dict, extract_features, extract_report
from cachefuse_cli.shared.limit_options import reads_raw_data
from cachefuse_cli.shared.options import (
    WORKSPACE,
    BatchSize,
    DataDir,
    DatasetName,
    Device,
    Dtype,
    Encoders,
    Json,
    Limit,
    LongTexts,
    MaxTokens,
    NoLexical,
    Pooling,
    Threads,
    Views,
    Workspace,
    encoder_options,
    open_dataset,
    split_list,
)


@reads_raw_data
def extract(
    dataset: DatasetName,
    encoder: Encoders = None,
    no_lexical: NoLexical = False,
    data_dir: DataDir = None,
    views: Views = "pooled",
    pooling: Pooling = None,
    max_tokens: MaxTokens = None,
    long_texts: LongTexts = None,
    device: Device = "auto",
    threads: Threads = None,
    batch_size: BatchSize = None,
    dtype: Dtype = "float16",
    limit: Limit = None,
    max_bad: Annotated[
        float, typer.Option(metavar="SHARE", help="Stop if more than this share of samples is unusable.")
    ] = 0.05,
    refresh: Annotated[bool, typer.Option("--refresh", help="Compute changed samples again.")] = False,
    workspace: Workspace = WORKSPACE,
    json: Json = False,
) -> None:
    """Stage 1: encode every image and text once and store the features. Run it again to resume or to add encoders."""
    from cachefuse_cli.shared import render

    with render.interruptible("finished blocks are kept; run the same command again to resume"):
        loaded = open_dataset(dataset, workspace, data_dir, limit)
        report = extract_features(
            loaded,
            encoder,
            workspace,
            no_lexical=no_lexical,
            views=split_list(views),
            device=device,
            batch_size=batch_size,
            dtype=dtype,
            options=encoder_options(pooling, max_tokens, long_texts),
            max_bad=max_bad,
            refresh=refresh,
        )
    if json:
        render.print_json(extract_dict(report))
    else:
        extract_report(report, loaded.manifest.task)
