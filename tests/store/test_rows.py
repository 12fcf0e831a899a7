"""Rows read through memory maps are those of plain numpy, in any order, and never what was not written."""

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

from cachefuse.errors import CacheError
from cachefuse.store.blocks import BlockFile, MappedBlocks
from cachefuse.store.rows import JoinedRows, RaggedRows, Rows, block_shuffle
from cachefuse.store.shard import ShardWriter
from fixtures.messages import naming

BLOCK_ROWS = 16


def write_block(path, values, shard_rows):
    with ShardWriter(path.with_name(f".{path.name}.partial")) as shard:
        shard.append(np.ascontiguousarray(values))
        shard.finish(path, shard_rows, values.dtype.itemsize * int(np.prod(values.shape[1:])))
        return BlockFile(path, len(values), shard.crc)


def write_blocks(folder, values, block_rows=BLOCK_ROWS):
    return [
        write_block(folder / str(start), values[start : start + block_rows], block_rows)
        for start in range(0, len(values), block_rows)
    ]


def open_values(folder, values, block_rows=BLOCK_ROWS):
    """Write values as blocks, and open their rows."""
    blocks = MappedBlocks("values", write_blocks(folder, values, block_rows), values.shape[1:], values.dtype)
    return Rows(blocks, len(values), block_rows)


def random_values(n, shape, dtype="<f2", seed=0):
    return np.random.default_rng(seed).integers(-100, 100, (n, *shape)).astype(dtype)


@pytest.fixture
def values():
    return random_values(50, (3,))


@pytest.fixture
def rows(tmp_path, values):
    return open_values(tmp_path, values)


KEYS = [
    0,
    49,
    -1,
    -50,
    np.int64(17),
    slice(None),
    slice(10, 20),  # over the border of two blocks
    slice(16, 32),
    slice(-5, None),
    slice(20, 10),
    slice(40, 400),
    slice(3, 3),
    slice(None, None, 7),
    slice(45, 2, -5),
    slice(None, None, -1),
    np.arange(50) % 3 == 0,
    np.zeros(50, bool),
    [False] * 49 + [True],
    np.array([49, 0, 0, 17, -1, 49]),
    [3, 2, 1],
    np.array([], int),
    [],
    np.array([7], np.uint8),
]


@pytest.mark.parametrize("key", KEYS, ids=str)
def test_any_key_gives_what_numpy_gives(rows, values, key):
    found = rows[key]
    np.testing.assert_array_equal(found, values[key])
    assert found.shape == values[key].shape
    assert found.dtype == values.dtype


# 6 bytes, 1 byte, 8,192 bytes, and widths that pages are no multiple of
SHAPES = [((3,), "<f2"), ((1,), "|i1"), ((2048,), "<f4"), ((5, 7), "<f4"), ((1000,), "<f2"), ((), "<f2")]


@pytest.mark.parametrize(("shape", "dtype"), SHAPES)
@pytest.mark.parametrize("block_rows", [1, 16, 64])
def test_rows_of_any_width_are_read_across_shards(tmp_path, shape, dtype, block_rows):
    values = random_values(50, shape, dtype)
    rows = open_values(tmp_path, values, block_rows)
    order = torch.randperm(50, generator=torch.Generator().manual_seed(0))
    assert torch.equal(rows.index_select(0, order), torch.from_numpy(values[order]))
    np.testing.assert_array_equal(rows[:], values)
    assert rows.shape == (50, *shape)
    assert rows.nbytes == values.nbytes


def test_rows_are_gathered_into_a_given_buffer(rows, values):
    out = torch.full((4, 3), 7, dtype=torch.float16)
    index = torch.tensor([49, 3, 3, 16])
    assert rows.index_select(0, index, out=out).data_ptr() == out.data_ptr()
    assert torch.equal(out, torch.from_numpy(values[index]))


def test_what_is_read_is_a_copy(rows, values):
    for found in (rows[:], rows[3:5], rows[[1, 2]], rows[5], rows.index_select(0, torch.arange(50)).numpy()):
        found[...] = -1
    np.testing.assert_array_equal(rows[:], values)


@pytest.mark.parametrize("index", [[-1], [50], [0, 10**12], [3, -(2**62)]])
def test_a_row_that_is_not_there_is_an_index_error(rows, index):
    with pytest.raises(IndexError, match=naming("50")):
        rows.index_select(0, torch.tensor(index))


@pytest.mark.parametrize("key", [50, -51, np.array([0, 50]), np.array([-51])])
def test_a_key_out_of_range_is_an_index_error(rows, key):
    with pytest.raises(IndexError, match=naming("50")):
        rows[key]


@pytest.mark.parametrize("n", [0, 49, 51])
def test_a_mask_of_another_length_is_an_index_error(rows, n):
    with pytest.raises(IndexError, match=naming(f"mask 50 {n}")):
        rows[np.ones(n, bool)]


@pytest.mark.parametrize("key", [1.5, np.array([0.0, 1.0]), [float("nan")]])
def test_rows_are_not_numbered_by_fractions(rows, key):
    with pytest.raises(IndexError, match="integers"):
        rows[key]


