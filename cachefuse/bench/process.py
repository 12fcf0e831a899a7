"""Measurements in new processes: the first read of a store, and the peak memory of training and extraction."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cachefuse.alignment.search import nearest
from cachefuse.bench.base import ROW_BATCH, Bench, write_store
from cachefuse.bench.timing import BenchRow, seconds
from cachefuse.data.dataset import load_dataset
from cachefuse.data.manifest import parse_manifest
from cachefuse.errors import CacheError
from cachefuse.extraction.extract import extract
from cachefuse.runs.train import train_head
from cachefuse.store.store import FeatureStore
from cachefuse.training.config import TrainConfig

SAMPLING = 0.005  # seconds between two samples of a process's memory
ANONYMOUS = "RssAnon:"  # memory without pages of mapped files, which the system may drop
CODE = "import sys; from cachefuse.bench.process import run_here; run_here(*sys.argv[1:])"
MOST_MEMORY = 1.5  # GB
TRAIN_BATCH = 1024
SHAPES = 'name = "shapes"\ntask = "multilabel"\nreader = {{ kind = "shapes", train = {}, test = 0 }}'


def first_batch(bench: Bench) -> BenchRow:
    """Measure the seconds to open a store and read one random batch with its checksums, without imports."""
    n_rows, path = bench.sizes.open_rows, bench.folder / "large.zarr"
    write_store(path, n_rows, bench.sizes.width)
    times = [run("read_first_batch", path=str(path), seed=seed)[0] for seed in range(bench.sizes.pairs)]
    shutil.rmtree(path)
    return BenchRow(
        "open", f"open {n_rows:,} rows, first batch", "s", float(np.median(times)), goal=0.5, at_most=True,
        note="the first batch reads, and so verifies, every block; the files are in the system's cache",
    )  # fmt: skip


def train_memory(bench: Bench) -> BenchRow:
    """Measure the memory of training a linear head for one epoch, against a quarter of the rows."""

    def peak(n_rows: int) -> float:
        path = bench.folder / "train.zarr"
        write_store(path, n_rows, bench.sizes.width)
        try:
            return run("train", path=str(path))[1]
        finally:
            shutil.rmtree(path)

    return _memory("memory_train", "train on {:,} rows / a quarter", bench.sizes.train_rows, peak)


def extract_memory(bench: Bench) -> BenchRow:
    """Measure the memory of `extract` with `classic` on the built-in shapes, against a quarter of the rows."""

    def peak(n_rows: int) -> float:
        path = bench.folder / f"shapes-{n_rows}.zarr"
        try:
            return run("extract_shapes", path=str(path), n_rows=n_rows)[1]
        finally:
            shutil.rmtree(path, ignore_errors=True)

    return _memory("memory_extract", "extract {:,} rows / a quarter", bench.sizes.extract_rows, peak)


def _memory(name: str, what: str, n_rows: int, peak: Callable[[int], float]) -> BenchRow:
    what = what.format(n_rows)
    if not _anonymous(os.getpid()):
        note = "not measured: only Linux reports a process's own memory"
        return BenchRow(name, what, "GB", None, goal=MOST_MEMORY, at_most=True, note=note)
    quarter = peak(n_rows // 4)
    whole = peak(n_rows)
    return BenchRow(name, what, "GB", whole, quarter, whole / quarter, goal=MOST_MEMORY, at_most=True)


def run(function: str, **arguments: object) -> tuple[Any, float]:
    """Run a function of this module in a new process; return its result and its peak memory in GB.

    Raises CacheError with the last line of the process's stderr if it fails.
    """
    command, most = [sys.executable, "-c", CODE, function, json.dumps(arguments)], 0.0
    with (
        tempfile.TemporaryFile() as errors,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True) as process,
    ):
        try:
            while process.poll() is None:
                most = max(most, _anonymous(process.pid))
                time.sleep(SAMPLING)
        except BaseException:
            process.kill()
            raise
        answer = process.stdout.read() if process.stdout else ""
        if process.returncode:
            errors.seek(0)
            last = errors.read().decode(errors="replace").strip().splitlines()[-1:]
            raise CacheError(f"{function} failed in a new process: {''.join(last) or process.returncode}")
    return json.loads(answer), most


def run_here(function: str, arguments: str) -> None:
    """Run a function of this module and print its result as JSON."""
    print(json.dumps(globals()[function](**json.loads(arguments))))


def read_first_batch(path: str, seed: int) -> float:
    """Open a store and read one random batch; return the seconds."""

    def read() -> None:
        (features,) = FeatureStore(Path(path)).features()
        index = rng.integers(0, features.n_rows, ROW_BATCH)
        features.rows().index_select(0, torch.from_numpy(index))

    rng = np.random.default_rng(seed)
    return seconds(read)


def train(path: str) -> None:
    """Train a linear head for one epoch."""
    config = TrainConfig(fusion="text", head="linear", epochs=1, patience=0, batch_size=TRAIN_BATCH)
    train_head(FeatureStore(Path(path)), config, device="cpu")


def extract_shapes(path: str, n_rows: int) -> None:
    """Extract features of the built-in shapes with `classic`."""
    manifest = parse_manifest(SHAPES.format(n_rows), "shapes.toml")
    extract(load_dataset(manifest, Path(path)), ["classic"], Path(path), device="cpu")


def search(path: str, k: int) -> None:
    """Find the ``k`` rows of a store nearest to a random vector; with 0 only open the store."""
    (features,) = FeatureStore(Path(path)).features()
    rows = features.rows()
    if k:
        nearest(rows, torch.randn(1, rows.shape[1]), k, unit=True)


def _anonymous(pid: int) -> float:
    """Return a process's own memory in GB; 0 if the system does not report it, or the process has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0.0
    return next((int(line.split()[1]) * 1024 / 1e9 for line in lines if line.startswith(ANONYMOUS)), 0.0)
