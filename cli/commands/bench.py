"""`cachefuse bench`: speed and memory beside plain baselines."""

from importlib import import_module
from pathlib import Path
from typing import Annotated

import typer

from cachefuse_cli.shared.options import WORKSPACE, Device, Json, Threads, Workspace

bench = typer.Typer(
    name="bench",
    help="Measure speed and memory as ratios to plain baselines.",
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
