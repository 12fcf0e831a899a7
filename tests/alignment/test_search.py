"""Exact search against a full sort of float64 cosines, in pieces of any size."""

import numpy as np
import pytest
import torch

from cachefuse.alignment import search
from cachefuse.alignment.search import nearest
from cachefuse.errors import ConfigError

pytestmark = pytest.mark.usefixtures("one_thread")


class InMemory:
    """Rows (N, W) as a store gives them, in order a block at a time."""

    def __init__(self, x, block=100):
        self.x, self.shape, self.block_rows = torch.as_tensor(x), tuple(np.shape(x)), block
        self.dtype = self.x.dtype

    def __len__(self):
        return len(self.x)

    def in_order(self, size):
        for start in range(0, len(self.x), self.block_rows):
            stop = min(start + self.block_rows, len(self.x))
            for first in range(start, stop, size):
                yield first, self.x[first : min(first + size, stop)]

    def index_select(self, dim, index):
        return self.x.index_select(dim, index)


def some(n, width=8, seed=0, dtype=np.float16):
    return (np.random.default_rng(seed).normal(size=(n, width)) * 3).astype(dtype)


def cosines(rows, queries):
    """(Q, N) float64; 0 where there is no length."""
    x, q = np.asarray(rows, np.float64), np.asarray(queries, np.float64)
    lengths = np.linalg.norm(x, axis=1), np.linalg.norm(q, axis=1)
    return (q / np.where(lengths[1] > 0, lengths[1], 1)[:, None]) @ (
        x / np.where(lengths[0] > 0, lengths[0], 1)[:, None]
    ).T


def assert_nearest(hits, rows, queries, k, keep=None):
    scores = cosines(rows, queries)
    if keep is not None:
        scores[:, ~keep] = -np.inf
    n = min(k, len(rows) if keep is None else int(keep.sum()))
    expected = np.argsort(-scores, axis=1, kind="stable")[:, :n]
    assert hits.rows.shape == hits.scores.shape == (len(queries), n)
    assert hits.rows.dtype == np.int64
    assert hits.scores.dtype == np.float32
    np.testing.assert_array_equal(hits.rows, expected)
    np.testing.assert_allclose(hits.scores, np.take_along_axis(scores, expected, 1), rtol=0, atol=1e-5)


@pytest.fixture
def small_pieces(monkeypatch):
    """Rows are multiplied 8 at a time, and looked through 24 at a time."""
    monkeypatch.setattr(search, "PIECE", 8)
    monkeypatch.setattr(search, "SPAN", 24)


@pytest.mark.parametrize("n", [1, 7, 8, 9, 23, 24, 25, 47, 48, 49, 99, 100, 101, 124, 125, 201])
@pytest.mark.parametrize("block", [16, 32, 100, 1000])
def test_is_the_full_sort_wherever_pieces_end(small_pieces, n, block):
    rows, queries = some(n), torch.from_numpy(some(3, seed=1)).float()
    for k in (1, 5, 30, 500):
        assert_nearest(nearest(InMemory(rows, block), queries, k), rows, queries, k)


@pytest.mark.parametrize("n", [1, 1023, 1024, 1025, (1 << 16) - 1, 1 << 16, (1 << 16) + 1])
def test_is_the_full_sort_at_the_sizes_in_use(n):
    rows = some(n, 4, dtype=np.float32)  # float16 would have too many of the same cosine
    queries = torch.from_numpy(some(2, 4, seed=1, dtype=np.float32))
    hits = nearest(InMemory(rows, 4096), queries, 10)
    expected = cosines(rows, queries)
    np.testing.assert_allclose(hits.scores, -np.sort(-expected, 1)[:, :10], atol=1e-6)
    np.testing.assert_allclose(np.take_along_axis(expected, hits.rows, 1), hits.scores, atol=1e-6)
    assert all(len({*row}) == min(n, 10) for row in hits.rows.tolist())


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("n", [1, 64, 65, 300])
def test_of_a_store(make_store, n, dtype):
    """Whose blocks have 64 rows; the last is shorter."""
    x = some(n, dtype=dtype)
    store = make_store(["train"] * n, images={"toy": list(x)}, dtype=dtype)
    rows = store.open_features("toy", "image").rows()
    assert rows.block_rows == 64
    queries = torch.from_numpy(some(4, seed=2)).float()
    for k in (1, 3, n, n + 5):
        assert_nearest(nearest(rows, queries, k), x, queries, k)
    keep = np.random.default_rng(3).random(n) < 0.5
    keep[0] = True
    assert_nearest(nearest(rows, queries, 10, keep=keep), x, queries, 10, keep)


