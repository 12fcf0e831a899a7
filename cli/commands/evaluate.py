"""`cachefuse evaluate`."""

from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from cachefuse_cli.shared.options import WORKSPACE, Device, Json, RunName, Threads, Workspace
from cachefuse_cli.shared.setting_options import note_old


def evaluate(
    run: RunName = None,
    split: Annotated[
        str | None, typer.Option(metavar="NAME", help="Rows to measure on.", show_default="the rows held out")
    ] = None,
    drop_modality: Annotated[
        list[str] | None, typer.Option(metavar="MODALITY", help="Measure as if all rows lacked it; repeatable.")
    ] = None,
    without: Annotated[list[str] | None, typer.Option(hidden=True)] = None,  # its old name
    intervals: Annotated[bool, typer.Option(help="Measure 95% bootstrap intervals.")] = True,
    gates: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Write the weight of each modality in each row (gated, cma) to a csv file."),
    ] = None,
    scores: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Write each row's score of each class: a .csv, .parquet or .npz file."),
    ] = None,
    against: Annotated[
        str | None, typer.Option(metavar="RUN", help="Another run: the difference, paired on rows both have not seen.")
    ] = None,
    differences: Annotated[
        Path | None, typer.Option(metavar="FILE", help="With --against: write the rows that differ to a csv file.")
    ] = None,
    dataset: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Another dataset, with the same features.", show_default="the run's dataset"),
    ] = None,
    device: Device = "auto",
    threads: Threads = None,
    workspace: Workspace = WORKSPACE,
    json: Json = False,
) -> None:
    """Measure a run on the rows held out or on any labelled split, with or without a modality.

    With --against, compare it with another run on the same rows.

    For an alignment, measure how well images and texts find each other.
    """
    from cachefuse_cli.shared import render

    with render.interruptible("nothing was written"):
        with render.status("loading the run"):
            from cachefuse.runs.files import find_run
            from cachefuse.runs.folder import ALIGNMENT, RunFolder
            from cachefuse.workspace import WorkspacePaths

            if without:
                note_old("--without", "--drop-modality")
            dropped = [*(drop_modality or ()), *(without or ())]
            folder = find_run(WorkspacePaths(workspace).runs, run, kind=None)
        if against is not None or differences is not None:
            _check_against(against, dropped, intervals, gates, scores)
            other = find_run(WorkspacePaths(workspace).runs, against)
            _evaluate_against(folder, other, split, differences, dataset, device, workspace, json)
        elif RunFolder.peek(folder).kind == ALIGNMENT:
            _evaluate_alignment(folder, split, dropped, scores, dataset, device, workspace, json)
        else:
            _evaluate_head(folder, split, dropped, intervals, gates, scores, dataset, device, workspace, json)


def _evaluate_head(
    path: Path,
    split: str | None,
    dropped: list[str],
    intervals: bool,
    gates: Path | None,
    scores: Path | None,
    dataset: str | None,
    device: str,
    workspace: Path,
    json: bool,
) -> None:
    from cachefuse_cli.shared import render

    with render.status("loading the run"):
        from cachefuse.output import check_different, check_output
        from cachefuse.runs.evaluate import check_weighs, write_gates
        from cachefuse.runs.evaluate import evaluate as run_evaluate
        from cachefuse.runs.save import load_run
        from cachefuse.runs.scores import check_scores_file, write_scores
        from cachefuse_cli.shared import eval_tables
        from cachefuse_cli.shared.options import open_store
        from cachefuse_cli.shared.progress import BenchProgress

        if scores is not None:
            check_scores_file(scores)
        opened = load_run(path)
        store = open_store(workspace, dataset or opened.dataset)
    render.run_line(opened)
    if gates is not None:
        check_weighs(opened)
        check_output(gates)
        if scores is not None:
            check_different(scores, gates)
    with BenchProgress() as progress:
        evaluate_run = partial(
            run_evaluate,
            opened,
            store,
            split,
            device=device,
            n_resamples=1000 if intervals else 0,
            on_progress=partial(progress.update, "intervals"),
        )
        ablated = evaluate_run(without=dropped) if dropped else None
        everything = evaluate_run()
    measured = ablated or everything
    if everything.caution:
        render.note(everything.caution)
    if gates is not None:
        write_gates(measured, store, gates)
        render.note(f"wrote {gates}")
    if scores is not None:
        ids = store.ids[measured.rows]
        write_scores(ids, measured.classes, measured.scores, scores, measured.known_targets)
        render.note(f"wrote {scores}")
    if json:
        render.print_json(eval_tables.evaluation_dict(everything, ablated))
    else:
        eval_tables.evaluation_report(everything, ablated)


def _check_against(
    against: str | None, dropped: list[str], intervals: bool, gates: Path | None, scores: Path | None
) -> None:
    """Raise ConfigError for options that do not go together with --against."""
    from cachefuse.errors import ConfigError

    if against is None:
        raise ConfigError("--differences needs another run to compare with; name it with --against")
    given = {
        "--drop-modality": bool(dropped),
        "--gates": gates is not None,
        "--scores": scores is not None,
        "--no-intervals": not intervals,
    }
    for option, is_given in given.items():
        if is_given:
            raise ConfigError(f"{option} is not for a comparison with --against; leave one of them out")


def _evaluate_against(
    path: Path,
    other: Path,
    split: str | None,
    differences: Path | None,
    dataset: str | None,
    device: str,
    workspace: Path,
    json: bool,
) -> None:
    from cachefuse_cli.shared import render

    with render.status("loading the runs"):
        from cachefuse.output import check_output
        from cachefuse.runs.against import evaluate_against, write_differences
        from cachefuse.runs.save import load_run
        from cachefuse_cli.shared import compare_tables
        from cachefuse_cli.shared.options import open_store
        from cachefuse_cli.shared.progress import BenchProgress

        run, against = load_run(path), load_run(other)
        store = open_store(workspace, dataset or run.dataset)
    render.run_line(run)
    render.run_line(against)
    if differences is not None:
        check_output(differences)
    with BenchProgress() as progress:
        update = partial(progress.update, "differences")
        found = evaluate_against(run, against, store, split, device=device, on_progress=update)
    for caution in found.cautions:
        render.note(caution)
    if differences is not None:
        write_differences(found, differences)
        render.note(f"wrote {differences}")
    if json:
        render.print_json(found.as_dict())
    else:
        compare_tables.against_report(found)


def _evaluate_alignment(
    path: Path,
    split: str | None,
    dropped: list[str],
    scores: Path | None,
    dataset: str | None,
    device: str,
    workspace: Path,
    json: bool,
) -> None:
    from cachefuse.errors import ConfigError
    from cachefuse_cli.shared import render

    for option, given in {"--drop-modality": bool(dropped), "--scores": scores is not None}.items():
        if given:
            raise ConfigError(f"{option} is only for heads, and this run is an alignment; leave it out")
    with render.status("measuring"):
        from cachefuse.alignment.run import Alignment
        from cachefuse.alignment.train import evaluate_alignment
        from cachefuse_cli.shared import align_tables
        from cachefuse_cli.shared.options import open_store

        opened = Alignment.load(path)
        align_tables.alignment_line(opened)
        store = open_store(workspace, dataset or opened.dataset)
        results = evaluate_alignment(opened, store, split, device=device)
        caution = opened.caution if store.dataset == opened.dataset and "val" in results else None
    if json:
        render.print_json({"run": opened.name, "results": align_tables.results_dict(results), "caution": caution})
    else:
        align_tables.results_report(results)
        if caution:
            render.note(caution)
