"""Which row is nearer is decided in float64, also where float16 and float32 cannot tell; values of any size."""

import numpy as np
import pytest
import torch

from cachefuse.alignment import search
from cachefuse.alignment.search import nearest
from cachefuse.errors import ConfigError
from fixtures.messages import naming

pytestmark = pytest.mark.usefixtures("one_thread")


def unit(n, width, seed=0):
    x = np.random.default_rng(seed).normal(size=(n, width))
    return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float16)


@pytest.fixture
def assert_exact(in_memory):
    def assert_exact(rows, query, k, block=100, keep=None):
        """Scores are products with the rows as they are stored: rounding leaves their lengths a little off 1."""
        exact = query.double().numpy()[0]
        scores = rows.astype(np.float64) @ (exact / np.linalg.norm(exact))
        scores[~keep if keep is not None else slice(0)] = -np.inf
        hits = nearest(in_memory(rows, block), query, k, unit=True, keep=keep)
        n = min(k, len(rows) if keep is None else int(keep.sum()))
        best = -np.sort(-scores)[:n]
        assert hits.scores.shape == (1, n)
        np.testing.assert_allclose(hits.scores[0], best, rtol=1e-7, atol=1e-12)
        np.testing.assert_allclose(scores[hits.rows[0]], best, rtol=0, atol=1e-12)
        assert len({*hits.rows[0].tolist()}) == n

    return assert_exact


@pytest.mark.parametrize("default", [torch.float64, torch.float16])
def test_whatever_torchs_default_type_is(default, in_memory):
    rows = unit(300, 16).astype(np.float32)
    query = torch.from_numpy(unit(1, 16, seed=1).astype(np.float32))
    expected = nearest(in_memory(rows), query, 5)
    torch.set_default_dtype(default)
    try:
        hits = nearest(in_memory(rows), query, 5)
    finally:
        torch.set_default_dtype(torch.float32)
    assert hits.rows.tolist() == expected.rows.tolist()


class TestOrder:
    """It is that of float64, also where float32 cannot tell rows apart."""

    @pytest.mark.parametrize("unit", [False, True])
    @pytest.mark.parametrize("n_queries", [1, 3])
    @pytest.mark.parametrize("dtype", [np.float16, np.float32])
    @pytest.mark.parametrize("width", [8, 512, 4096])
    @pytest.mark.one_in(2)
    def test_of_rows_nearer_to_one_another_than_a_rounding(
        self, small_pieces, unit, n_queries, dtype, width, in_memory
    ):
        rng = np.random.default_rng(width)
        query = rng.normal(size=width)
        query /= np.linalg.norm(query)
        rows = query + 1e-3 * rng.normal(size=(200, width)) / np.sqrt(width)
        if unit:
            rows /= np.linalg.norm(rows, axis=1, keepdims=True)
        rows = rows.astype(dtype)
        queries = torch.from_numpy(query + 1e-4 * rng.normal(size=(n_queries, width)) / np.sqrt(width)).float()
        exact = queries.double().numpy()
        scores = (exact / np.linalg.norm(exact, axis=1, keepdims=True)) @ rows.astype(np.float64).T
        if not unit:
            scores /= np.linalg.norm(rows.astype(np.float64), axis=1)
        for k in (1, 10, 199):
            hits = nearest(in_memory(rows), queries, k, unit=unit)
            best = -np.sort(-scores, axis=1)[:, :k]
            np.testing.assert_allclose(np.take_along_axis(scores, hits.rows, 1), best, rtol=0, atol=1e-12)

    @pytest.mark.parametrize("unit", [False, True])
    @pytest.mark.parametrize("dtype", [np.float16, np.float32])
    def test_of_equal_rows_the_first_comes_first(self, small_pieces, unit, dtype, in_memory, some):
        rows = np.repeat(some(10, 300), 9, axis=0)[np.random.default_rng(0).permutation(90)]
        rows = (rows / np.linalg.norm(rows.astype(np.float64), axis=1, keepdims=True)).astype(dtype)
        query = torch.from_numpy(rows[:1]).float()
        hits = nearest(in_memory(rows), query, 9, unit=unit)
        assert hits.rows[0].tolist() == np.flatnonzero((rows == rows[0]).all(1)).tolist()

    def test_where_float16_is_added_up_in_float16(self, small_pieces, monkeypatch, in_memory):
        """Then all is done in float32."""
        rows = unit(200, 64)
        query = torch.from_numpy(rows[:1]).float() + 0.1
        expected = nearest(in_memory(rows), query, 30, unit=True)
        monkeypatch.setattr(search, "_float16_adds_up", lambda: False)
        monkeypatch.setattr(search, "_in_float16", None)
        found = nearest(in_memory(rows), query, 30, unit=True)
        assert found.rows.tolist() == expected.rows.tolist()
        assert found.scores.tolist() == expected.scores.tolist()


