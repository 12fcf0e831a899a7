import pytest

from cachefuse.bench.align import AlignBench, AlignSizes, bench_align, matrix_products
from cachefuse.errors import ConfigError
from fixtures.messages import naming

TINY = AlignSizes(pairs=2, samples=40, captions=2, width=8, batch=16, common=8, rows=3000, queries=3)


@pytest.mark.parametrize("memory", ["made up", pytest.param("measured", marks=pytest.mark.slow)])
def test_measures_an_epoch_and_a_search(memory, tmp_path, monkeypatch, request):
    if memory == "made up":
        request.getfixturevalue("one_process")
    monkeypatch.setattr("cachefuse.bench.align.REST", 0)
    told = []
    folder = tmp_path / "here"
    rows = bench_align(folder, device="cpu", sizes=TINY, on_progress=lambda *now: told.append(now))
    assert [row.name for row in rows] == ["align", "search"]
    for row in rows:
        assert row.ours > 0
        assert row.baseline > 0
        assert row.ratio == pytest.approx(row.baseline / row.ours, rel=0.9)
    align, search = rows
    assert (align.goal, search.goal) == (None, 0.8)
    assert "MB of memory, with a quarter" in search.note
    assert told == [("an epoch of alignment", 0, 2), ("exact search", 1, 2)]
    assert not folder.exists()


def test_the_products_are_those_of_an_epoch(tmp_path, monkeypatch):
    """Of each batch and side: every layer forward and its gradients, but that of what is stored; then the cosines."""
    done = []
    monkeypatch.setattr("torch.Tensor.__matmul__", lambda a, b: done.append(a.shape[0] * a.shape[1] * b.shape[1]))
    matrix_products(AlignBench(tmp_path, "cpu", TINY))()
    layers = [(8, 8)] * 4 + [(8, 32), (32, 8)]
    weights = sum(i * o for i, o in layers)
    expected = sum(2 * n * (3 * weights - 8 * 8) + 3 * n * n * 8 for n in (16, 16, 8))
    assert sum(done) == expected


def test_a_device_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=naming("device tpu")):
        bench_align(tmp_path, device="tpu", sizes=TINY)
