"""Exact search against a full sort of float64 cosines, in pieces of any size."""

import numpy as np
import pytest
import torch

from cachefuse.alignment import search
from cachefuse.alignment.search import nearest
from cachefuse.errors import ConfigError
from fixtures.messages import naming

pytestmark = pytest.mark.usefixtures("one_thread")


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


@pytest.mark.parametrize("n", [1, 7, 8, 9, 23, 24, 25, 47, 48, 49, 99, 100, 101, 124, 125, 201])
@pytest.mark.parametrize("block", [16, 32, 100, 1000])
def test_is_the_full_sort_wherever_pieces_end(small_pieces, n, block, in_memory, some):
    rows, queries = some(n), torch.from_numpy(some(3, seed=1)).float()
    for k in (1, 5, 30, 500):
        assert_nearest(nearest(in_memory(rows, block), queries, k), rows, queries, k)


@pytest.mark.parametrize("n", [1, 1023, 1024, 1025, (1 << 16) - 1, 1 << 16, (1 << 16) + 1])
def test_is_the_full_sort_at_the_sizes_in_use(n, in_memory, some):
    rows = some(n, 4, dtype=np.float32)  # float16 would have too many of the same cosine
    queries = torch.from_numpy(some(2, 4, seed=1, dtype=np.float32))
    hits = nearest(in_memory(rows, 4096), queries, 10)
    expected = cosines(rows, queries)
    np.testing.assert_allclose(hits.scores, -np.sort(-expected, 1)[:, :10], atol=1e-6)
    np.testing.assert_allclose(np.take_along_axis(expected, hits.rows, 1), hits.scores, atol=1e-6)
    assert all(len({*row}) == min(n, 10) for row in hits.rows.tolist())


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("n", [1, 64, 65, 300])
def test_of_a_store(make_store, n, dtype, some):
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


def test_one_query_is_as_several(small_pieces, in_memory, some):
    rows, queries = some(90), torch.from_numpy(some(6, seed=1)).float()
    together = nearest(in_memory(rows), queries, 4)
    for i in range(6):
        alone = nearest(in_memory(rows), queries[i : i + 1], 4)
        assert alone.rows.tolist() == [together.rows[i].tolist()]


def test_no_queries_find_nothing(in_memory, some):
    hits = nearest(in_memory(some(10)), torch.zeros(0, 8), 3)
    assert hits.rows.shape == hits.scores.shape == (0, 0)


def test_no_rows_have_nothing(in_memory):
    hits = nearest(in_memory(np.zeros((0, 8), np.float16)), torch.ones(2, 8), 3)
    assert hits.rows.shape == hits.scores.shape == (2, 0)


class TestKeep:
    @pytest.mark.parametrize("share", [0.02, 0.3, 0.9])
    def test_rows_left_out_are_not_found(self, small_pieces, share, in_memory, some):
        rows, queries = some(150), torch.from_numpy(some(3, seed=1)).float()
        keep = np.random.default_rng(0).random(150) < share
        keep[40] = True
        for k in (1, 5, 200):
            assert_nearest(nearest(in_memory(rows, 32), queries, k, keep=keep), rows, queries, k, keep)

    def test_whole_pieces_may_be_left_out(self, small_pieces, in_memory, some):
        rows, queries = some(150), torch.from_numpy(some(3, seed=1)).float()
        for here in (slice(0, 3), slice(70, 80), slice(149, 150)):
            keep = np.zeros(150, bool)
            keep[here] = True
            assert_nearest(nearest(in_memory(rows), queries, 5, keep=keep), rows, queries, 5, keep)

    def test_all_left_out_is_nothing_found(self, small_pieces, in_memory, some):
        hits = nearest(in_memory(some(60)), torch.ones(3, 8), 5, keep=np.zeros(60, bool))
        assert hits.rows.shape == hits.scores.shape == (3, 0)

    def test_the_mask_stays_as_it_was(self, in_memory, some):
        keep = np.arange(60) % 2 == 0
        nearest(in_memory(some(60)), torch.ones(3, 8), 5, keep=keep)
        assert keep.tolist() == [i % 2 == 0 for i in range(60)]


