"""`cachefuse bench`: how far from this machine's limits."""

from typing import Annotated

import typer

from cachefuse_cli.options import WORKSPACE, Device, Json, Workspace

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
    from cachefuse_cli import bench_tables, render

    with render.interruptible("nothing was kept; run the same command again"):
        with render.status("loading torch"):
            from cachefuse.bench.store import bench_store
            from cachefuse.bench.timing import describe_machine
            from cachefuse_cli.progress import BenchProgress

            machine = describe_machine(device)
        with BenchProgress() as progress:
            rows = bench_store(workspace, device=device, memory=memory, on_progress=progress.update)
    if json:
        render.print_json(bench_tables.bench_dict(machine, rows))
    else:
        bench_tables.bench_report(machine, rows)


@bench.command()
def train(device: Device = "auto", workspace: Workspace = WORKSPACE, json: Json = False) -> None:
    """Measure the training of heads on random features: about five minutes on two cores.

    What is written to the workspace's disk is removed again.
    """
    from cachefuse_cli import bench_tables, render

    with render.interruptible("nothing was kept; run the same command again"):
        with render.status("loading torch"):
            from cachefuse.bench.timing import describe_machine
            from cachefuse.bench.train import bench_train
            from cachefuse_cli.progress import BenchProgress

            machine = describe_machine(device)
        with BenchProgress() as progress:
            rows = bench_train(workspace, device=device, on_progress=progress.update)
    if json:
        render.print_json(bench_tables.bench_dict(machine, rows))
    else:
        bench_tables.bench_report(machine, rows)