def test_of_captions_it_gives_rows(make_store):
    rng = np.random.default_rng(0)
    texts = [rng.normal(size=(count, 8)).astype(np.float16) for count in rng.integers(0, 4, 40)]
    store = make_store(["train"] * 40, texts={"toy": texts})
    flat = np.concatenate(texts)
    hits = nearest(store.open_features("toy", "text").rows(), torch.from_numpy(flat[[5, 17]]).float(), 1)
    assert hits.rows.tolist() == [[5], [17]]
    assert hits.scores == pytest.approx(1, abs=1e-6)


def test_one_query_is_as_several(small_pieces):
    rows, queries = some(90), torch.from_numpy(some(6, seed=1)).float()
    together = nearest(InMemory(rows), queries, 4)
    for i in range(6):
        alone = nearest(InMemory(rows), queries[i : i + 1], 4)
        assert alone.rows.tolist() == [together.rows[i].tolist()]


def test_no_queries_find_nothing():
    hits = nearest(InMemory(some(10)), torch.zeros(0, 8), 3)
    assert hits.rows.shape == hits.scores.shape == (0, 0)


def test_no_rows_have_nothing():
    hits = nearest(InMemory(np.zeros((0, 8), np.float16)), torch.ones(2, 8), 3)
    assert hits.rows.shape == hits.scores.shape == (2, 0)


class TestKeep:
    @pytest.mark.parametrize("share", [0.02, 0.3, 0.9])
    def test_rows_left_out_are_not_found(self, small_pieces, share):
        rows, queries = some(150), torch.from_numpy(some(3, seed=1)).float()
        keep = np.random.default_rng(0).random(150) < share
        keep[40] = True
        for k in (1, 5, 200):
            assert_nearest(nearest(InMemory(rows, 32), queries, k, keep=keep), rows, queries, k, keep)

    def test_whole_pieces_may_be_left_out(self, small_pieces):
        rows, queries = some(150), torch.from_numpy(some(3, seed=1)).float()
        for here in (slice(0, 3), slice(70, 80), slice(149, 150)):
            keep = np.zeros(150, bool)
            keep[here] = True
            assert_nearest(nearest(InMemory(rows), queries, 5, keep=keep), rows, queries, 5, keep)

    def test_all_left_out_is_nothing_found(self, small_pieces):
        hits = nearest(InMemory(some(60)), torch.ones(3, 8), 5, keep=np.zeros(60, bool))
        assert hits.rows.shape == hits.scores.shape == (3, 0)

    def test_the_mask_stays_as_it_was(self):
        keep = np.arange(60) % 2 == 0
        nearest(InMemory(some(60)), torch.ones(3, 8), 5, keep=keep)
        assert keep.tolist() == [i % 2 == 0 for i in range(60)]


class TestLengths:
    def test_of_queries_do_not_count(self):
        rows, query = some(50), torch.from_numpy(some(1, seed=1)).float()
        expected = nearest(InMemory(rows), query, 5)
        for factor in (1e-3, 1e4):
            hits = nearest(InMemory(rows), query * factor, 5)
            assert hits.rows.tolist() == expected.rows.tolist()
            np.testing.assert_allclose(hits.scores, expected.scores, atol=1e-6)
        half = nearest(InMemory(rows), query.half(), 5)
        assert half.rows.tolist() == expected.rows.tolist()

    def test_of_rows_do_not_count_either(self):
        rows = some(50, dtype=np.float32)
        longer = rows * np.random.default_rng(0).uniform(0.01, 100, (50, 1)).astype(np.float32)
        query = torch.ones(1, 8)
        assert nearest(InMemory(longer), query, 50).rows.tolist() == nearest(InMemory(rows), query, 50).rows.tolist()

    def test_rows_of_zeros_score_0(self, small_pieces):
        rows = some(60)
        rows[[3, 30]] = 0
        queries = torch.from_numpy(some(2, seed=1)).float()
        hits = nearest(InMemory(rows), queries, 60)
        for found, scores in zip(hits.rows, hits.scores, strict=True):
            assert scores[np.isin(found, [3, 30])].tolist() == [0, 0]
            assert sorted(found.tolist()) == list(range(60))
        assert np.isfinite(hits.scores).all()

    def test_a_query_of_zeros_is_as_near_to_any(self):
        assert nearest(InMemory(some(9)), torch.zeros(1, 8), 9).scores.tolist() == [[0] * 9]

    def test_rows_said_to_have_length_1_are_taken_as_they_are(self):
        rows = some(50, dtype=np.float32)
        rows /= np.linalg.norm(rows, axis=1, keepdims=True)
        query = torch.from_numpy(some(1, seed=1)).float()
        said, measured = (nearest(InMemory(rows), query, 10, unit=unit) for unit in (True, False))
        assert said.rows.tolist() == measured.rows.tolist()
        np.testing.assert_allclose(said.scores, measured.scores, atol=1e-6)
        twice = nearest(InMemory(rows * 2), query, 10, unit=True)
        np.testing.assert_allclose(twice.scores, 2 * said.scores, atol=1e-6)

    def test_float16_at_its_ends_is_no_infinity(self):
        rows = np.array([[65504] * 8, [-65504] * 8, [6e-8] * 8, [0] * 8], np.float16)
        hits = nearest(InMemory(rows), torch.full((1, 8), 65504.0), 4)
        assert hits.rows[0, :1].tolist() == [0]
        assert hits.rows[0, 3] == 1
        assert np.isfinite(hits.scores).all()


