"""`cachefuse report`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cachefuse_cli.shared.limit_options import reads_raw_data
from cachefuse_cli.shared.options import WORKSPACE, DataDir, Device, Json, RunName, Threads, Workspace

if TYPE_CHECKING:
    from cachefuse.data.dataset import Dataset
    from cachefuse.store.store import FeatureStore


REPORT = "report.html"


@reads_raw_data
def report(
    run: RunName = None,
    split: Annotated[
        str | None, typer.Option(metavar="NAME", help="Labelled rows to report on.", show_default="the rows held out")
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="FILE", help="The page to write.", show_default="the run's report.html"),
    ] = None,
    data_dir: DataDir = None,
    device: Device = "auto",
    threads: Threads = None,
    workspace: Workspace = WORKSPACE,
    json: Json = False,
) -> None:
    """Write a run's report: one HTML page with its figures, curves, confusions and worst errors.

    For an alignment, the page has recall, ranks, curves and matches of some queries. Its plots are also PNG files.
    """
    from cachefuse_cli.shared import render

    with render.interruptible("nothing was written; run the same command again"):
        with render.status("loading the run"):
            from cachefuse.runs.files import find_run
            from cachefuse.runs.folder import ALIGNMENT, RunFolder
            from cachefuse.workspace import WorkspacePaths

            folder = find_run(WorkspacePaths(workspace).runs, run, kind=None)
        is_alignment = RunFolder.peek(folder).kind == ALIGNMENT
        write = _write_alignment if is_alignment else _write_head
        written = write(folder, output or folder / REPORT, split, data_dir, device, workspace)
    if json:
        pages = [{"output": str(path), "bytes": path.stat().st_size} for path in written]
        plots = {"plots": [page["output"] for page in pages[1:]]} if pages[1:] else {}
        render.print_json({"run": folder.resolve().name, **pages[0], **plots})
        return
    for path in written:
        render.page_written(path)


def _write_head(
    folder: Path, output: Path, split: str | None, data_dir: Path | None, device: str, workspace: Path
) -> list[Path]:
    from cachefuse_cli.shared import render

    with render.status("loading the run"):
        from cachefuse.report.run_page import write_report
        from cachefuse.runs.save import load_run
        from cachefuse_cli.shared.options import open_store
        from cachefuse_cli.shared.progress import BenchProgress

        opened = load_run(folder)
        store = open_store(workspace, opened.dataset)
        dataset = _raw_data(store, workspace, data_dir)
    render.run_line(opened)
    with BenchProgress() as progress:
        path = write_report(opened, store, output, dataset, split=split, device=device, on_progress=progress.update)
    return [path]


def _write_alignment(
    folder: Path, output: Path, split: str | None, data_dir: Path | None, device: str, workspace: Path
) -> list[Path]:
    from cachefuse.errors import ConfigError
    from cachefuse_cli.shared import align_tables, render

    if split is not None:
        raise ConfigError("the report of an alignment always has all splits; leave out --split")
    with render.status("loading the alignment"):
        from cachefuse.alignment.run import Alignment
        from cachefuse.report.alignment_page import write_alignment_report
        from cachefuse_cli.shared.options import open_store

        opened = Alignment.load(folder)
        store = open_store(workspace, opened.dataset)
        dataset = _raw_data(store, workspace, data_dir)
    align_tables.alignment_line(opened)
    with render.status("measuring"):
        return write_alignment_report(opened, output, store, dataset, device=device)


def _raw_data(store: "FeatureStore", workspace: Path, data_dir: Path | None) -> "Dataset | None":
    """Return the raw data; None if its default folder lacks it. Raises MissingDataError if --data-dir lacks it."""
    from cachefuse.errors import MissingDataError
    from cachefuse_cli.shared import render
    from cachefuse_cli.shared.options import reopen_dataset

    try:
        return reopen_dataset(store, None, workspace, data_dir)
    except MissingDataError:
        if data_dir is not None:
            raise
        render.note("the page has no examples, because the raw data is missing; give its folder with --data-dir")
        return None