def test_rows_can_be_iterated_over(rows, values):
    np.testing.assert_array_equal(np.stack(list(rows)), values)


def test_only_rows_are_selected(rows):
    with pytest.raises(ValueError, match=naming("0 1")):
        rows.index_select(1, torch.tensor([0]))


def test_a_copy_on_another_device_has_all_rows(rows):
    assert rows.to("cpu") is rows
    moved = rows.to("meta")
    assert (tuple(moved.shape), moved.dtype, moved.device.type) == ((50, 3), torch.float16, "meta")


def test_encoders_are_read_side_by_side(tmp_path, rows, values):
    more = random_values(50, (2,), seed=1)
    joined = JoinedRows([rows, open_values(tmp_path / "more", more)])
    index = torch.tensor([49, 0, 17])
    assert joined.shape == (50, 5)
    assert torch.equal(joined.index_select(0, index), torch.from_numpy(np.hstack([values, more])[index]))


def test_many_threads_read_the_same_rows(rows, values):
    def read(seed):
        index = torch.randint(50, (20,), generator=torch.Generator().manual_seed(seed))
        return torch.equal(rows.index_select(0, index), torch.from_numpy(values[index]))

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(read, range(200)))


# Checked before anything of it is given out


@pytest.mark.parametrize("read", [lambda rows: rows[20], lambda rows: rows[:], lambda rows: rows[[31, 0]]])
def test_a_damaged_block_is_named_and_the_others_are_read(tmp_path, rows, values, read):
    with (tmp_path / "16").open("r+b") as file:
        file.seek(20)
        file.write(b"\x01")
    for _ in range(2):
        with pytest.raises(CacheError, match=naming("values block 1")):
            read(rows)
    np.testing.assert_array_equal(rows[:16], values[:16])
    np.testing.assert_array_equal(rows[[49, 2]], values[[49, 2]])


def test_a_block_that_is_not_there_is_named_and_the_others_are_read(tmp_path, values):
    files = write_blocks(tmp_path, values)
    rows = Rows(MappedBlocks("values", [files[0], None, *files[2:]], (3,), values.dtype), 50, BLOCK_ROWS)
    np.testing.assert_array_equal(rows[[49, 2]], values[[49, 2]])
    for key in (16, slice(10, 20), [0, 31]):
        with pytest.raises(CacheError, match=naming("values block 1")):
            rows[key]


def test_a_reader_keeps_what_it_opened_while_the_shard_is_replaced(tmp_path, rows, values):
    np.testing.assert_array_equal(rows[:20], values[:20])
    for start in (0, 16):  # one that was read from already, and one that was not
        block = values[start : start + 16]
        write_block(tmp_path / str(start), np.zeros_like(block), 16)
    (tmp_path / "32").unlink()
    np.testing.assert_array_equal(rows[:], values)


@pytest.mark.skipif(not Path("/proc/self/maps").is_file(), reason="needs /proc")
def test_files_and_addresses_are_given_back(tmp_path, values):
    files = write_blocks(tmp_path, values)

    def held_out():
        return len(Path("/proc/self/maps").read_text().splitlines()), len(os.listdir("/proc/self/fd"))

    def read():
        rows = Rows(MappedBlocks("values", files, (3,), values.dtype), 50, BLOCK_ROWS)
        np.testing.assert_array_equal(rows[[3, 40]], values[[3, 40]])

    read()
    maps, opened = held_out()
    for _ in range(200):
        read()
    assert held_out()[0] < maps + 50
    assert held_out()[1] == opened


# Shuffled


def test_a_shuffle_gives_every_row_once_beside_its_number(rows, values):
    generator = torch.Generator().manual_seed(0)
    batches = list(rows.shuffled(8, generator))
    assert [len(index) for index, _ in batches] == [8] * 6 + [2]
    index = torch.cat([index for index, _ in batches])
    assert sorted(index.tolist()) == list(range(50))
    assert index.tolist() != list(range(50))
    np.testing.assert_array_equal(torch.cat([batch for _, batch in batches]), values[index])


def test_a_shuffle_of_some_rows_gives_those(rows, values):
    some = torch.tensor([1, 40, 17, 3])
    ((index, batch),) = rows.shuffled(8, torch.Generator().manual_seed(0), some)
    assert sorted(index.tolist()) == [1, 3, 17, 40]
    np.testing.assert_array_equal(batch, values[index])


