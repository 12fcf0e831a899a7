"""`cachefuse demo`."""

from pathlib import Path
from typing import Annotated

import typer

from cachefuse_cli.shared.options import WORKSPACE, Json, Seed, Threads, Workspace

FUSIONS = ("image", "text", "concat", "sum", "mixed")


def demo(
    output: Annotated[Path, typer.Option("--output", "-o", metavar="FILE", help="The submission.")] = Path(
        "submission.csv"
    ),
    seed: Seed = 0,
    threads: Threads = None,
    workspace: Workspace = WORKSPACE,
    json: Json = False,
) -> None:
    """Try cachefuse in a minute, without a download: make data, extract, train, compare, submit."""
    from cachefuse_cli.shared import render

    how_to_go_on = "extracted features are kept; run cachefuse demo again"
    with render.interruptible(how_to_go_on):
        with render.status("loading torch"):
            from cachefuse.data.dataset import load_dataset
            from cachefuse.data.manifest import load_manifest
            from cachefuse.extraction.extract import extract
            from cachefuse.output import check_output
            from cachefuse.runs.predict import predict_split
            from cachefuse.runs.save import save_run
            from cachefuse.runs.submission import write_submission
            from cachefuse.runs.train import train_head
            from cachefuse.store.store import FeatureStore
            from cachefuse.training.config import TrainConfig
            from cachefuse.workspace import WorkspacePaths
            from cachefuse_cli.shared.progress import ExtractBar, TrainProgress

            check_output(output)
            paths = WorkspacePaths(workspace)
            manifest, _ = load_manifest("shapes")
            dataset = load_dataset(manifest, paths.data("shapes"))
        render.dataset_line(dataset)
        with ExtractBar() as progress:
            report = extract(dataset, ["classic"], paths.store("shapes"), on_progress=progress.update)
        store = FeatureStore(paths.store("shapes"))
        runs = []
        for fusion in FUSIONS:
            config = TrainConfig(fusion=fusion, seed=seed)
            with TrainProgress(manifest.main_metric) as training:
                runs.append(train_head(store, config, on_progress=training.update))
            if runs[-1].interrupted:
                raise render.interrupted(how_to_go_on)
        metric = manifest.main_metric
        ranked = sorted(runs, key=lambda run: run.metrics["val"][metric])
        for run in ranked:  # the best one last, so that predict uses it
            save_run(run, paths.runs)
        best = ranked[-1]
        predictions = predict_split(best, store)
        written = write_submission(predictions, manifest, output)
    if json:
        render.print_json({"runs": [render.run_dict(run) for run in runs], "best": best.name, "output": str(written)})
        return
    render.demo_report(runs, report.store, best, predictions, written)
