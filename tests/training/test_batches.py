import logging

import numpy as np
import pytest
import torch

from cachefuse.errors import CacheError, ConfigError, EncoderError
from cachefuse.training.batches import load_table, multi_hot, select_features, shuffled_batches


def values(store, width, seed=0):
    return np.random.default_rng(seed).normal(size=(len(store), width)).astype(np.float16)


def names(chosen):
    return {modality: [features.encoder for features in group] for modality, group in chosen.items()}


def test_takes_every_whole_encoder_by_default(store, add_features):
    add_features(store, "hf:bert", "text", values(store, 4))
    assert names(select_features(store)) == {"image": ["classic"], "text": ["classic", "hf:bert"]}


def test_leaves_out_what_is_not_whole_and_says_so(store, add_features, caplog):
    add_features(store, "hf:bert", "text", values(store, 4), blocks=[0])
    with caplog.at_level(logging.WARNING, logger="cachefuse"):
        assert names(select_features(store)) == {"image": ["classic"], "text": ["classic"]}
    assert "hf:bert (text) is left out: it lacks rows; run the same cachefuse extract again" in caplog.text


def test_says_how_to_go_on_where_nothing_is_whole(store, add_features):
    add_features(store, "hf:bert", "text", values(store, 4), blocks=[0])
    with pytest.raises(
        CacheError, match=r"hf:bert \(text, pooled\) has 64 of 300 rows; run the same cachefuse extract"
    ):
        load_table(store, select_features(store, ["hf:bert"]))


def test_refuses_a_store_without_pooled_features(toy_store, make_store):
    empty = make_store({}, np.zeros((2, 1), np.int8), ["train", "val"], name="empty")
    with pytest.raises(CacheError, match="holds no pooled features; run cachefuse extract first"):
        select_features(empty)


@pytest.fixture
def several(store, add_features, tmp_path):
    add_features(store, "hf:bert-base", "text", values(store, 4), source="hf:bert-base")
    add_features(store, "hf:bert-base-uncased", "text", values(store, 4), source="hf:bert-base-uncased")
    add_features(store, "hf:google/t5", "text", values(store, 4), source="hf:google/t5")
    add_features(store, "hf:tuned", "text", values(store, 4), source=f"hf:{tmp_path / 'models' / 'tuned'}")
    add_features(
        store, "clip:B@w.safetensors", "image", values(store, 4), source=f"clip:B@{tmp_path / 'w.safetensors'}"
    )
    return store


@pytest.mark.parametrize(
    ("name", "encoder"),
    [
        ("classic", "classic"),
        ("hf:bert-base", "hf:bert-base"),  # exact, though it is a part of another
        ("uncased", "hf:bert-base-uncased"),
        ("hf:google/t5", "hf:google/t5"),
        ("t5", "hf:google/t5"),
        ("tuned", "hf:tuned"),
        ("./models/tuned", "hf:tuned"),
        ("hf:./models/tuned", "hf:tuned"),
        ("clip", "clip:B@w.safetensors"),
        ("clip:B@./w.safetensors", "clip:B@w.safetensors"),
    ],
)
def test_finds_an_encoder_by_spec_part_or_path(several, name, encoder):
    chosen = names(select_features(several, [name]))
    assert {found for group in chosen.values() for found in group} == {encoder}


def test_finds_an_encoder_by_its_absolute_path(several, tmp_path):
    assert names(select_features(several, [f"hf:{tmp_path / 'models' / 'tuned'}"])) == {"text": ["hf:tuned"]}


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("hf", "encoder 'hf' fits several; choose from: classic, clip:B@w.safetensors, hf:bert-base, "),
        ("nope", "encoder 'nope' is not in this store; choose from: classic, "),
        ("hf:acme/t5", "encoder 'hf:acme/t5' is not in this store"),
    ],
)
def test_refuses_a_name_that_fits_none_or_several(several, name, message):
    with pytest.raises(ConfigError, match=message):
        select_features(several, [name])


def test_refuses_an_empty_name(several):
    with pytest.raises(EncoderError, match="encoder '' must look like family:model"):
        select_features(several, [""])


def test_an_encoder_named_twice_counts_once(store):
    assert names(select_features(store, ["classic", "classic"])) == {"image": ["classic"], "text": ["classic"]}