class TestLargeValues:
    """Their squares, and their products with a query, may be more than float32 holds."""

    @pytest.mark.parametrize("factor", [1e12, 1e25, 1e37])
    def test_of_some_rows(self, small_pieces, factor, in_memory, some):
        rows = some(90, 16, dtype=np.float32)
        rows[3::20] *= np.float32(factor)
        queries = torch.from_numpy(np.float64(rows[[3, 4]]) * 1e150)
        x = rows / np.linalg.norm(rows.astype(np.float64), axis=1, keepdims=True)
        expected = np.argsort(-x[[3, 4]] @ x.T, axis=1)[:, :12]
        np.testing.assert_array_equal(nearest(in_memory(rows), queries, 12).rows, expected)

    def test_rows_that_are_not_finite_are_not_found(self, small_pieces, in_memory, some):
        rows = some(60, dtype=np.float32)
        rows[7], rows[8, 2], rows[9, 0], rows[9, 1] = np.nan, np.inf, np.inf, -np.inf
        queries = torch.from_numpy(some(2, seed=1)).float()
        for unit in (False, True):
            found = nearest(in_memory(rows), queries, 60, unit=unit)
            assert sorted(found.rows[0].tolist()) == [row for row in range(60) if row not in (7, 8, 9)]

    @pytest.mark.parametrize("value", [np.nan, np.inf])
    def test_queries_that_are_not_finite(self, value, in_memory, some):
        with pytest.raises(ConfigError, match=naming("queries NaN infinity")):
            nearest(in_memory(some(9)), torch.tensor([[1.0] * 8, [value] * 8]), 3)

    @pytest.mark.parametrize("keep", [np.ones(8, bool), np.ones(10, bool), np.ones(9, int)])
    def test_a_keep_of_another_shape(self, keep, in_memory, some):
        with pytest.raises(ConfigError, match=naming("keep 9")):
            nearest(in_memory(some(9)), torch.ones(1, 8), 3, keep=keep)


class TestUnitRowsInFloat16:
    """One query among rows of length 1 is looked for in float16 first, and must be found as in float32."""

    @pytest.mark.parametrize("n", [1, 7, 24, 25, 100, 201])
    @pytest.mark.parametrize("block", [16, 100, 1000])
    def test_wherever_pieces_end(self, small_pieces, n, block, assert_exact):
        query = torch.randn(1, 16, generator=torch.Generator().manual_seed(1))
        for k in (1, 5, 30, 500):
            assert_exact(unit(n, 16), query, k, block)

    @pytest.mark.parametrize("width", [1, 7, 64, 768, 4096])
    @pytest.mark.parametrize("spread", [0.0, 1e-4, 1e-3, 1e-2])
    def test_rows_nearer_to_one_another_than_float16_can_tell(self, small_pieces, width, spread, assert_exact):
        rng = np.random.default_rng(0)
        query = rng.normal(size=(1, width))
        query /= np.linalg.norm(query)
        rows = query + spread * rng.normal(size=(300, width)) / np.sqrt(width)
        rows = (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float16)
        for k in (1, 10, 299):
            assert_exact(rows, torch.from_numpy(query).float(), k)

    @pytest.mark.parametrize("width", [8, 64, 512])
    def test_rows_that_the_rounding_of_the_query_puts_in_another_order(self, small_pieces, width, assert_exact):
        """Every other row lies the way that the query is rounded, and every other against it."""
        query = np.random.default_rng(0).normal(size=width).astype(np.float32)
        query /= np.linalg.norm(query)
        lost = query - query.astype(np.float16).astype(np.float32)
        lost -= lost @ query * query
        lost /= np.linalg.norm(lost)
        sign = np.where(np.arange(48) % 2, 1, -1)[:, None]
        for least in np.linspace(0.5, 0.95, 20):
            cosine = np.linspace(least, least + 3e-3, 48)[:, None]
            rows = (cosine * query + sign * np.sqrt(1 - cosine**2) * lost).astype(np.float16)
            for k in (1, 2, 5, 12):
                assert_exact(rows, torch.from_numpy(query)[None], k)
                assert_exact(rows[::-1].copy(), torch.from_numpy(query)[None], k)

    def test_rows_all_on_one_side(self, small_pieces, assert_exact):
        """Sums of many terms of one sign, where rounding adds up most."""
        rng = np.random.default_rng(0)
        rows = 1 + 0.02 * rng.random((300, 2048))
        rows = (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float16)
        assert_exact(rows, torch.ones(1, 2048) + 0.3 * torch.rand(1, 2048), 10)

    def test_the_best_may_come_last_or_first(self, small_pieces, assert_exact):
        rows, query = unit(200, 16), torch.randn(1, 16, generator=torch.Generator().manual_seed(1))
        order = np.argsort(rows.astype(np.float64) @ query.double().numpy()[0])
        for rows_in_order in (rows[order], rows[order[::-1]]):
            assert_exact(rows_in_order, query, 7)

    def test_rows_left_out_and_rows_of_zeros(self, small_pieces, in_memory, assert_exact):
        rows, query = unit(200, 16), torch.randn(1, 16, generator=torch.Generator().manual_seed(1))
        rows[::5] = 0
        for share in (0.05, 0.5, 0.95):
            keep = np.random.default_rng(0).random(200) < share
            for k in (1, 20, 200):
                assert_exact(rows, query, k, keep=keep)
        hits = nearest(in_memory(rows), query, 5, unit=True, keep=np.zeros(200, bool))
        assert hits.rows.shape == (1, 0)

    def test_a_query_far_from_all(self, small_pieces, assert_exact):
        rows = np.abs(unit(200, 16))
        assert_exact(rows, -torch.ones(1, 16), 9)

    def test_a_query_of_zeros(self, small_pieces, in_memory):
        hits = nearest(in_memory(unit(100, 16)), torch.zeros(1, 16), 5, unit=True)
        assert hits.scores.tolist() == [[0] * 5]
        assert hits.rows.tolist() == [[0, 1, 2, 3, 4]]

    def test_of_a_store(self, make_store):
        rows = unit(300, 32)
        store = make_store(["train"] * 300, images={"toy": list(rows)})
        stored = store.open_features("toy", "image").rows()
        query = torch.from_numpy(rows[37:38]).float() + 0.01
        alone = nearest(stored, query, 20, unit=True)
        both = nearest(stored, torch.cat([query, -query]), 20, unit=True)
        assert alone.rows.tolist() == both.rows[:1].tolist()
        np.testing.assert_allclose(alone.scores, both.scores[:1], atol=1e-6)
        assert alone.rows[0, 0] == 37
