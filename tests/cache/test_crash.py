"""Real processes, interrupted and killed: the next run goes on and ends as if nothing had happened."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from cachefuse.cache.extract import extract
from cachefuse.cache.store import FeatureStore
from cachefuse.data.dataset import load_dataset
from cachefuse.data.manifest import parse_manifest
from cachefuse.errors import CacheError
from cachefuse.runtime import Workspace

MANIFEST = """
name = "crash"
task = "multilabel"

[reader]
kind = "shapes"
train = 800
test = 200
"""
PROGRAM = str(Path(sys.executable).with_name("cachefuse"))
PATIENCE = 120  # seconds


@pytest.fixture
def start(tmp_path):
    """Start `cachefuse extract` on a workspace; what still runs is killed at the end."""
    (tmp_path / "crash.toml").write_text(MANIFEST)
    # A process started while SIGINT is ignored, as in a background job, would ignore it as well.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    started = []

    def start(workspace):
        process = subprocess.Popen(
            [PROGRAM, "extract", "--dataset", "./crash.toml", "--encoder", "classic", "--workspace", workspace,
             "--device", "cpu", "--batch-size", "8"],
            cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "200"},
        )  # fmt: skip
        started.append(process)
        return process

    yield start
    signal.signal(signal.SIGINT, before)
    for process in started:
        process.kill()
        process.communicate()


def wait_for(process, path):
    """Wait until a running process has made a file."""
    deadline = time.monotonic() + PATIENCE
    while not path.exists():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.005)


def extract_here(tmp_path, store):
    """The same extract, undisturbed and in this process."""
    dataset = load_dataset(parse_manifest(MANIFEST, "crash.toml"), tmp_path)
    return extract(dataset, ["classic"], store, device="cpu", batch_size=8)


@pytest.mark.slow
def test_interrupted_and_killed_runs_end_with_the_same_bytes(start, tmp_path, tools):
    undisturbed = tmp_path / "undisturbed.zarr"
    extract_here(tmp_path, undisturbed)
    store = Workspace(tmp_path / "killed").store("crash")
    journal = store / "features" / "classic" / "image" / "journal.jsonl"

    process = start("killed")
    wait_for(process, journal)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == 130
    assert "note: interrupted; finished blocks are kept; run the same command again to go on" in err
    assert "Traceback" not in err
    assert out == ""
    with pytest.raises(CacheError, match="run the same cachefuse extract again to go on"):
        FeatureStore(store).open_features("classic", "image").read()

    rng = random.Random(0)
    for _ in range(2):
        size = journal.stat().st_size
        process = start("killed")
        deadline = time.monotonic() + PATIENCE
        while process.poll() is None and journal.stat().st_size == size and time.monotonic() < deadline:
            time.sleep(0.005)
        time.sleep(rng.uniform(0, 0.1))
        process.kill()
        process.communicate()
    process = start("killed")
    out, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, err
    assert "rows are there already; going on with the rest" in err
    assert tools.files(store) == tools.files(undisturbed)


@pytest.mark.slow
def test_a_kill_while_the_store_is_made_blocks_nothing(start, tmp_path):
    cache = tmp_path / "killed" / "cache"
    process = start("killed")
    wait_for(process, cache)
    process.kill()
    process.communicate()
    extract_here(tmp_path, cache / "crash.zarr")
    assert Workspace(tmp_path / "killed").stores == [cache / "crash.zarr"]
    assert {path.name for path in cache.iterdir()} <= {"crash.zarr", ".crash.zarr.lock"}


@pytest.mark.slow
def test_a_second_writer_is_refused_while_the_first_lives(start, tmp_path):
    store = tmp_path / "shared" / "cache" / "crash.zarr"
    process = start("shared")
    wait_for(process, store / "features" / "classic" / "image" / "zarr.json")
    process.send_signal(signal.SIGSTOP)
    with pytest.raises(CacheError, match=r"another extract is writing to .*crash\.zarr; wait until it has ended"):
        extract_here(tmp_path, store)
    process.kill()
    process.communicate()
    extract_here(tmp_path, store)
