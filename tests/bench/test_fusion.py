import pytest

from cachefuse.bench.fusion import MEASUREMENTS, FusionBench, FusionSizes, bench_fusion, step_products
from cachefuse.errors import ConfigError
from cachefuse.experiments import costs
from cachefuse.fusion import FUSIONS
from fixtures.messages import naming

TINY = FusionSizes(pairs=1, rows=24, batch=8, width=8, image_tokens=16, text_tokens=4, heads=2)


@pytest.mark.slow
def test_measures_a_step_later_fusion_and_every_fusion(tmp_path, monkeypatch):
    monkeypatch.setattr(costs, "SECONDS", 0.0)
    monkeypatch.setattr(costs, "TIMES", 1)
    told = []
    rows = bench_fusion(tmp_path / "here", device="cpu", sizes=TINY, on_progress=lambda *now: told.append(now))
    assert len(rows) == len(MEASUREMENTS) == len(told)
    by_name = {row.name: row for row in rows}
    assert len(by_name) == len(rows)
    assert by_name["cma"].goal == 0.6
    assert by_name["cma"].ratio == pytest.approx(by_name["cma"].baseline / by_name["cma"].ours)
    assert {f"item_{fusion}" for fusion in FUSIONS if not FUSIONS[fusion].solved} <= by_name.keys()
    assert all(row.ours > 0 for row in rows)
    later = [row for row in rows if row.name.startswith("midfusion")]
    assert all(row.ratio == pytest.approx(row.ours / row.baseline) for row in later)
    assert len({row.baseline for row in later}) == 1
    assert not (tmp_path / "here").exists()


@pytest.mark.parametrize("trimmed", [True, False])
def test_the_products_are_those_of_a_step(tmp_path, monkeypatch, trimmed):
    """Tokens and class tokens to the width, then each layer: forward and both gradients, below the first but one."""
    done = []
    monkeypatch.setattr("torch.Tensor.__matmul__", lambda a, b: done.append(a.shape[0] * a.shape[1] * b.shape[1]))
    step_products(FusionBench(tmp_path, "cpu", TINY), trimmed=trimmed)()
    t, w, b = 22, 8, 8
    of_all, of_queries = 2 * w * w, 2 * w * w + 8 * w * w  # keys and values; queries, output and the hidden layer
    first = t * (of_all + of_queries)
    last = t * of_all + (2 if trimmed else t) * of_queries
    expected = b * (2 * t * w * w + 3 * (first + last))
    assert sum(done) == 2 * expected  # once to warm up


def test_a_device_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=naming("device tpu")):
        bench_fusion(tmp_path, device="tpu", sizes=TINY)
