"""The bench on sizes so small that figures mean nothing; everything is measured for real all the same."""

import json
import math
import os
import time

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from cachefuse.bench import process, store, train
from cachefuse.bench.base import Bench, Sizes
from cachefuse.bench.process import run, train_memory
from cachefuse.bench.store import MEASUREMENTS, OF_MEMORY, bench_store
from cachefuse.bench.timing import BenchRow, describe_machine, in_turns, rates, timed
from cachefuse.bench.train import TrainBench, TrainSizes, bench_train, matrix_products
from cachefuse.errors import CacheError, ConfigError
from cachefuse.nn.heads import MLP, Linear
from fixtures.messages import naming

TINY = Sizes(
    pairs=1, gather_pairs=2, disk_pairs=1, width=16,
    rows=5000, open_rows=5000, images=40, image_layers=1, texts=5, text_layers=1,
    train_rows=400, extract_rows=40,
)  # fmt: skip
TINY_TRAIN = TrainSizes(pairs=1, epochs=2, rows=500, width=16, batch=128, small=(8,), large=(12, 8), heads=3)


@pytest.mark.slow
def test_every_row_is_there_and_finite(tmp_path):
    """A run with memory: its rows, its progress, and what it leaves behind."""
    seen = []
    rows = bench_store(
        tmp_path / "new" / "workspace", device="cpu", memory=True, sizes=TINY, on_progress=lambda *a: seen.append(a)
    )
    assert [row.name for row in rows] == [
        "gather", "gather_zarr", "read_all", "write", "open", "extract", "text", "memory_train", "memory_extract"
    ]  # fmt: skip
    for row in rows:
        assert row.ours is not None
        figures = [row.ours, row.baseline, row.ratio]
        assert all(math.isfinite(figure) and figure > 0 for figure in figures if figure is not None), row
        assert (row.baseline is None) == (row.ratio is None) == (row.name == "open")
        assert (row.met is None) == (row.name == "read_all")
    assert seen == [(what, i, len(rows)) for i, what in enumerate([*MEASUREMENTS, *OF_MEMORY])]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_nothing_is_left_after_an_error(tmp_path, monkeypatch, error):
    def fail(bench):
        assert list(tmp_path.rglob("*.zarr"))
        raise error

    def make(bench):
        return BenchRow("made", "", "rows", float(bench.features.n_rows))

    monkeypatch.setattr(store, "MEASUREMENTS", {"making": make, "failing": fail})
    (tmp_path / "kept").touch()
    with pytest.raises(error):
        bench_store(tmp_path, device="cpu", sizes=TINY)
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]


def test_a_disk_without_room_is_refused(tmp_path):
    large = Sizes(train_rows=10**13)
    with pytest.raises(CacheError, match=naming("GB")):
        bench_store(tmp_path, device="cpu", memory=True, sizes=large)
    assert large.n_bytes(memory=False) < 5e9
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_device_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=naming("device abacus")):
        bench_store(tmp_path, device="abacus", sizes=TINY)


def test_ours_and_the_baseline_are_the_same_rows(tmp_path):
    bench = Bench(tmp_path, "cpu", TINY)
    index = bench.random_rows()
    assert torch.equal(bench.rows.index_select(0, index), bench.raw[index])
    assert len(bench.raw.unique()) > 1000


def test_sides_take_turns():
    order = []
    ours, baseline = (timed(lambda side=side: order.append(side)) for side in ("ours", "baseline"))
    assert in_turns(ours, baseline, 3).shape == (3, 2)
    assert order == ["ours", "baseline"] * 3


def test_figures_are_medians():
    pairs = np.array([[1.0, 2.0], [2.0, 2.0], [4.0, 1.0]])
    row = rates(pairs, 8.0, "name", "what", "MB/s", goal=0.8)
    assert (row.ours, row.baseline, row.ratio) == (4.0, 4.0, 1.0)
    assert row.met


