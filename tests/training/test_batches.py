from dataclasses import replace

import numpy as np
import pytest
import torch

from cachefuse.errors import CacheError, ConfigError, EncoderError
from cachefuse.feature_spec import pooled_specs
from cachefuse.store.store import FeatureStore
from cachefuse.training.batches import Batches
from cachefuse.training.feature_table import FeatureTable, multi_hot
from cachefuse.training.selection import load_table, select_features
from fixtures.messages import naming


def values(store, width, seed=0):
    return np.random.default_rng(seed).normal(size=(len(store), width)).astype(np.float16)


def names(chosen):
    return {modality: [features.encoder for features in group] for modality, group in chosen.items()}


def test_takes_every_whole_encoder_by_default(store, add_features):
    add_features(store, "hf:bert", "text", values(store, 4))
    assert names(select_features(store)) == {"image": ["classic"], "text": ["classic", "hf:bert"]}


def test_never_leaves_out_what_is_not_whole_by_itself(store, add_features):
    add_features(store, "hf:bert", "text", values(store, 4), blocks=[0])
    with pytest.raises(CacheError, match=naming("hf:bert text 64 300 extract --encoder classic")):
        select_features(store)
    assert names(select_features(store, ["classic"])) == {"image": ["classic"], "text": ["classic"]}


def test_what_was_asked_for_and_not_begun_is_not_left_out_either(store):
    store.require_features("hf:bert", "text", {"dtype": "float16"}, "hf:bert", {"pooled": "float16"})
    with pytest.raises(CacheError, match=naming("hf:bert text 0 300 extract --encoder classic")):
        select_features(store)


@pytest.mark.parametrize("how", ["cut", "gone", "a folder", "a line of the journal", "the journal"])
def test_damage_names_the_block_and_the_repair(store, add_features, how):
    add_features(store, "hf:bert", "text", values(store, 4))
    folder = store.path / "features" / "hf-bert" / "text"
    shard, journal = folder / "pooled" / "c" / "0" / "0", folder / "journal.jsonl"
    match how:
        case "cut":
            shard.write_bytes(shard.read_bytes()[:-1])
        case "gone":
            shard.unlink()
        case "a folder":
            shard.unlink()
            shard.mkdir()
        case "a line of the journal":
            journal.write_bytes(journal.read_bytes().replace(b'"block": 0', b'"block": 7', 1))
        case "the journal":
            journal.unlink()
    repair = "extract" if how == "the journal" else "damaged block 0 --repair"
    with pytest.raises(CacheError, match=naming(f"hf:bert text 300 {repair} --encoder classic")):
        select_features(FeatureStore(store.path))


def test_says_how_to_go_on_where_nothing_is_whole(store, add_features):
    add_features(store, "hf:bert", "text", values(store, 4), blocks=[0])
    with pytest.raises(CacheError, match=naming("hf:bert text pooled 64 300")):
        load_table(store, select_features(store, ["hf:bert"]))


def test_refuses_a_store_without_pooled_features(toy_store, make_store):
    empty = make_store({}, np.zeros((2, 1), np.int8), ["train", "val"], name="empty")
    with pytest.raises(CacheError, match="pooled"):
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
        ("hf", "hf classic clip:B@w.safetensors hf:bert-base"),
        ("nope", "nope classic"),
        ("hf:acme/t5", "hf:acme/t5"),
    ],
)
def test_refuses_a_name_that_fits_none_or_several(several, name, message):
    with pytest.raises(ConfigError, match=naming(message)):
        select_features(several, [name])


def test_refuses_an_empty_name(several):
    with pytest.raises(EncoderError, match="family:model"):
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


def numbered(n, *, absent=()):
    """A table in memory whose features and targets say which row they are of."""
    number = torch.arange(n)
    present = torch.ones(n, dtype=torch.bool)
    present[list(absent)] = False
    targets = (number[:, None] >> torch.arange(12)).bitwise_and(1).to(torch.uint8)
    features = torch.stack([number.float(), -number.float()], dim=1)
    return FeatureTable(
        {"image": features},
        pooled_specs({"image": 2}),
        {"image": present},
        targets,
        np.ones(n, bool),
        np.full(n, "train"),
    )


class Drawn:
    """Rows on another device than a CPU, as far as batches can tell: they are gathered."""

    def __init__(self, x):
        self.x, self.shape, self.device, self.nbytes, self.block_rows = x, x.shape, x.device, x.nbytes, 8

    def index_select(self, dim, index):
        return self.x.index_select(dim, index)


def epochs(table, rows, batch_size, n_epochs, *, seed=0, sample_weights=None):
    """The rows of each batch, by epoch; what comes with them must be theirs."""
    batches = Batches(table, rows, batch_size, torch.Generator().manual_seed(seed), sample_weights)
    found = []
    for _ in range(n_epochs):
        epoch = []
        for features, present, targets in batches:
            numbers = features["image"][:, 0].long()
            assert torch.equal(present["image"], table.present["image"][numbers])
            assert torch.equal(targets.to(torch.uint8), table.targets[numbers])
            epoch.append(numbers)
        found.append(epoch)
    return found


