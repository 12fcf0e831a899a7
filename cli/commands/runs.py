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
    """List the runs with their metrics: heads, then alignments, the latest first."""
    from cachefuse_cli.shared import render

    with render.status("reading the runs"):
        from cachefuse.alignment.run import list_alignments
        from cachefuse.runs.files import list_runs
        from cachefuse.workspace import WorkspacePaths
        from cachefuse_cli.shared import align_tables, eval_tables

        folder = WorkspacePaths(workspace).runs
        found, aligned = list_runs(folder), list_alignments(folder)
        if dataset is not None:
            name = dataset_name(dataset)
            found = [run for run in found if run.dataset == name]
            aligned = [run for run in aligned if run.dataset == name]
    if json:
        render.print_json([*eval_tables.runs_dict(found), *align_tables.alignments_dict(aligned)])
        return
    if found:
        eval_tables.runs_report(found)
    if aligned:
        align_tables.alignments_report(aligned)
    if not found and not aligned:
        render.note(f"no runs{f' of {dataset}' if dataset else ''} in {folder}; train one with cachefuse train-head")