def test_goals():
    def met(**values):
        return BenchRow("name", "what", "s", **values).met

    assert met(ours=1.0, baseline=2.0, ratio=0.5, goal=0.5)
    assert met(ours=1.0, baseline=2.0, ratio=0.49, goal=0.5) is False
    assert met(ours=0.5, goal=0.5, at_most=True)
    assert met(ours=0.51, goal=0.5, at_most=True) is False
    assert met(ours=None, goal=0.5, at_most=True) is None
    assert met(ours=1.0, baseline=1.0, ratio=1.0) is None


def test_memory_is_left_out_where_the_system_does_not_tell(tmp_path, monkeypatch):
    monkeypatch.setattr(process, "ANONYMOUS", "no such line")
    row = train_memory(Bench(tmp_path, "cpu", TINY))
    assert (row.ours, row.met) == (None, None)
    assert row.note.startswith("not measured: only Linux")


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="Linux only")
def test_memory_that_a_process_takes_is_seen(monkeypatch):
    def peak(megabytes):
        code = f"import time; held = b'1' * {megabytes << 20}; time.sleep(0.5); print('null')"
        monkeypatch.setattr(process, "CODE", code)
        return run("anything")[1]

    assert peak(300) - peak(0) == pytest.approx(300 * (1 << 20) / 1e9, rel=0.1)


def test_a_process_that_fails_says_why(monkeypatch):
    monkeypatch.setattr(process, "CODE", "raise FileNotFoundError('no feature store at nowhere')")
    with pytest.raises(CacheError, match=naming("train nowhere")):
        run("train", path="nowhere")


def test_the_machine_is_named():
    machine = describe_machine("cpu")
    assert list(machine) == ["cpu", "cores", "torch", "device"]
    assert machine["cpu"]
    assert machine["cores"] >= 1
    assert json.dumps(machine)


def test_nothing_is_left_of_a_training_that_is_interrupted(tmp_path, monkeypatch):
    def interrupt(bench):
        assert bench.data.table.features["text"].shape == (500, 16)
        assert list(tmp_path.rglob("*.zarr"))
        raise KeyboardInterrupt

    monkeypatch.setattr(train, "MEASUREMENTS", {"waiting": interrupt})
    with pytest.raises(KeyboardInterrupt):
        bench_train(tmp_path / "workspace", device="cpu", sizes=TINY_TRAIN)
    assert list(tmp_path.iterdir()) == []


def test_the_table_in_memory_is_that_of_the_store_standardised(tmp_path):
    bench = TrainBench(tmp_path, "cpu", TINY_TRAIN)
    stored, x = bench.data.table.features["text"], bench.training_set.table.features["text"]
    assert (stored[:].dtype, x.dtype) == (np.float16, torch.float32)
    expected = stored[:].astype(np.float64)
    expected = (expected - expected.mean(0)) / expected.std(0)
    np.testing.assert_allclose(x, expected, atol=1e-5)


def test_an_epochs_time_leaves_out_the_first(tmp_path, monkeypatch):
    ticks = iter([100.0, 101.0, 104.0])
    bench = TrainBench(tmp_path, "cpu", TINY_TRAIN)
    assert bench.training_set.table
    monkeypatch.setattr(time, "perf_counter", lambda: next(ticks))
    assert bench.epoch(bench.model(()).fusion, bench.training_set.table, 2) == 2.0


@pytest.mark.parametrize("layers", [(), (8,), (12, 8)])
def test_matrix_products_are_those_of_training(layers):
    x = torch.randn(300, 16)
    head = MLP(16, 18, layers=layers) if layers else Linear(16, 18)

    def epoch():
        for rows in x.split(128):
            nn.functional.mse_loss(head(rows), torch.zeros(len(rows), 18)).backward()

    def work(function):
        with FlopCounterMode(display=False) as counter:
            function()
        return counter.get_total_flops()

    assert work(matrix_products(x, layers, 128)) == work(epoch) > 0
