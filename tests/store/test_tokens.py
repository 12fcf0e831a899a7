"""Tokens as padded batches, from a store or from memory, and batches of rows that are alike in length."""

import numpy as np
import pytest
import torch

from cachefuse.extraction.extract import extract
from cachefuse.store import tokens as module
from cachefuse.store.store import FeatureStore
from cachefuse.store.tokens import Tokens, length_grouped
from fixtures.columns import texts_of, with_columns
from fixtures.messages import naming

WIDTH, VOCABULARY = 5, 50
EMPTY = (3, 70, 79)  # texts without any token, the last row among them


@pytest.fixture
def dataset(shapes):
    return with_columns(shapes, texts=[("",) if row in EMPTY else text for row, text in enumerate(texts_of(shapes))])


@pytest.fixture
def stored(dataset, toy, tmp_path):
    """Open a modality's stored tokens, 80 rows in two blocks; kept in a dtype."""
    toy.width = WIDTH
    toy.change = lambda rows: np.sin(rows).astype(np.float32)

    def open_rows(modality, dtype="float16"):
        path = tmp_path / f"{dtype}.zarr"
        extract(dataset, ["toy"], path, views=("pooled", "tokens"), dtype=dtype, batch_size=16, device="cpu")
        return FeatureStore(path).open_features("toy", modality).rows("tokens")

    return open_rows


@pytest.fixture
def ids(dataset, toy, tmp_path):
    extract(dataset, ["toy"], tmp_path / "ids.zarr", views=("ids",), device="cpu")
    return FeatureStore(tmp_path / "ids.zarr").open_features("toy", "text").rows("ids")


def each(rows):
    """Every row's own values, (T_i, D) or (T_i,), one by one."""
    return [np.asarray(rows[row]) for row in range(len(rows))]


def in_memory(lengths, width=2):
    """Tokens whose first number is that of their row, and whose second is their place in it."""
    return Tokens([torch.stack([torch.full((n,), float(i)), torch.arange(float(n))], 1)[:, :width]
                   for i, n in enumerate(lengths)])  # fmt: skip


def assert_reads(tokens, expected, index):
    """Check a batch against each row's own values, and what fills it up."""
    x, mask = tokens.read(torch.tensor(index, dtype=torch.int64))
    longest = max((len(expected[row]) for row in index), default=0)
    assert mask.dtype == torch.bool
    assert x.shape[:2] == mask.shape == (len(index), max(1, longest))
    for i, row in enumerate(index):
        n = len(expected[row])
        assert mask[i].tolist() == [True] * n + [False] * (mask.shape[1] - n)
        np.testing.assert_array_equal(x[i, :n].numpy(), expected[row])
        assert not x[i, n:].any()
    return x


INDICES = [[0], [79, 0, 64, 63], [5, 5, 5], [70, 2, 3], list(range(79, -1, -1))]


@pytest.mark.parametrize("dtype", ["float16", "float32", "int8"])
@pytest.mark.parametrize("modality", ["image", "text"])
def test_a_batch_is_the_stored_rows_padded_to_their_longest(modality, dtype, stored):
    rows = stored(modality, dtype)
    expected = each(rows)
    assert np.abs(np.concatenate(expected)).max() > 0.9
    for index in INDICES:
        x = assert_reads(Tokens(rows), expected, index)
        assert x.shape[2] == WIDTH
        assert x.dtype == (torch.float32 if dtype == "float32" else torch.float16)  # quantised ones are float16 again


def test_fixed_rows_are_all_there(stored):
    rows = stored("image")
    tokens = Tokens(rows)
    assert tokens.shape == (80, WIDTH)
    assert (tokens.n_tokens, tokens.ragged, tokens.vocabulary > 0) == (3, False, False)
    assert tokens.lengths.tolist() == [3] * 80
    assert (tokens.nbytes, tokens.block_rows) == (80 * 3 * WIDTH * 2, 64)
    assert tokens.read(torch.tensor([70, 3]))[1].all()


def test_ragged_rows_know_their_lengths(stored, dataset):
    tokens = Tokens(stored("text"))
    lengths = [len(texts[0].split()) for texts in texts_of(dataset)]
    assert tokens.lengths.tolist() == lengths
    assert tokens.shape == (80, WIDTH)
    assert tokens.n_tokens == max(lengths)
    assert tokens.ragged
    assert tokens.nbytes == sum(lengths) * WIDTH * 2


def test_stored_ids_are_whole_numbers_that_an_embedding_takes(ids):
    tokens = Tokens(ids, VOCABULARY)
    for index in INDICES:
        x = assert_reads(tokens, each(ids), index)
        assert (x.dtype, x.ndim) == (torch.int64, 2)
        assert torch.nn.Embedding(VOCABULARY, 3)(x).shape == (*x.shape, 3)
    assert tokens.vocabulary > 0
    assert tokens.shape == (80,)
    assert tokens.n_tokens == max(map(len, each(ids)))
    assert tokens.nbytes == 4 * sum(map(len, each(ids)))


