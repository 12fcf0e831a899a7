"""The training bench on sizes so small that figures mean nothing; everything is measured for real all the same."""

import math

import pytest
import torch

from cachefuse.bench.train import MEASUREMENTS, TrainSizes, bench_train, matrix_products
from cachefuse.errors import ConfigError
from fixtures.messages import naming

TINY = TrainSizes(pairs=1, epochs=2, rows=6000, width=16, batch=512, small=(8,), large=(16, 8), heads=3)


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    folder, seen = tmp_path_factory.mktemp("bench"), []
    rows = bench_train(folder / "new", device="cpu", sizes=TINY, on_progress=lambda *a: seen.append(a))
    return rows, seen, folder


def test_every_row_is_there_and_finite(measured):
    rows, seen, folder = measured
    names = ["linear", "linear_drawn", "mlp", "mlp_large", "dataloader", "mapped", "together"]
    assert [row.name for row in rows] == names
    for row in rows:
        assert all(math.isfinite(figure) and figure > 0 for figure in (row.ours, row.baseline, row.ratio)), row
    assert {row.name: row.goal for row in rows if row.goal is not None} == {
        "linear": 0.75, "mlp_large": 0.70, "dataloader": 3, "mapped": 0.97, "together": 2.2
    }  # fmt: skip
    assert seen == [(what, i, len(rows)) for i, what in enumerate(MEASUREMENTS)]
    assert list(folder.iterdir()) == []


def test_a_device_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=naming("device tpu")):
        bench_train(tmp_path / "new", device="tpu", sizes=TINY)
    assert not (tmp_path / "new").exists()


def test_the_products_are_those_of_an_epoch(monkeypatch):
    done = []
    real = torch.mm
    monkeypatch.setattr(torch, "mm", lambda a, b, out: done.append((a.shape, b.shape)) or real(a, b, out=out))
    matrix_products(torch.randn(10, 4), (6,), batch=8)()
    assert done == [
        ((8, 4), (4, 6)), ((8, 6), (6, 18)), ((18, 8), (8, 6)), ((8, 18), (18, 6)), ((6, 8), (8, 4)),
        ((2, 4), (4, 6)), ((2, 6), (6, 18)), ((18, 2), (2, 6)), ((2, 18), (18, 6)), ((6, 2), (2, 4)),
    ]  # fmt: skip