def test_a_block_shuffle_is_a_permutation_that_the_generator_decides():
    rows = torch.arange(1000)[torch.arange(1000) % 7 > 0]
    one, two, other = (block_shuffle(rows, 64, 2, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
    assert torch.equal(one.sort().values, rows)
    assert torch.equal(one, two)
    assert not torch.equal(one, other)
    assert len(block_shuffle(rows[:0], 64, 2, torch.Generator())) == 0


@pytest.mark.parametrize("together", [1, 2, 5])
def test_a_block_shuffle_reads_few_blocks_at_a_time(together):
    shuffled = block_shuffle(torch.arange(64 * 20), 64, together, torch.Generator().manual_seed(0))
    groups = [set((part // 64).tolist()) for part in shuffled.split(64 * together)]
    assert [len(group) for group in groups] == [together] * (20 // together)
    assert sum(map(len, groups)) == len(set().union(*groups))  # no block is read twice
    first = shuffled[: 64 * together]
    assert first.tolist() != sorted(first.tolist())
    if together > 1:  # and the rows of those blocks are mixed
        assert len(set((first[:20] // 64).tolist())) > 1


def test_small_data_is_shuffled_as_a_whole(rows):
    assert rows.blocks_at_once * rows.block_rows >= 50


# Rows that differ in their number of tokens


@pytest.fixture
def tokens():
    rng = np.random.default_rng(0)
    lengths = rng.integers(0, 5, 50)
    lengths[[0, 16, 17, 49]] = 0
    lengths[32:48] = 0  # a whole block without any token
    return [rng.integers(-100, 100, (n, 3)).astype("<f2") for n in lengths]


@pytest.fixture
def ragged(tmp_path, tokens):
    files, offsets = [], np.zeros((4, BLOCK_ROWS + 1), np.int64)
    for block in range(4):
        flat = tokens[block * BLOCK_ROWS : (block + 1) * BLOCK_ROWS]
        ends = np.cumsum([len(row) for row in flat])
        offsets[block, 1:] = ends[-1]
        offsets[block, 1 : len(flat) + 1] = ends
        files.append(write_block(tmp_path / str(block), np.concatenate(flat), int(ends[-1])))
    return RaggedRows(MappedBlocks("tokens", files, (3,), np.dtype("<f2")), offsets, 50, BLOCK_ROWS)


RAGGED_KEYS = [slice(None), slice(14, 20), slice(None, None, -3), [49, 3, 3, 16, -2], [], np.arange(50) > 40]


@pytest.mark.parametrize("key", RAGGED_KEYS, ids=str)
def test_ragged_rows_come_as_a_list(ragged, tokens, key):
    found = ragged[key]
    wanted = np.arange(50)[np.array(key, int) if key == [] else key] if isinstance(key, list) else np.arange(50)[key]
    assert len(found) == len(wanted)
    for row, number in zip(found, wanted, strict=True):
        np.testing.assert_array_equal(row, tokens[number])
        assert row.shape == tokens[number].shape


def test_one_ragged_row_is_an_array(ragged, tokens):
    for row in (1, 0, 49, -2):
        np.testing.assert_array_equal(ragged[row], tokens[row])
        assert ragged[row].shape == (len(tokens[row]), 3)


def test_padded_rows_come_with_their_mask(ragged, tokens):
    index = torch.tensor([20, 0, 1, 1, 48])
    padded, mask = ragged.padded(index)
    lengths = [len(tokens[i]) for i in index]
    assert padded.shape == (5, max(lengths), 3)
    assert mask.sum(1).tolist() == lengths
    assert not padded[~mask].any()
    for i, row in enumerate(index):
        np.testing.assert_array_equal(padded[i, : lengths[i]], tokens[row])
        assert mask[i, : lengths[i]].all()


@pytest.mark.parametrize("index", [[], [0, 16], [33]])
def test_padded_rows_without_any_token(ragged, index):
    padded, mask = ragged.padded(torch.tensor(index, dtype=torch.int64))
    assert padded.shape == (len(index), 0, 3)
    assert mask.shape == (len(index), 0)


@pytest.mark.parametrize("row", [-1, 50, 2**40])
def test_a_ragged_row_that_is_not_there_is_an_index_error(ragged, row):
    with pytest.raises(IndexError, match=naming("50")):
        ragged.padded(torch.tensor([0, row]))


def test_ragged_rows_know_their_lengths(ragged, tokens):
    assert ragged.lengths.tolist() == [len(row) for row in tokens]
    assert ragged.nbytes == sum(row.nbytes for row in tokens)
    assert ragged.shape == (50, 3)


def test_ragged_rows_are_no_tensor(ragged):
    with pytest.raises(TypeError, match="tokens"):
        ragged.index_select(0, torch.tensor([0]))


def test_ragged_rows_are_shuffled_beside_their_numbers(ragged, tokens):
    seen = []
    for index, (padded, mask) in ragged.shuffled(8, torch.Generator().manual_seed(0)):
        for row, number in enumerate(index.tolist()):
            np.testing.assert_array_equal(padded[row][mask[row]], tokens[number])
            seen.append(number)
    assert sorted(seen) == list(range(50))


def test_row_numbers_of_another_kind_are_refused(tmp_path):
    rows = open_values(tmp_path, random_values(80, (3,)))
    for index in (torch.ones(80, dtype=torch.bool), torch.tensor([1.5])):
        with pytest.raises(IndexError, match="int64"):
            rows.index_select(0, index)
    with pytest.raises(IndexError, match="number"):
        rows[1, 2]
    with pytest.raises(IndexError, match=naming("-81 80")):
        rows[-81]