class TestTies:
    @pytest.mark.parametrize("unit", [False, True])
    @pytest.mark.parametrize("n_queries", [1, 2])
    @pytest.mark.parametrize("n", [4, 20, 60, 300])
    def test_of_equal_scores_the_first_row_comes_first(self, small_pieces, n, n_queries, unit):
        rows = np.tile(np.eye(8, dtype=np.float16)[:1], (n, 1))
        hits = nearest(InMemory(rows, 16), torch.eye(8)[:n_queries], 5, unit=unit)
        assert hits.rows.tolist() == [[0, 1, 2, 3, 4][:n]] * n_queries

    @pytest.mark.parametrize("unit", [False, True])
    @pytest.mark.parametrize("k", [1, 5, 90, 150, 300])
    def test_it_makes_no_difference_how_rows_are_divided(self, monkeypatch, unit, k):
        rows = np.eye(8, dtype=np.float16)[np.random.default_rng(0).integers(0, 3, 200)]
        query = torch.tensor([[1.0, 0.5, 0, 0, 0, 0, 0, 0]])
        expected = np.argsort(-(rows @ query[0].numpy()), kind="stable")[:k]
        for piece, span in ((8, 24), (16, 64), (7, 7), (1024, 1 << 16)):
            monkeypatch.setattr(search, "PIECE", piece)
            monkeypatch.setattr(search, "SPAN", span)
            assert nearest(InMemory(rows, 40), query, k, unit=unit).rows.tolist() == [expected.tolist()]

    @pytest.mark.parametrize("unit", [False, True])
    def test_equal_scores_in_different_pieces_come_in_order(self, small_pieces, unit):
        """One in each piece that is looked through, all others worse."""
        rows = np.tile(np.eye(8, dtype=np.float16)[1:2], (120, 1))
        rows[[10, 30, 50, 80, 110]] = np.eye(8, dtype=np.float16)[0]
        assert nearest(InMemory(rows, 24), torch.eye(8)[:1], 4, unit=unit).rows.tolist() == [[10, 30, 50, 80]]


