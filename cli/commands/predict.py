"""`cachefuse predict`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cachefuse_cli.shared.limit_options import reads_raw_data
from cachefuse_cli.shared.options import WORKSPACE, Device, Json, RunName, Threads, Workspace

if TYPE_CHECKING:
    from cachefuse.runs.predict import Predictions
    from cachefuse.runs.run import Run


SUBMISSION, PREDICTIONS = Path("submission.csv"), Path("predictions.csv")


@reads_raw_data
def predict(
    run: RunName = None,
    split: Annotated[
        str | None, typer.Option(metavar="NAME", help="Rows to predict.", show_default="those without labels")
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            metavar="FILE",
            help="The file to write.",
            show_default="submission.csv, with --input predictions.csv",
        ),
    ] = None,
    sample_submission: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="The competition's sample: check the rows against it, and use its order."),
    ] = None,
    scores: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Also write the score of each class: a .csv, .parquet or .npz file."),
    ] = None,
    image: Annotated[Path | None, typer.Option(metavar="FILE", help="One new sample's image.")] = None,
    text: Annotated[str | None, typer.Option(metavar="TEXT", help="One new sample's text.")] = None,
    input: Annotated[
        Path | None, typer.Option("--input", metavar="FILE", help="New samples: a csv, jsonl or parquet file.")
    ] = None,
    device: Device = "auto",
    threads: Threads = None,
    workspace: Workspace = WORKSPACE,
    json: Json = False,
) -> None:
    """Write a submission from the latest run, or predict new images and texts."""
    from cachefuse_cli.shared import render

    if input is not None and (image is not None or text is not None):
        raise typer.BadParameter("give either --input, or --image and --text, not both")
    files = {"--output": output, "--sample-submission": sample_submission, "--scores": scores}
    if (image is not None or text is not None) and any(file is not None for file in files.values()):
        raise typer.BadParameter(f"--image and --text print labels and write no file; leave out {', '.join(files)}")
    if (input is not None or image is not None or text is not None) and split is not None:
        raise typer.BadParameter("--split is for rows of the store; leave it out with --input, --image or --text")
    with render.interruptible("nothing was written; run the same command again"):
        with render.status("loading the run"):
            from cachefuse.output import check_different, check_output
            from cachefuse.runs.files import find_run
            from cachefuse.runs.save import load_run
            from cachefuse.runs.scores import check_scores_file, write_scores
            from cachefuse.runs.submission import write_submission
            from cachefuse.workspace import WorkspacePaths

            target = output or (SUBMISSION if input is None else PREDICTIONS)
            if scores is not None:
                check_scores_file(scores, input, sample_submission)
                check_different(scores, target)
            paths = WorkspacePaths(workspace)
            opened = load_run(find_run(paths.runs, run))
        render.run_line(opened)
        if image is not None or text is not None:
            predictions = _predict_one(opened, image, text, device)
            render.prediction(predictions, as_json=json)
            return
        check_output(target, input, sample_submission)
        predictions = _predict_many(opened, paths.store(opened.dataset), input, split, device)
        written = write_submission(predictions, opened.manifest, target, sample_submission)
        if scores is not None:
            write_scores(predictions.ids, predictions.classes, predictions.scores, scores)
    if json:
        also = {} if scores is None else {"scores": str(scores)}
        render.print_json({"run": opened.name, "rows": len(predictions.ids), "output": str(written), **also})
    else:
        render.submission_report(predictions, written, scores, checked=sample_submission)


def _predict_one(run: "Run", image: Path | None, text: str | None, device: str) -> "Predictions":
    from cachefuse.data.column import Column
    from cachefuse.data.images import FileImage
    from cachefuse.data.readers.base import Samples
    from cachefuse.runs.predict import predict_samples

    modalities = {}
    if image is not None:
        modalities["image"] = Column([FileImage(image)])
    if text is not None:
        modalities["text"] = Column.texts([text])
    samples = Samples(ids=[str(image) if image is not None else "text"], modalities=modalities)
    return predict_samples(run, samples, device=device, max_bad=0.0)


def _predict_many(run: "Run", store: Path, table: Path | None, split: str | None, device: str) -> "Predictions":
    from cachefuse.runs.predict import predict_samples, predict_split, read_input
    from cachefuse.store.store import FeatureStore
    from cachefuse_cli.shared.progress import EncodeProgress

    if table is None:
        return predict_split(run, FeatureStore(store), split, device=device)
    samples = read_input(table, run)
    with EncodeProgress() as progress:
        return predict_samples(run, samples, device=device, on_progress=progress.update)
