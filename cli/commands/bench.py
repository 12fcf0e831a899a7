"""`cachefuse bench`: speed and memory beside plain baselines, quality beside simple pipelines."""

from functools import partial
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

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
    find_dataset,
    open_dataset,
    open_store,
    reopen_dataset,
)

if TYPE_CHECKING:
    from cachefuse.data.dataset import Dataset
    from cachefuse.store.store import FeatureStore

    Measured = tuple[FeatureStore, Dataset | None, list[str]]  # with the encoders to read, by default all

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
    data: Annotated[
        list[str] | None,
        typer.Option(
            "--data",
            metavar="PATH",
            help="A manifest, or a folder with one: missing features are extracted first; repeatable.",
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
    """Measure whether cachefuse is worth it on your data, beside simple scikit-learn pipelines.

    Its default and auto are measured on the same rows, out of fold. Labelled test
    rows are never used. The raw data gives the texts for TF-IDF. Ten minutes for
    some thousand rows, of which auto takes five.
    """
    from cachefuse_cli.shared import render

    with render.interruptible("extracted features are kept; run the same command again"):
        with render.status("loading features"):
            from cachefuse.bench.quality import bench_quality, classifiers
            from cachefuse.errors import CachefuseError, ConfigError
            from cachefuse_cli.shared import quality_tables
            from cachefuse_cli.shared.progress import BenchProgress

            if dataset and data:
                raise ConfigError("--dataset and --data name datasets in two ways; give one of them")
            if data_dir is not None and len(data or dataset or ()) > 1:
                raise ConfigError("--data-dir is the folder of one dataset; name one --dataset")
            classifiers(only or (), folds)  # raises before any work begins
            used = encoder or []
            if data:
                jobs = [partial(_with_features, path, data_dir, used, workspace, device) for path in data]
            else:
                names: list[str | None] = [*dataset] if dataset else [None]
                opened = [(open_store(workspace, name), name) for name in names]
                jobs = [partial(_with_texts, *pair, data_dir, used, workspace) for pair in opened]
        found, failed = [], False
        for job in jobs:
            try:
                store, raw, encoders = job()
                with BenchProgress() as progress:
                    measured = bench_quality(
                        store,
                        raw,
                        encoders=encoders,
                        folds=folds,
                        seed=seed,
                        only=only or (),
                        device=device,
                        on_progress=progress.update,
                    )
            except CachefuseError as error:
                if len(jobs) == 1:
                    raise
                render.error(error)
                failed = True
                continue
            found.append(measured)
            if not json:
                quality_tables.quality_report([measured])
    if json:
        render.print_json(quality_tables.quality_dict(found))
    if failed:
        raise typer.Exit(1)


def _with_features(path: str, data_dir: Path | None, encoder: list[str], workspace: Path, device: str) -> "Measured":
    """Read a dataset, and extract the features that its store lacks."""
    from cachefuse_cli.shared.extraction import ensure_features

    name, folder = find_dataset(path)
    raw = open_dataset(name, workspace, data_dir or folder)
    store, encoders = ensure_features(raw, encoder, workspace, device)
    return store, raw, encoders


def _with_texts(
    store: "FeatureStore", name: str | None, data_dir: Path | None, encoder: list[str], workspace: Path
) -> "Measured":
    """Read the dataset of a store; None with a note if it is not there."""
    from cachefuse.errors import MissingDataError
    from cachefuse_cli.shared import render

    with render.status(f"reading the texts of {store.dataset}"):
        try:
            return store, reopen_dataset(store, name, workspace, data_dir), encoder
        except MissingDataError as error:
            render.note(f"{error}; name its folder with --data-dir DIR")
            return store, None, encoder


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