class TestOrder:
    """It is that of float64, also where float32 can't tell rows apart."""

    @pytest.mark.parametrize("unit", [False, True])
    @pytest.mark.parametrize("n_queries", [1, 3])
    @pytest.mark.parametrize("dtype", [np.float16, np.float32])
    @pytest.mark.parametrize("width", [8, 512, 4096])
    def test_of_rows_nearer_to_one_another_than_a_rounding(self, small_pieces, unit, n_queries, dtype, width):
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
            hits = nearest(InMemory(rows), queries, k, unit=unit)
            best = -np.sort(-scores, axis=1)[:, :k]
            np.testing.assert_allclose(np.take_along_axis(scores, hits.rows, 1), best, rtol=0, atol=1e-12)

    @pytest.mark.parametrize("unit", [False, True])
    @pytest.mark.parametrize("dtype", [np.float16, np.float32])
    def test_of_equal_rows_the_first_comes_first(self, small_pieces, unit, dtype):
        rows = np.repeat(some(10, 300), 9, axis=0)[np.random.default_rng(0).permutation(90)]
        rows = (rows / np.linalg.norm(rows.astype(np.float64), axis=1, keepdims=True)).astype(dtype)
        query = torch.from_numpy(rows[:1]).float()
        hits = nearest(InMemory(rows), query, 9, unit=unit)
        assert hits.rows[0].tolist() == np.flatnonzero((rows == rows[0]).all(1)).tolist()

    def test_where_float16_is_added_up_in_float16(self, small_pieces, monkeypatch):
        """Then all is done in float32."""
        rows = TestUnitRowsInFloat16().unit(200, 64)
        query = torch.from_numpy(rows[:1]).float() + 0.1
        expected = nearest(InMemory(rows), query, 30, unit=True)
        monkeypatch.setattr(search, "_float16_adds_up", lambda: False)
        monkeypatch.setattr(search, "_in_float16", None)
        found = nearest(InMemory(rows), query, 30, unit=True)
        assert found.rows.tolist() == expected.rows.tolist()
        assert found.scores.tolist() == expected.scores.tolist()


class TestLargeValues:
    """Their squares, and their products with a query, may be more than float32 holds."""

    @pytest.mark.parametrize("factor", [1e12, 1e25, 1e37])
    def test_of_some_rows(self, small_pieces, factor):
        rows = some(90, 16, dtype=np.float32)
        rows[3::20] *= np.float32(factor)
        queries = torch.from_numpy(np.float64(rows[[3, 4]]) * 1e150)
        assert_nearest(nearest(InMemory(rows), queries, 12), rows, queries * 1e-150, 12)

    def test_rows_that_are_not_finite_are_not_found(self, small_pieces):
        rows = some(60, dtype=np.float32)
        rows[7], rows[8, 2], rows[9, 0], rows[9, 1] = np.nan, np.inf, np.inf, -np.inf
        queries = torch.from_numpy(some(2, seed=1)).float()
        for unit in (False, True):
            found = nearest(InMemory(rows), queries, 60, unit=unit)
            assert sorted(found.rows[0].tolist()) == [row for row in range(60) if row not in (7, 8, 9)]

    @pytest.mark.parametrize("value", [np.nan, np.inf])
    def test_queries_that_are_not_finite(self, value):
        with pytest.raises(ConfigError, match=r"^queries must be finite\. Got NaN or infinity instead$"):
            nearest(InMemory(some(9)), torch.tensor([[1.0] * 8, [value] * 8]), 3)

    @pytest.mark.parametrize("keep", [np.ones(8, bool), np.ones(10, bool), np.ones(9, int)])
    def test_a_keep_of_another_shape(self, keep):
        with pytest.raises(ConfigError, match=r"^keep must be \(9,\) bool\. Got "):
            nearest(InMemory(some(9)), torch.ones(1, 8), 3, keep=keep)


