"""`cachefuse ensemble`."""

from typing import Annotated

import typer

from cachefuse_cli.shared.options import WORKSPACE, Device, Json, Threads, Workspace


def ensemble(
    runs: Annotated[list[str], typer.Argument(metavar="RUN", help="Names or folders of runs of one dataset.")],
    thresholds: Annotated[
        str | None,
        typer.Option(
            metavar="KIND",
            help="global, class (one per class), none (0.5), or auto.",
            show_default="as in the first run",
        ),
    ] = None,
    device: Device = "auto",
    threads: Threads = None,
    workspace: Workspace = WORKSPACE,
    json: Json = False,
) -> None:
    """Join runs into one run that predicts with the mean of their scores, with equal weights."""
    from cachefuse_cli.shared import render

    with render.interruptible("nothing was written; run the same command again"), render.status("joining the runs"):
        from cachefuse.runs.ensemble import ensemble as join
        from cachefuse.runs.files import find_run
        from cachefuse.runs.save import load_run, save_run
        from cachefuse.store.store import FeatureStore
        from cachefuse.workspace import WorkspacePaths
        from cachefuse_cli.shared import eval_tables

        paths = WorkspacePaths(workspace)
        opened = [load_run(find_run(paths.runs, name)) for name in runs]
        store = FeatureStore(paths.store(opened[0].dataset))
        joined = join(opened, store, thresholds=thresholds, device=device)
        save_run(joined, paths.runs)
    if json:
        render.print_json({**render.run_dict(joined), "sources": list(joined.sources)})
    else:
        eval_tables.ensemble_report(joined, opened)