def test_concatenates_encoders_of_one_modality(store, add_features):
    extra = values(store, 4)
    add_features(store, "hf:bert", "text", extra)
    chosen = select_features(store)
    table = load_table(store, chosen)
    width = chosen["text"][0].views["pooled"].row_shape[0]
    assert table.features["image"].shape[1] == chosen["image"][0].views["pooled"].row_shape[0]
    assert table.features["text"].shape[1] == width + 4
    text = table.features["text"].index_select(0, torch.arange(len(store))).numpy()
    assert np.array_equal(text[:, width:], extra)
    assert np.array_equal(text[:, :width], chosen["text"][0].read())


def test_rows_are_the_labelled_ones_of_a_split(toy_store):
    store = toy_store()
    table = load_table(store, select_features(store))
    assert table.rows("train").tolist() == list(range(40))
    assert table.rows("test").tolist() == table.rows("no such split").tolist() == []


def test_a_batch_keeps_the_stored_dtype(toy_store):
    store = toy_store(absent={"text": {2}})
    features, present = load_table(store, select_features(store)).batch(torch.tensor([3, 2]))
    assert features["image"].shape == (2, 6)
    assert features["image"].dtype == torch.float16
    assert present["text"].tolist() == [True, False]
    assert present["image"].tolist() == [True, True]


def test_moves_to_a_device_whole(toy_store):
    store = toy_store()
    table = load_table(store, select_features(store)).to("meta")
    assert {x.device.type for x in (*table.features.values(), *table.present.values(), table.targets)} == {"meta"}
    assert table.rows("val").tolist() == list(range(40, 52))


@pytest.fixture
def table(toy_store):
    store = toy_store()
    return load_table(store, select_features(store))


def test_multi_hot_of_both_tasks():
    assert multi_hot(np.array([1, -1, 0]), 3).tolist() == [[0, 1, 0], [0, 0, 0], [1, 0, 0]]
    assert multi_hot(np.array([[1, 0], [-1, -1]], np.int8), 2).tolist() == [[1, 0], [0, 0]]


def test_batches_shuffle_every_row_once_and_anew(table):
    rows, generator = torch.arange(10, 20), torch.Generator().manual_seed(0)
    first, second = (list(shuffled_batches(table, rows, 4, generator)) for _ in range(2))
    assert [len(batch) for batch in first] == [4, 4, 2]
    assert torch.equal(torch.cat(first).sort().values, rows)
    assert not torch.equal(torch.cat(first), torch.cat(second))
    again = list(shuffled_batches(table, rows, 4, torch.Generator().manual_seed(0)))
    assert torch.equal(torch.cat(first), torch.cat(again))


def test_what_memory_does_not_hold_is_shuffled_a_few_blocks_at_a_time(make_store, monkeypatch):
    rng = np.random.default_rng(0)
    features = {name: rng.normal(size=(1000, 6)).astype(np.float16) for name in ("image", "text")}
    store = make_store(features, np.ones((1000, 2), np.int8), ["train"] * 1000)
    table = load_table(store, select_features(store))
    monkeypatch.setattr("cachefuse.training.batches.total_memory", lambda: 1000 * 24 * 2 - 1)
    monkeypatch.setattr(
        "cachefuse.training.batches.SHUFFLE_BYTES", 64 * 24 * 2
    )  # two blocks of 64 rows, both modalities
    order, again = (table.order(table.rows("train"), torch.Generator().manual_seed(0)) for _ in range(2))
    assert torch.equal(order, again)
    assert torch.equal(order.sort().values, torch.arange(1000))
    block = order // 64
    assert max(len(part.unique()) for part in block.split(64)) <= 4
    assert (
        len({tuple(part.tolist()) for part in order.split(64)} & {tuple(range(i, i + 64)) for i in range(0, 1000, 64)})
        == 0
    )
    monkeypatch.setattr("cachefuse.training.batches.total_memory", lambda: 1000 * 24 * 2)
    whole = table.order(table.rows("train"), torch.Generator().manual_seed(0))
    assert max(len(part.unique()) for part in (whole // 64).split(64)) > 8


@pytest.mark.parametrize("batch_size", [0, 10, 11])
def test_a_full_batch_is_all_rows_in_order(table, batch_size):
    rows = torch.arange(10)
    assert [batch.tolist() for batch in shuffled_batches(table, rows, batch_size, torch.Generator())] == [rows.tolist()]
