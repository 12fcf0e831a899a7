"""`cachefuse runs`."""

from typing import Annotated

import typer

from cachefuse_cli.shared.options import WORKSPACE, Json, Workspace, dataset_name


def runs(
    dataset: Annotated[
        str | None, typer.Option(metavar="NAME", help="Only runs of this dataset.", show_default="all datasets")
    ] = None,
    workspace: Workspace = WORKSPACE,
    json: Json = False,
) -> None:
    """List the runs with their metrics: first heads, then alignments, each from the latest to the oldest."""
    from cachefuse_cli.shared import render

    with render.status("reading the runs"):
        from cachefuse.alignment.run import list_alignments
        from cachefuse.runs.files import list_runs
        from cachefuse.workspace import WorkspacePaths
        from cachefuse_cli.shared import align_tables, eval_tables

        folder = WorkspacePaths(workspace).runs
        heads, alignments = list_runs(folder), list_alignments(folder)
        if dataset is not None:
            name = dataset_name(dataset)
            heads = [run for run in heads if run.dataset == name]
            alignments = [run for run in alignments if run.dataset == name]
    if json:
        render.print_json([*eval_tables.runs_dict(heads), *align_tables.alignments_dict(alignments)])
        return
    if heads:
        eval_tables.runs_report(heads)
    if alignments:
        align_tables.alignments_report(alignments)
    if not heads and not alignments:
        render.note(f"no runs{f' of {dataset}' if dataset else ''} in {folder}; train one with cachefuse train-head")
