"""`cachefuse report`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cachefuse_cli.options import WORKSPACE, DataDir, Device, Json, RunName, Workspace

if TYPE_CHECKING:
    from cachefuse.cache.store import FeatureStore
    from cachefuse.data.dataset import Dataset

REPORT = "report.html"


def report(
    run: RunName = None,
    split: Annotated[
        str | None, typer.Option(metavar="NAME", help="Labelled rows to report on.", show_default="those held out")
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="FILE", help="The page to write.", show_default="the run's report.html"),
    ] = None,
    data_dir: DataDir = None,
    device: Device = "auto",
    workspace: Workspace = WORKSPACE,
    json: Json = False,
) -> None:
    """Write a run's report: one HTML page with its figures, curves, confusions and worst errors."""
    from cachefuse_cli import render

    with render.interruptible("nothing was written; run the same command again"):
        with render.status("loading the run"):
            from cachefuse.cache.store import FeatureStore
            from cachefuse.report.page import write_report
            from cachefuse.runtime import Workspace as WorkspacePaths
            from cachefuse.training.run import Run
            from cachefuse.training.run_files import find_run
            from cachefuse_cli.progress import BenchProgress

            paths = WorkspacePaths(workspace)
            folder = find_run(paths.runs, run)
            opened = Run.load(folder)
            store = FeatureStore(paths.store(opened.dataset))
            dataset = _raw_data(store, workspace, data_dir)
        render.run_line(opened)
        with BenchProgress() as progress:
            written = write_report(
                opened,
                store,
                output or folder / REPORT,
                dataset,
                split=split,
                device=device,
                on_progress=progress.update,
            )
    if json:
        render.print_json({"run": opened.name, "output": str(written), "bytes": written.stat().st_size})
    else:
        render.page_written(written)


def _raw_data(store: "FeatureStore", workspace: Path, data_dir: Path | None) -> "Dataset | None":
    """Return the raw data, or None where it is not in its usual place; what --data-dir names must be there."""
    from cachefuse.errors import MissingDataError
    from cachefuse_cli import render
    from cachefuse_cli.options import reopen_dataset

    try:
        return reopen_dataset(store, None, workspace, data_dir)
    except MissingDataError:
        if data_dir is not None:
            raise
        render.note("without the raw data there are no pictures and texts of errors; say where it is with --data-dir")
        return None