@pytest.fixture(params=["in memory", "gathered"])
def rows_of(request):
    """A table of 100 rows, and 37 of them to train on: out of order, one absent."""
    table = numbered(100, absent=[63])
    if request.param == "gathered":
        table = replace(table, features={"image": Drawn(table.features["image"])})
    return table, torch.arange(63, 26, -1)


@pytest.mark.parametrize("batch_size", [1, 4, 18, 36])
def test_an_epoch_has_every_row_once_in_a_new_order(rows_of, batch_size):
    table, rows = rows_of
    first, second = epochs(table, rows, batch_size, 2)
    assert sorted(len(batch) for batch in first) == sorted(len(batch) for batch in rows.split(batch_size))
    for epoch in (first, second):
        assert torch.equal(torch.cat(epoch).sort().values, rows.sort().values)
    assert not torch.equal(torch.cat(first), torch.cat(second))
    assert not torch.equal(torch.cat(first), rows)


def test_the_same_seed_gives_the_same_batches(rows_of):
    first, again, other = (torch.cat(epochs(*rows_of, 5, 3, seed=seed)[2]) for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize("batch_size", [0, 37, 38])
def test_a_full_batch_is_all_rows(rows_of, batch_size):
    table, rows = rows_of
    for epoch in epochs(table, rows, batch_size, 2):
        assert [batch.sort().values.tolist() for batch in epoch] == [rows.sort().values.tolist()]


def test_no_two_rows_are_always_together():
    rows = torch.arange(20)
    together = torch.zeros(20, 20)
    for epoch in epochs(numbered(20), rows, 5, 400):
        for batch in epoch:
            together[batch.unsqueeze(1), batch] += 1
    others = together[~torch.eye(20, dtype=torch.bool)]
    assert together.diagonal().eq(400).all()
    assert others.max() <= 0.9 * 400  # of neighbours: 4/5 expected
    assert len({tuple(sorted(batch.tolist())) for epoch in epochs(numbered(20), rows, 5, 400) for batch in epoch}) == 20
    assert others.mean() == pytest.approx(400 * 4 / 19)


def test_the_short_batch_is_not_always_the_same_rows():
    short = [min(epoch, key=len) for epoch in epochs(numbered(21), torch.arange(21), 5, 200)]
    assert {len(batch) for batch in short} == {1}
    assert len(torch.cat(short).unique()) == 21


def test_what_is_in_memory_is_read_in_place():
    table = numbered(100)
    batches = Batches(table, torch.arange(50), 10, torch.Generator().manual_seed(0))
    places = [features["image"].untyped_storage().data_ptr() for _ in range(3) for features, _, _ in batches]
    assert len(set(places)) == 1
    assert places[0] != table.features["image"].untyped_storage().data_ptr()
    for features, present, targets in batches:
        assert features["image"].is_contiguous()
        assert targets.dtype == torch.float32
        assert present["image"].dtype == torch.bool
    assert torch.equal(table.features["image"], numbered(100).features["image"])


def test_rows_are_drawn_by_their_chances(rows_of):
    table, rows = rows_of
    sample_weights = torch.where(rows < 40, 3.0, 0.0) + (rows == 50)  # 13 rows, and one a third as often
    drawn = epochs(table, rows, 5, 300, sample_weights=sample_weights.double())
    assert [len(batch) for batch in drawn[0]] == [5] * 7 + [2]
    counts = torch.cat([batch for epoch in drawn for batch in epoch]).bincount(minlength=100)
    assert counts.nonzero().flatten().tolist() == [*range(27, 40), 50]
    assert counts[50] / counts[27:40].float().mean() == pytest.approx(1 / 3, rel=0.1)


def test_what_memory_does_not_hold_is_shuffled_a_few_blocks_at_a_time(make_store, monkeypatch):
    rng = np.random.default_rng(0)
    features = {name: rng.normal(size=(1000, 6)).astype(np.float16) for name in ("image", "text")}
    store = make_store(features, np.ones((1000, 2), np.int8), ["train"] * 1000)
    table = load_table(store, select_features(store))
    monkeypatch.setattr("cachefuse.training.feature_table.total_memory", lambda: 1000 * 24 * 2 - 1)
    monkeypatch.setattr(
        "cachefuse.training.feature_table.SHUFFLE_BYTES", 64 * 24 * 2
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
    monkeypatch.setattr("cachefuse.training.feature_table.total_memory", lambda: 1000 * 24 * 2)
    whole = table.order(table.rows("train"), torch.Generator().manual_seed(0))
    assert max(len(part.unique()) for part in (whole // 64).split(64)) > 8