class TestUnitRowsInFloat16:
    """One query among rows of length 1 is looked for in float16 first, and must be found as in float32."""

    def unit(self, n, width, seed=0):
        x = np.random.default_rng(seed).normal(size=(n, width))
        return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float16)

    def assert_exact(self, rows, query, k, block=100, keep=None):
        """Scores are products with the rows as they are stored: rounding leaves their lengths a little off 1."""
        exact = query.double().numpy()[0]
        scores = rows.astype(np.float64) @ (exact / np.linalg.norm(exact))
        scores[~keep if keep is not None else slice(0)] = -np.inf
        hits = nearest(InMemory(rows, block), query, k, unit=True, keep=keep)
        n = min(k, len(rows) if keep is None else int(keep.sum()))
        best = -np.sort(-scores)[:n]
        assert hits.scores.shape == (1, n)
        np.testing.assert_allclose(hits.scores[0], best, rtol=1e-7, atol=1e-12)
        np.testing.assert_allclose(scores[hits.rows[0]], best, rtol=0, atol=1e-12)
        assert len({*hits.rows[0].tolist()}) == n

    @pytest.mark.parametrize("n", [1, 7, 24, 25, 100, 201])
    @pytest.mark.parametrize("block", [16, 100, 1000])
    def test_wherever_pieces_end(self, small_pieces, n, block):
        query = torch.randn(1, 16, generator=torch.Generator().manual_seed(1))
        for k in (1, 5, 30, 500):
            self.assert_exact(self.unit(n, 16), query, k, block)

    @pytest.mark.parametrize("width", [1, 7, 64, 768, 4096])
    @pytest.mark.parametrize("spread", [0.0, 1e-4, 1e-3, 1e-2])
    def test_rows_nearer_to_one_another_than_float16_can_tell(self, small_pieces, width, spread):
        rng = np.random.default_rng(0)
        query = rng.normal(size=(1, width))
        query /= np.linalg.norm(query)
        rows = query + spread * rng.normal(size=(300, width)) / np.sqrt(width)
        rows = (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float16)
        for k in (1, 10, 299):
            self.assert_exact(rows, torch.from_numpy(query).float(), k)

    @pytest.mark.parametrize("width", [8, 64, 512])
    def test_rows_that_the_rounding_of_the_query_puts_in_another_order(self, small_pieces, width):
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
                self.assert_exact(rows, torch.from_numpy(query)[None], k)
                self.assert_exact(rows[::-1].copy(), torch.from_numpy(query)[None], k)

    def test_rows_all_on_one_side(self, small_pieces):
        """Sums of many terms of one sign, where rounding adds up most."""
        rng = np.random.default_rng(0)
        rows = 1 + 0.02 * rng.random((300, 2048))
        rows = (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float16)
        self.assert_exact(rows, torch.ones(1, 2048) + 0.3 * torch.rand(1, 2048), 10)

    def test_the_best_may_come_last_or_first(self, small_pieces):
        rows, query = self.unit(200, 16), torch.randn(1, 16, generator=torch.Generator().manual_seed(1))
        order = np.argsort(rows.astype(np.float64) @ query.double().numpy()[0])
        for rows_in_order in (rows[order], rows[order[::-1]]):
            self.assert_exact(rows_in_order, query, 7)

    def test_rows_left_out_and_rows_of_zeros(self, small_pieces):
        rows, query = self.unit(200, 16), torch.randn(1, 16, generator=torch.Generator().manual_seed(1))
        rows[::5] = 0
        for share in (0.05, 0.5, 0.95):
            keep = np.random.default_rng(0).random(200) < share
            for k in (1, 20, 200):
                self.assert_exact(rows, query, k, keep=keep)
        hits = nearest(InMemory(rows), query, 5, unit=True, keep=np.zeros(200, bool))
        assert hits.rows.shape == (1, 0)

    def test_a_query_far_from_all(self, small_pieces):
        rows = np.abs(self.unit(200, 16))
        self.assert_exact(rows, -torch.ones(1, 16), 9)

    def test_a_query_of_zeros(self, small_pieces):
        hits = nearest(InMemory(self.unit(100, 16)), torch.zeros(1, 16), 5, unit=True)
        assert hits.scores.tolist() == [[0] * 5]
        assert hits.rows.tolist() == [[0, 1, 2, 3, 4]]

    def test_of_a_store(self, make_store):
        rows = self.unit(300, 32)
        store = make_store(["train"] * 300, images={"toy": list(rows)})
        stored = store.open_features("toy", "image").rows()
        query = torch.from_numpy(rows[37:38]).float() + 0.01
        alone = nearest(stored, query, 20, unit=True)
        both = nearest(stored, torch.cat([query, -query]), 20, unit=True)
        assert alone.rows.tolist() == both.rows[:1].tolist()
        np.testing.assert_allclose(alone.scores, both.scores[:1], atol=1e-6)
        assert alone.rows[0, 0] == 37


def test_tells_how_far_it_is(small_pieces):
    told = []
    nearest(InMemory(some(100)), torch.ones(2, 8), 5, on_rows=lambda done, total: told.append((done, total)))
    assert told[-1] == (100, 100)
    assert [done for done, _ in told] == sorted({done for done, _ in told})


@pytest.mark.parametrize("k", [0, -3])
def test_k_below_1_is_refused(k):
    with pytest.raises(ConfigError, match=f"k must be at least 1. Got {k} instead"):
        nearest(InMemory(some(10)), torch.ones(1, 8), k)


@pytest.mark.parametrize("shape", [(1, 7), (8,), (1, 1, 8), (0, 9)])
def test_other_widths_are_refused(shape):
    with pytest.raises(ConfigError) as raised:
        nearest(InMemory(some(10)), torch.ones(shape), 3)
    assert str(raised.value) == f"queries must have shape (Q, 8). Got {shape} instead"
