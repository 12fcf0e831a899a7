"""`cachefuse bench`: how far from this machine's limits."""

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Annotated

import typer

from cachefuse_cli.options import WORKSPACE, Device, Json, Workspace

if TYPE_CHECKING:
    from cachefuse.bench.timing import BenchRow

bench = typer.Typer(
    name="bench",
    help="How far from this machine's limits: ratios to plain baselines, measured by turns.",
    no_args_is_help=True,
)


@bench.command()
def store(
    memory: Annotated[
        bool,
        typer.Option(
            "--memory", help="Also measure memory over 6 GB of features: needs 10 GB of disk, takes some 10 minutes."
        ),
    ] = False,
    device: Device = "auto",
    workspace: Workspace = WORKSPACE,
    json: Json = False,
) -> None:
    """Measure reads, writes and extraction on the disk of the workspace: about four minutes on two cores.

    What is written there is removed again.
    """
    from cachefuse_cli import render

    with render.interruptible("nothing was kept; run the same command again"):
        with render.status("loading torch"):
            from cachefuse.bench.store import bench_store
        _measure(partial(bench_store, workspace, memory=memory), device, json)


@bench.command()
def train(device: Device = "auto", workspace: Workspace = WORKSPACE, json: Json = False) -> None:
    """Measure the training of heads on random features: two to five minutes on two cores.

    What is written to the workspace's disk is removed again.
    """
    from cachefuse_cli import render

    with render.interruptible("nothing was kept; run the same command again"):
        with render.status("loading torch"):
            from cachefuse.bench.train import bench_train
        _measure(partial(bench_train, workspace), device, json)


@bench.command()
def align(device: Device = "auto", workspace: Workspace = WORKSPACE, json: Json = False) -> None:
    """Measure alignment and exact search on random features: a minute or two on two cores.

       It takes 4 GB of memory and 2 GB of disk;
    what is written there is removed again.
    """
    from cachefuse_cli import render

    with render.interruptible("nothing was kept; run the same command again"):
        with render.status("loading torch"):
            from cachefuse.bench.align import bench_align
        _measure(partial(bench_align, workspace), device, json)


@bench.command()
def fusion(device: Device = "auto", workspace: Workspace = WORKSPACE, json: Json = False) -> None:
    """Measure fusions over tokens, their training steps and predictions: some minutes on two cores.

    What is written to the workspace's disk is removed again.
    """
    from cachefuse_cli import render

    with render.interruptible("nothing was kept; run the same command again"):
        with render.status("loading torch"):
            from cachefuse.bench.fusion import bench_fusion
        _measure(partial(bench_fusion, workspace), device, json)


def _measure(measure: "Callable[..., list[BenchRow]]", device: str, json: bool) -> None:
    from cachefuse.bench.timing import describe_machine
    from cachefuse_cli import bench_tables, render
    from cachefuse_cli.progress import BenchProgress

    machine = describe_machine(device)
    with BenchProgress() as progress:
        rows = measure(device=device, on_progress=progress.update)
    if json:
        render.print_json(bench_tables.bench_dict(machine, rows))
    else:
        bench_tables.bench_report(machine, rows)