def test_an_id_of_zero_is_told_from_padding_by_the_mask():
    tokens = Tokens([torch.tensor([0, 4, 0], dtype=torch.int32), torch.tensor([0], dtype=torch.int32)], 5)
    x, mask = tokens.read(torch.tensor([1, 0]))
    assert (x.tolist(), x.dtype) == ([[0, 0, 0], [0, 4, 0]], torch.int64)
    assert mask.tolist() == [[True, False, False], [True, True, True]]


@pytest.mark.parametrize("index", [[0], [1], [1, 1], [3, 1, 0], [2, 2, 0], [0, 1, 2, 3]], ids=str)
def test_tensors_in_memory_are_read_as_stored_rows_are(index):
    rng = np.random.default_rng(0)
    expected = [rng.normal(size=(n, 3)).astype(np.float16) for n in (2, 0, 4, 1)]
    tokens = Tokens([torch.from_numpy(row) for row in expected])
    assert assert_reads(tokens, expected, index).dtype == torch.float16
    assert tokens.shape == (4, 3)
    assert tokens.n_tokens == 4
    assert tokens.lengths.tolist() == [2, 0, 4, 1]
    assert (tokens.ragged, tokens.nbytes, tokens.block_rows) == (True, 7 * 3 * 2, 1)


def test_rows_of_one_length_in_memory_are_not_ragged():
    assert not in_memory([4, 4, 4]).ragged
    assert in_memory([4, 4, 0]).ragged


@pytest.mark.parametrize("lengths", [[0], [0, 0, 0]])
def test_where_no_row_has_a_token_one_of_padding_stands(lengths):
    tokens = in_memory(lengths)
    x, mask = tokens.read(torch.arange(len(lengths)))
    assert x.shape == (len(lengths), 1, 2)
    assert mask.shape == (len(lengths), 1)
    assert not mask.any()
    assert not x.any()
    assert tokens.n_tokens == 1  # a width for what is never there


def test_stored_rows_without_tokens_have_one_of_padding(stored, ids):
    for tokens, shape in ((Tokens(stored("text")), (2, 1, WIDTH)), (Tokens(ids, VOCABULARY), (2, 1))):
        x, mask = tokens.read(torch.tensor([70, 3]))
        assert x.shape == shape
        assert not mask.any()
        assert not x.any()


@pytest.mark.parametrize("modality", ["image", "text"])
def test_no_rows_are_an_empty_batch(modality, stored):
    x, mask = Tokens(stored(modality)).read(torch.tensor([], dtype=torch.int64))
    assert len(x) == len(mask) == 0
    assert x.shape[1] == mask.shape[1] >= 1
    assert x.shape[2] == WIDTH


def test_a_row_that_is_not_there_is_an_index_error(stored):
    for modality in ("image", "text"):
        with pytest.raises(IndexError, match=naming("80")):
            Tokens(stored(modality)).read(torch.tensor([0, 80]))