class TestLengths:
    def test_of_queries_do_not_count(self, in_memory, some):
        rows, query = some(50), torch.from_numpy(some(1, seed=1)).float()
        expected = nearest(in_memory(rows), query, 5)
        for factor in (1e-3, 1e4):
            hits = nearest(in_memory(rows), query * factor, 5)
            assert hits.rows.tolist() == expected.rows.tolist()
            np.testing.assert_allclose(hits.scores, expected.scores, atol=1e-6)
        half = nearest(in_memory(rows), query.half(), 5)
        assert half.rows.tolist() == expected.rows.tolist()

    def test_of_rows_do_not_count_either(self, in_memory, some):
        rows = some(50, dtype=np.float32)
        longer = rows * np.random.default_rng(0).uniform(0.01, 100, (50, 1)).astype(np.float32)
        query = torch.ones(1, 8)
        assert nearest(in_memory(longer), query, 50).rows.tolist() == nearest(in_memory(rows), query, 50).rows.tolist()

    def test_rows_of_zeros_score_0(self, small_pieces, in_memory, some):
        rows = some(60)
        rows[[3, 30]] = 0
        queries = torch.from_numpy(some(2, seed=1)).float()
        hits = nearest(in_memory(rows), queries, 60)
        for found, scores in zip(hits.rows, hits.scores, strict=True):
            assert scores[np.isin(found, [3, 30])].tolist() == [0, 0]
            assert sorted(found.tolist()) == list(range(60))
        assert np.isfinite(hits.scores).all()

    def test_a_query_of_zeros_is_as_near_to_any(self, in_memory, some):
        assert nearest(in_memory(some(9)), torch.zeros(1, 8), 9).scores.tolist() == [[0] * 9]

    def test_rows_said_to_have_length_1_are_taken_as_they_are(self, in_memory, some):
        rows = some(50, dtype=np.float32)
        rows /= np.linalg.norm(rows, axis=1, keepdims=True)
        query = torch.from_numpy(some(1, seed=1)).float()
        said, measured = (nearest(in_memory(rows), query, 10, unit=unit) for unit in (True, False))
        assert said.rows.tolist() == measured.rows.tolist()
        np.testing.assert_allclose(said.scores, measured.scores, atol=1e-6)
        twice = nearest(in_memory(rows * 2), query, 10, unit=True)
        np.testing.assert_allclose(twice.scores, 2 * said.scores, atol=1e-6)

    def test_float16_at_its_ends_is_no_infinity(self, in_memory):
        rows = np.array([[65504] * 8, [-65504] * 8, [6e-8] * 8, [0] * 8], np.float16)
        hits = nearest(in_memory(rows), torch.full((1, 8), 65504.0), 4)
        assert hits.rows[0, :1].tolist() == [0]
        assert hits.rows[0, 3] == 1
        assert np.isfinite(hits.scores).all()


class TestTies:
    @pytest.mark.parametrize("unit", [False, True])
    @pytest.mark.parametrize("n_queries", [1, 2])
    @pytest.mark.parametrize("n", [4, 20, 60, 300])
    def test_of_equal_scores_the_first_row_comes_first(self, small_pieces, n, n_queries, unit, in_memory):
        rows = np.tile(np.eye(8, dtype=np.float16)[:1], (n, 1))
        hits = nearest(in_memory(rows, 16), torch.eye(8)[:n_queries], 5, unit=unit)
        assert hits.rows.tolist() == [[0, 1, 2, 3, 4][:n]] * n_queries

    @pytest.mark.parametrize("unit", [False, True])
    @pytest.mark.parametrize("k", [1, 5, 90, 150, 300])
    def test_it_makes_no_difference_how_rows_are_divided(self, monkeypatch, unit, k, in_memory):
        rows = np.eye(8, dtype=np.float16)[np.random.default_rng(0).integers(0, 3, 200)]
        query = torch.tensor([[1.0, 0.5, 0, 0, 0, 0, 0, 0]])
        expected = np.argsort(-(rows @ query[0].numpy()), kind="stable")[:k]
        for piece, span in ((8, 24), (16, 64), (7, 7), (1024, 1 << 16)):
            monkeypatch.setattr(search, "PIECE", piece)
            monkeypatch.setattr(search, "SPAN", span)
            assert nearest(in_memory(rows, 40), query, k, unit=unit).rows.tolist() == [expected.tolist()]

    @pytest.mark.parametrize("unit", [False, True])
    def test_equal_scores_in_different_pieces_come_in_order(self, small_pieces, unit, in_memory):
        """One in each piece that is looked through, all others worse."""
        rows = np.tile(np.eye(8, dtype=np.float16)[1:2], (120, 1))
        rows[[10, 30, 50, 80, 110]] = np.eye(8, dtype=np.float16)[0]
        assert nearest(in_memory(rows, 24), torch.eye(8)[:1], 4, unit=unit).rows.tolist() == [[10, 30, 50, 80]]


def test_tells_how_far_it_is(small_pieces, in_memory, some):
    told = []
    nearest(in_memory(some(100)), torch.ones(2, 8), 5, on_rows=lambda done, total: told.append((done, total)))
    assert told[-1] == (100, 100)
    assert [done for done, _ in told] == sorted({done for done, _ in told})


@pytest.mark.parametrize("k", [0, -3])
def test_k_below_1_is_refused(k, in_memory, some):
    with pytest.raises(ConfigError, match=naming(f"k 1 {k}")):
        nearest(in_memory(some(10)), torch.ones(1, 8), k)


@pytest.mark.parametrize("shape", [(1, 7), (8,), (1, 1, 8), (0, 9)])
def test_other_widths_are_refused(shape, in_memory, some):
    with pytest.raises(ConfigError) as raised:
        nearest(in_memory(some(10)), torch.ones(shape), 3)
    assert str(raised.value) == f"queries must have shape (Q, 8). Got {shape} instead"
