"""`cachefuse plan`."""

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
    chosen_encoders,
    encoder_options,
    open_dataset,
    split_list,
)


@reads_raw_data
def plan(
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
    workspace: Workspace = WORKSPACE,
    json: Json = False,
) -> None:
    """Estimate the bytes and time of an extract with these options: encode a few batches, write nothing."""
    from cachefuse_cli.shared import render

    with render.interruptible("nothing was written"):
        loaded = open_dataset(dataset, workspace, data_dir, limit)
        with render.status("opening the encoders and encoding a few batches"):
            from cachefuse.extraction.plan import plan as make_plan
            from cachefuse.workspace import WorkspacePaths
            from cachefuse_cli.shared import store_tables

            estimate = make_plan(
                loaded,
                chosen_encoders(encoder, loaded, workspace, no_lexical),
                WorkspacePaths(workspace).store(loaded.name),
                views=split_list(views),
                device=device,
                batch_size=batch_size,
                dtype=dtype,
                options=encoder_options(pooling, max_tokens, long_texts),
            )
    if json:
        render.print_json(store_tables.plan_dict(estimate))
    else:
        store_tables.plan_report(estimate)