@pytest.mark.parametrize("modality", ["image", "text"])
def test_chunks_are_the_real_tokens_in_the_order_of_the_rows(modality, stored, monkeypatch):
    tokens = Tokens(stored(modality))
    expected, rows = each(stored(modality)), [79, 0, 3, 64, 5, 5, 70]
    read, longest, real = [], tokens.n_tokens, Tokens.read
    monkeypatch.setattr(Tokens, "read", lambda self, index: read.append(len(index)) or real(self, index))
    for at_a_time in (1, 3, 2 * longest, 5 * longest - 1, 10**6):
        read.clear()
        monkeypatch.setattr(module, "CHUNK_TOKENS", at_a_time)
        found = torch.cat(list(tokens.chunks(torch.tensor(rows))))
        np.testing.assert_array_equal(found.numpy(), np.concatenate([expected[row] for row in rows]))
        assert sum(read) == len(rows)
        assert max(read) == min(len(rows), max(1, at_a_time // longest))  # in memory at once, padding included


def test_chunks_of_ids_and_of_memory(ids):
    found = torch.cat(list(Tokens(ids, VOCABULARY).chunks(torch.tensor([4, 3, 1]))))
    assert found.tolist() == [*each(ids)[4].tolist(), *each(ids)[1].tolist()]
    assert torch.cat(list(in_memory([2, 0, 1]).chunks(torch.arange(3)))).tolist() == [[0, 0], [0, 1], [2, 0]]
    assert sum(map(len, in_memory([0, 0]).chunks(torch.arange(2)))) == 0


def test_tokens_stay_where_they_are(stored):
    tokens = Tokens(stored("text"))
    assert tokens.to("cpu") is tokens
    assert tokens.to("meta") is tokens  # batches go there one by one
    assert tokens.device == torch.device("cpu")


# Batches of rows alike in length


def grouped(n, size, *, lengths=None, seed=0, order=None):
    """The batches of an epoch over n rows in a random order."""
    lengths = np.random.default_rng(1).integers(0, 60, 5000) if lengths is None else np.asarray(lengths)
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(n, generator=generator) if order is None else order
    return list(length_grouped(order, lengths, size, generator)), lengths


def padding(batches, lengths):
    """The share of a padded batch that is padding, over all batches."""
    whole = sum(len(batch) * max(1, lengths[batch].max()) for batch in batches)
    return 1 - sum(lengths[batch].sum() for batch in batches) / whole


@pytest.mark.parametrize(("n", "size"), [(1, 1), (5, 8), (8, 8), (9, 8), (512, 16), (513, 16), (1000, 7), (4999, 16)])
def test_every_row_is_in_one_batch(n, size):
    batches, _ = grouped(n, size)
    assert torch.equal(torch.cat(batches).sort().values, torch.arange(n))
    assert sorted(map(len, batches)) == sorted(map(len, torch.arange(n).split(size)))  # as many, as large, as without


def test_rows_lie_in_ascending_order_inside_a_batch():
    batches, _ = grouped(1000, 16)
    assert all(bool((batch.diff() > 0).all()) for batch in batches)


def test_little_is_padding():
    batches, lengths = grouped(4096, 16)
    order = torch.randperm(4096, generator=torch.Generator().manual_seed(0))
    at_random = padding(order.split(16), lengths)
    assert at_random > 0.4
    assert padding(batches, lengths) < at_random / 10
    # One window sorted whole: its batches differ in length by as little as its rows allow.
    spans = [int(lengths[batch].max() - lengths[batch].min()) for batch in batches]
    assert np.mean(spans) < 60 / module.WINDOW * 2


def test_few_rows_are_grouped_too():
    """A store that is less than one window, with an odd number of rows."""
    lengths = [1, 9] * 15 + [1]
    batches, _ = grouped(31, 8, lengths=lengths)
    mixed = sum(len(set(np.asarray(lengths)[batch])) > 1 for batch in batches)
    assert mixed <= 1


def test_a_window_is_sorted_by_itself(monkeypatch):
    """So that rows which lie together in a block-shuffled order are still read together."""
    monkeypatch.setattr(module, "WINDOW", 3)
    order = torch.randperm(100, generator=torch.Generator().manual_seed(5))
    batches, lengths = grouped(100, 10, order=order)
    for first in range(0, 10, 3):
        window = order[10 * first : 10 * (first + 3)]
        mine = batches[first : first + 3]
        assert torch.equal(torch.cat(mine).sort().values, window.sort().values)
        by_length = sorted((sorted(lengths[batch].tolist()) for batch in mine), key=lambda own: (own[0], own[-1]))
        assert [length for own in by_length for length in own] == sorted(lengths[window].tolist())


def test_the_same_generator_gives_the_same_batches_and_another_other_ones():
    first, again, other = (grouped(500, 16, seed=seed)[0] for seed in (3, 3, 4))
    assert [batch.tolist() for batch in first] == [batch.tolist() for batch in again]
    assert {tuple(batch.tolist()) for batch in first} != {tuple(batch.tolist()) for batch in other}


def test_epochs_differ():
    """Batches come in another order, and rows in other company, though rows of one length are few."""
    lengths = np.random.default_rng(1).integers(0, 60, 600)
    generator = torch.Generator().manual_seed(0)
    first, second = (
        {tuple(rows.tolist()) for rows in length_grouped(order, lengths, 8, generator)}
        for order in (torch.randperm(600, generator=generator) for _ in range(2))
    )
    assert len(first) == len(second) == 75
    assert len(first & second) <= 2
    # From one order of the rows the same batches come in another.
    order = torch.arange(600)
    first, second = ([rows.tolist() for rows in length_grouped(order, lengths, 8, generator)] for _ in range(2))
    assert sorted(first) == sorted(second)
    assert first != second


def test_batches_do_not_come_in_the_order_of_their_length():
    """Or each epoch would go from short texts to long ones: the last steps would see long ones alone."""
    correlations = []
    for seed in range(20):
        batches, lengths = grouped(30 * 8, 8, seed=seed)
        means = [lengths[batch].mean() for batch in batches]
        correlations.append(np.corrcoef(np.arange(len(means)), means)[0, 1])
    assert abs(np.mean(correlations)) < 0.2
    assert np.std(correlations) > 0.05


def test_the_short_batch_is_not_always_the_last():
    places = [[len(batch) for batch in grouped(41, 8, seed=seed)[0]].index(1) for seed in range(40)]
    assert len(set(places)) == 6


def test_rows_drawn_twice_stay_twice():
    order = torch.tensor([4, 0, 4, 1, 4, 2])
    batches, _ = grouped(6, 2, order=order)
    assert torch.cat(batches).sort().values.tolist() == [0, 1, 2, 4, 4, 4]
    assert [len(batch) for batch in batches] == [2, 2, 2]


def test_numbers_of_rows_need_not_begin_at_0():
    order = torch.tensor([90, 40, 70, 60])
    batches, _ = grouped(4, 2, order=order, lengths=np.where(np.arange(100) % 3 == 1, 9, 1))
    assert sorted(batch.tolist() for batch in batches) == [[40, 70], [60, 90]]
