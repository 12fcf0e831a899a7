"""`cachefuse bench`: speed and memory beside plain baselines, quality beside simple pipelines."""

from importlib import import_module
from pathlib import Path
from typing import Annotated

import typer

from cachefuse_cli.shared.options import (
    WORKSPACE,
    DataDir,
    Device,
    Json,
    Seed,
    Threads,
    UsedEncoders,
    Workspace,
    open_store,
    reopen_dataset,
)

bench = typer.Typer(
    name="bench",
    help="Measure speed and memory beside plain baselines, and quality beside simple pipelines.",
    no_args_is_help=True,
)


@bench.command()
def store(
    memory: Annotated[
        bool,
        typer.Option(
            "--memory", help="Also measure memory over 6 GB of features: needs 10 GB of disk, takes about 10 minutes."
        ),
    ] = False,
    device: Device = "auto",
    threads: Threads = None,
    workspace: Workspace = WORKSPACE,
    json: Json = False,
) -> None:
    """Measure reads, writes and extraction on the disk of the workspace: about four minutes on two cores.

    Its files are removed at the end.
    """
    _run_bench("store", workspace, device, json, memory=memory)


@bench.command()
def train(
    device: Device = "auto", threads: Threads = None, workspace: Workspace = WORKSPACE, json: Json = False
) -> None:
    """Measure the training of heads on random features: two to five minutes on two cores.

    Its files on the workspace's disk are removed at the end.
    """
    _run_bench("train", workspace, device, json)


@bench.command()
def align(
    device: Device = "auto", threads: Threads = None, workspace: Workspace = WORKSPACE, json: Json = False
) -> None:
    """Measure alignment and exact search on random features: a minute or two on two cores.

    It needs 4 GB of memory and 2 GB of disk. Its files are removed at the end.
    """
    _run_bench("align", workspace, device, json)


@bench.command()
def fusion(
    device: Device = "auto", threads: Threads = None, workspace: Workspace = WORKSPACE, json: Json = False
) -> None:
    """Measure training steps and predictions of fusions over tokens: about four minutes on two cores.

    Its files on the workspace's disk are removed at the end.
    """
    _run_bench("fusion", workspace, device, json)


@bench.command()
def quality(
    dataset: Annotated[
        list[str] | None,
        typer.Option(
            "--dataset",
            metavar="NAME",
            help="A dataset with features, by name or manifest; repeatable.",
            show_default="the one extracted last",
        ),
    ] = None,
    data_dir: DataDir = None,
    encoder: UsedEncoders = None,
    folds: Annotated[int, typer.Option(metavar="K", help="Folds of train and val.")] = 5,
    seed: Seed = 0,
    only: Annotated[
        list[str] | None,
        typer.Option("--only", metavar="NAME", help="A classifier to measure; repeatable.", show_default="all"),
    ] = None,
    device: Device = "auto",
    threads: Threads = None,
    workspace: Workspace = WORKSPACE,
    json: Json = False,
) -> None:
    """Measure whether cachefuse is worth it on your data: its default beside simple scikit-learn pipelines.

    All are measured on the same rows, out of fold; labelled test rows are never used. The raw data
    gives the texts for TF-IDF. A few minutes for some thousand rows.
    """
    from cachefuse_cli.shared import render

    names: list[str | None] = [*dataset] if dataset else [None]
    with render.interruptible("no results were kept; run the same command again"):
        with render.status("loading features"):
            from cachefuse.bench.quality import bench_quality
            from cachefuse.errors import ConfigError, MissingDataError
            from cachefuse_cli.shared import quality_tables
            from cachefuse_cli.shared.progress import BenchProgress

            if data_dir is not None and len(names) > 1:
                raise ConfigError("--data-dir is the folder of one dataset; name one --dataset")
            stores = [open_store(workspace, name) for name in names]
        found = []
        for name, opened in zip(names, stores, strict=True):
            with render.status(f"reading the texts of {opened.dataset}"):
                try:
                    raw = reopen_dataset(opened, name, workspace, data_dir)
                except MissingDataError as error:
                    render.note(f"{error}; name its folder with --data-dir DIR")
                    raw = None
            with BenchProgress() as progress:
                found.append(
                    bench_quality(
                        opened,
                        raw,
                        encoders=encoder or (),
                        folds=folds,
                        seed=seed,
                        only=only or (),
                        device=device,
                        on_progress=progress.update,
                    )
                )
    if json:
        render.print_json(quality_tables.quality_dict(found))
    else:
        quality_tables.quality_report(found)


def _run_bench(name: str, workspace: Path, device: str, json: bool, **options: object) -> None:
    """Run the measurements of ``cachefuse.bench.<name>``, and print them."""
    from cachefuse_cli.shared import render

    with render.interruptible("no results were kept; run the same command again"):
        with render.status("loading torch"):
            from cachefuse.bench.timing import describe_machine
            from cachefuse_cli.shared import bench_tables
            from cachefuse_cli.shared.progress import BenchProgress

            run_bench = getattr(import_module(f"cachefuse.bench.{name}"), f"bench_{name}")
        machine = describe_machine(device)
        with BenchProgress() as progress:
            rows = run_bench(workspace, device=device, on_progress=progress.update, **options)
    if json:
        render.print_json(bench_tables.bench_dict(machine, rows))
    else:
        bench_tables.bench_report(machine, rows)
