"""`cachefuse evaluate`."""

from functools import partial
from typing import Annotated

import typer

from cachefuse_cli.options import WORKSPACE, Device, Json, RunName, Workspace


def evaluate(
    run: RunName = None,
    split: Annotated[
        str | None, typer.Option(metavar="NAME", help="Labelled rows to measure on.", show_default="those held out")
    ] = None,
    without: Annotated[
        list[str] | None, typer.Option(metavar="MODALITY", help="As if no row had it; repeatable.")
    ] = None,
    intervals: Annotated[bool, typer.Option(help="95% intervals, by the bootstrap.")] = True,
    device: Device = "auto",
    workspace: Workspace = WORKSPACE,
    json: Json = False,
) -> None:
    """Measure a run on rows that it has not seen, or on any labelled split; and what it loses without a modality."""
    from cachefuse_cli import render

    with render.interruptible("nothing was written"):
        with render.status("loading the run"):
            from cachefuse.cache.store import FeatureStore
            from cachefuse.evaluation import evaluate as run_evaluate
            from cachefuse.runtime import Workspace as WorkspacePaths
            from cachefuse.training.run import Run
            from cachefuse.training.run_files import find_run
            from cachefuse_cli import eval_tables
            from cachefuse_cli.progress import BenchProgress

            paths = WorkspacePaths(workspace)
            opened = Run.load(find_run(paths.runs, run))
            store = FeatureStore(paths.store(opened.dataset))
        render.run_line(opened)
        with BenchProgress() as progress:
            measure = partial(
                run_evaluate,
                opened,
                store,
                split,
                device=device,
                n_resamples=1000 if intervals else 0,
                on_progress=partial(progress.update, "intervals"),
            )
            ablated = measure(without=without) if without else None
            everything = measure()
        if everything.caution:
            render.note(everything.caution)
    if json:
        render.print_json(eval_tables.evaluation_dict(everything, ablated))
    else:
        eval_tables.evaluation_report(everything, ablated)
