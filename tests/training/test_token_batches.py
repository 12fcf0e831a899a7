"""Tokens beside pooled features in a table: batches, pieces to predict, statistics, and modalities that are dropped."""

import itertools
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from cachefuse.cache.tokens import Tokens
from cachefuse.errors import CacheError, ConfigError, UnknownNameError
from cachefuse.fusion.cma import CMAFusion
from cachefuse.fusion.model import FusionModel
from cachefuse.heads import Linear, Standardize
from cachefuse.training import batches as module
from cachefuse.training.batches import Batches, drop_modalities
from cachefuse.training.config import TrainConfig
from cachefuse.training.selection import load_table, select_features
from cachefuse.training.train import train_head
from cachefuse.training.used import StoreTables

NAMES = ["image", "image_tokens", "text", "text_tokens"]
CMA = TrainConfig(
    fusion="cma", fusion_options={"width": 8, "heads": 2, "depth": 1}, head="linear", epochs=2, batch_size=16
)
ABSENT = {"image": {3, 41}, "text": {2, 41}}


@pytest.fixture
def store(toy_store):
    return toy_store(absent=ABSENT)


@pytest.fixture
def table(store):
    return load_table(store, select_features(store, views=CMA.views), CMA.views)


def own_tokens(store, modality):
    """Each row's tokens (T_i, D), as they are stored."""
    rows = store.open_features("toy", modality).rows("tokens")
    return [rows[row] for row in range(len(store))]


def real_tokens(store, modality):
    """The same, of rows that lack the modality none."""
    return [x[: len(x) * here] for x, here in zip(own_tokens(store, modality), store.present(modality), strict=True)]


# Batches


def test_a_fusion_is_given_the_views_that_it_reads(store, table):
    assert list(table.features) == list(table.present) == NAMES
    assert [type(x).__name__ for x in table.features.values()] == ["Rows", "Tokens"] * 2
    assert {name: x.shape for name, x in table.features.items()} == {
        "image": (60, 6), "image_tokens": (60, 3), "text": (60, 5), "text_tokens": (60, 2),
    }  # fmt: skip
    assert {name: x.shape[1].n_tokens for name, x in table.features.items() if "_" in name} == {
        "image_tokens": 4, "text_tokens": 5,
    }  # fmt: skip
    pooled = TrainConfig(fusion="cma", without=("sequence-attention",)).views
    assert list(load_table(store, select_features(store, views=pooled), pooled).features) == ["image", "text"]


def test_a_batch_is_the_stored_rows_with_masks_of_what_is_there(store, table):
    for rows, modality in itertools.product(([3], [2, 41, 3, 0], [59, 4, 4, 17], list(range(60))), ("image", "text")):
        features, present = table.batch(torch.tensor(rows))
        pooled, tokens = store.open_features("toy", modality).read(), own_tokens(store, modality)
        name, n = f"{modality}_tokens", max(len(tokens[row]) for row in rows)
        np.testing.assert_array_equal(features[modality].numpy(), pooled[rows])
        assert features[name].shape == (len(rows), n, tokens[0].shape[1])
        assert features[name].dtype == features[modality].dtype == torch.float16
        assert present[name].shape == (len(rows), n)
        for i, row in enumerate(rows):
            here = row not in ABSENT[modality]
            assert present[modality][i] == here
            assert present[name][i].tolist() == [here] * len(tokens[row]) + [False] * (n - len(tokens[row]))
            np.testing.assert_array_equal(features[name][i, : len(tokens[row])].numpy(), tokens[row])


def test_any_present_tells_rows_that_have_a_modality(table):
    rows = torch.tensor([41, 2, 3, 0])
    assert table.any_present(rows).tolist() == [False, True, True, True]
    assert table.only(["text", "text_tokens"]).any_present(rows).tolist() == [False, False, True, True]


def test_only_keeps_features_by_their_names(table):
    few = table.only(["text_tokens", "image"])
    assert list(few.features) == list(few.present) == ["text_tokens", "image"]
    assert list(few.batch(torch.tensor([0]))[0]) == ["text_tokens", "image"]
    assert few.lengths is not None
    assert table.only(["image", "image_tokens"]).lengths is None  # of which every row has as many


def test_without_a_modality_its_tokens_are_gone_too(table):
    less = table.without(["image"])
    features, present = less.batch(torch.arange(60))
    assert {name: bool(x.any()) for name, x in present.items()} == {
        "image": False, "image_tokens": False, "text": True, "text_tokens": True,
    }  # fmt: skip
    assert torch.equal(present["text_tokens"], table.batch(torch.arange(60))[1]["text_tokens"])
    assert list(features) == NAMES
    assert table.present["image_tokens"].sum() == 58  # the table it is made from stays as it was
    assert not any(x.any() for x in table.without(["text", "image"]).present.values())


def test_without_takes_modalities_not_features(table):
    for name in ("image_tokens", "audio", "tokens"):
        with pytest.raises(UnknownNameError, match=f"unknown modality '{name}'.*; choose from: image, text"):
            table.without([name])


def test_lengths_are_those_of_what_differs(table):
    assert table.lengths.tolist() == [1 + row % 5 for row in range(60)]
    two = replace(table, features={**table.features, "more_tokens": table.features["text_tokens"]})
    assert two.lengths.tolist() == [2 * (1 + row % 5) for row in range(60)]


def epoch_of(batches, table):
    """The rows of each batch of an epoch; what comes with them must be theirs."""
    index = {tuple(x.tolist()): row for row, x in enumerate(table.features["image"].index_select(0, torch.arange(60)))}
    seen = []
    for features, present, targets in batches:
        own = torch.tensor([index[tuple(x.tolist())] for x in features["image"]])
        assert torch.equal(targets, table.targets[own])
        assert torch.equal(present["text_tokens"].sum(1), (1 + own % 5) * table.present["text"][own])
        assert torch.equal(own, own.sort().values)
        seen.append(own.tolist())
    return seen


def test_an_epoch_of_tokens_has_every_row_once_with_its_own_targets(table):
    rows = table.rows("train")
    for size in (0, 1, 7, 16, 40):
        batches = Batches(table, rows, size, torch.Generator().manual_seed(0))
        first, second = epoch_of(batches, table), epoch_of(batches, table)
        for seen in (first, second):
            assert sorted(row for own in seen for row in own) == rows.tolist()
            assert sorted(map(len, seen)) == sorted(map(len, rows.split(size or 40)))
        assert first != second or size in (0, 40)


def test_rows_of_a_batch_are_alike_in_length(table):
    batches = Batches(table, torch.arange(60), 12, torch.Generator().manual_seed(0))
    masks = [present["text_tokens"] | ~present["text"][:, None] for _, present, _ in batches]
    assert len(masks) == 5
    assert all(mask.all() for mask in masks)  # 12 rows of each length from 1 to 5: no padding at all


def test_the_same_seed_trains_the_same_model(store):
    one, two, other = (train_head(store, replace(CMA, seed=seed)).members[0].model.state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(x, two[name]) for name, x in one.items())
    assert not torch.equal(one["fusion.embed.text.weight"], other["fusion.embed.text.weight"])


def test_rows_of_rare_classes_are_drawn_more_often_among_tokens(table):
    chances = torch.zeros(60, dtype=torch.float64)
    chances[[5, 17]] = 1
    batches = Batches(table, torch.arange(60), 16, torch.Generator().manual_seed(0), chances)
    pooled = table.features["image"].index_select(0, torch.tensor([5, 17])).tolist()
    drawn = [features["image"].tolist() for features, _, _ in batches]
    assert sorted(map(len, drawn)) == [12, 16, 16, 16]
    assert all(x in pooled for batch in drawn for x in batch)


# Pieces to predict


def told(features, present):
    """What a model might say of each row, by which it is known: its pooled features, tokens and presence."""
    parts = [features[m].float().sum(1) * present[m] for m in ("image", "text")]
    parts += [(features[f"{m}_tokens"].float().sum(2) * present[f"{m}_tokens"]).sum(1) for m in ("image", "text")]
    return torch.stack([*parts, present["text_tokens"].sum(1).float()], dim=1)


ROW_FLOATS = 6 + 5 + 4 * (4 * 3 + 5 * 2)  # the pooled features, and a hidden layer over the tokens


PIECES = [1, ROW_FLOATS, 7 * ROW_FLOATS, 8 * ROW_FLOATS - 1, 59 * ROW_FLOATS, 2**25]


def test_results_come_in_the_order_of_the_rows_whatever_the_pieces(table, monkeypatch):
    sizes = []

    def function(features, present):
        sizes.append(len(present["image"]))
        return told(features, present)

    for rows in (torch.arange(60), torch.tensor([59, 2, 2, 41, 3, 17, 0, 58, 8]), torch.tensor([4])):
        expected = torch.cat([told(*table.batch(row[None])) for row in rows])
        assert len(expected.unique(dim=0)) == len(rows.unique())
        for floats in PIECES:
            monkeypatch.setattr(module, "PIECE_FLOATS", floats)
            sizes.clear()
            torch.testing.assert_close(table.map(function, rows), expected)
            assert sizes == list(map(len, rows.split(max(1, floats // ROW_FLOATS))))


def test_pieces_are_of_rows_alike_in_length(table, monkeypatch):
    monkeypatch.setattr(module, "PIECE_FLOATS", 12 * ROW_FLOATS)
    shapes = []

    def function(features, present):
        shapes.append(tuple(features["text_tokens"].shape[:2]))
        return told(features, present)

    table.map(function, torch.arange(60))
    assert shapes == [(12, n) for n in (1, 2, 3, 4, 5)]


def test_of_tokens_that_are_all_as_long_pieces_are_in_order(table, monkeypatch):
    monkeypatch.setattr(module, "PIECE_FLOATS", 60 * 7)  # of 6 + 4 * 12 numbers a row
    few, seen = table.only(["image", "image_tokens"]), []
    found = few.map(lambda features, present: seen.append(len(present["image"])) or features["image"], torch.arange(20))
    assert torch.equal(found, few.features["image"].index_select(0, torch.arange(20)))
    assert seen == [7, 7, 6]


def test_a_model_predicts_each_row_as_it_does_alone(store, monkeypatch):
    run = train_head(store, CMA)
    tables, rows = StoreTables([run], store, "cpu"), torch.tensor([59, 2, 41, 3, 17, 0, 58, 8, 4])
    expected = np.concatenate([run.scores(tables, row[None]) for row in rows])
    for size in (1, 4, 100):
        monkeypatch.setattr(module, "PIECE_FLOATS", size * ROW_FLOATS)
        np.testing.assert_allclose(run.scores(tables, rows), expected, atol=1e-6)


# Modalities dropped


def many(n=4000, **absent):
    """Rows with both modalities but where told; texts of 0 to 3 tokens, images of 2."""
    here = {m: torch.ones(n, dtype=torch.bool) for m in ("image", "text")}
    for modality, rows in absent.items():
        here[modality][rows] = False
    lengths = {"image": torch.full((n,), 2), "text": torch.arange(n) % 4}
    masks = {f"{m}_tokens": (torch.arange(3) < lengths[m][:, None]) & here[m][:, None] for m in here}
    return {**here, **masks}, lengths


@pytest.mark.parametrize("p", [0.2, 0.5, 0.9])
def test_a_modality_is_dropped_with_its_tokens_and_never_the_last(p):
    present, lengths = many(image=slice(0, 500), text=slice(400, 1000))
    before = {name: x.clone() for name, x in present.items()}
    found = drop_modalities(present, p, torch.Generator().manual_seed(0))
    assert list(found) == list(present)
    for modality in ("image", "text"):
        mask = torch.arange(3) < lengths[modality][:, None]
        assert torch.equal(found[f"{modality}_tokens"], mask & found[modality][:, None])
        assert not (found[modality] & ~present[modality]).any()
    assert all(torch.equal(x, before[name]) for name, x in present.items())
    stay = found["image"] | found["text"]
    assert torch.equal(stay, present["image"] | present["text"])
    # One of two stays alone where it is the other that goes, or both would and it is the one spared.
    alone = (found["image"] ^ found["text"])[1000:].float().mean()
    assert alone == pytest.approx(2 * p * (1 - p) + p * p, abs=0.03)
    assert found["image"][1000:].float().mean() == pytest.approx(1 - p + p * p / 2, abs=0.03)


def test_nothing_is_dropped_at_0_and_draws_are_the_generators():
    present, _ = many(100, text=slice(0, 50))
    found = drop_modalities(present, 0.0, torch.Generator().manual_seed(0))
    assert all(torch.equal(x, present[name]) for name, x in found.items())
    one, two, other = (drop_modalities(present, 0.5, torch.Generator().manual_seed(seed)) for seed in (0, 0, 1))
    assert all(torch.equal(x, two[name]) for name, x in one.items())
    assert any(not torch.equal(x, other[name]) for name, x in one.items())


def test_which_features_are_read_makes_no_difference_to_what_is_dropped():
    """So that a fusion of tokens and one without, from the same seed, miss the same modalities."""
    present, _ = many(500)
    found = [
        drop_modalities({name: present[name] for name in names}, 0.5, torch.Generator().manual_seed(0))
        for names in (present, ["image", "text"], ["text_tokens", "text", "image"])
    ]
    assert all(torch.equal(found[0]["image"], other["image"]) for other in found)
    assert all(torch.equal(found[0]["text"], other["text"]) for other in found)


def test_tokens_alone_are_dropped_by_the_row():
    """Of a modality of which tokens only are read, rows without any count as absent."""
    present, lengths = many(2000)
    tokens = {name: present[name] for name in ("image_tokens", "text_tokens")}
    found = drop_modalities(tokens, 0.5, torch.Generator().manual_seed(0))
    whole = {name: mask.sum(1) for name, mask in found.items()}
    assert set(whole["image_tokens"].tolist()) == {0, 2}
    assert ((whole["text_tokens"] == 0) | (whole["text_tokens"] == lengths["text"])).all()
    assert (whole["image_tokens"] + whole["text_tokens"] > 0).all()
    assert whole["image_tokens"][::4].eq(2).all()  # of rows without a token of text the image is the last


def test_training_drops_tokens_with_their_modality(store, monkeypatch):
    seen = []
    real = FusionModel.forward

    def forward(self, features, present):
        if self.training:
            seen.append(present)
        return real(self, features, present)

    monkeypatch.setattr(FusionModel, "forward", forward)
    train_head(store, replace(CMA, modality_dropout=0.5))
    assert sum(len(present["image"]) for present in seen) == 2 * 40
    for present in seen:
        for modality in ("image", "text"):
            assert torch.equal(present[f"{modality}_tokens"].any(1), present[modality])
    gone = 1 - torch.cat([present["image"] for present in seen]).float().mean()
    assert 0.2 < gone < 0.6


# Statistics


def test_statistics_are_those_of_real_tokens(make_store):
    """Padding and rows that lack the modality, whatever they hold, are no part of them."""
    rng = np.random.default_rng(0)
    lengths = rng.integers(0, 6, 200)
    tokens = [rng.normal([5, -300, 0.01], [1, 20, 0.004], (n, 3)).astype(np.float16) for n in lengths]
    absent = set(range(0, 200, 7))
    for row in absent:
        tokens[row][:] = 1e4
    x = {"text": rng.normal(size=(200, 4)).astype(np.float16)}
    targets = np.ones((200, 2), np.int8)
    store = make_store(x, targets, ["train"] * 200, absent={"text": absent}, others={"text": {"tokens": tokens}})
    table = load_table(store, select_features(store, views=CMA.views), CMA.views)
    rows = torch.arange(10, 150)
    model = FusionModel(small(table))
    model.fit_statistics(table.features, table.present, rows)
    mine = np.concatenate([tokens[row] for row in rows if int(row) not in absent]).astype(np.float64)
    found = model.standardize["text_tokens"]
    np.testing.assert_allclose(found.mean.numpy(), mine.mean(0), rtol=1e-6)
    np.testing.assert_allclose(found.scale.numpy(), 1 / mine.std(0), rtol=1e-5)
    pooled = x["text"][[row for row in rows if int(row) not in absent]].astype(np.float64)
    np.testing.assert_allclose(model.standardize["text"].mean.numpy(), pooled.mean(0), rtol=1e-5, atol=1e-7)
    features, present = table.batch(rows)
    real = model.standardized(features)["text_tokens"][present["text_tokens"]]
    np.testing.assert_allclose(real.mean(0).numpy(), 0, atol=1e-5)
    np.testing.assert_allclose(real.std(0, correction=0).numpy(), 1, atol=1e-4)


def small(table):
    return CMAFusion({name: x.shape[1] for name, x in table.features.items()}, 2, Linear, width=4, heads=1, depth=1)


def test_statistics_of_a_store_are_those_of_its_tokens(store, table):
    some = torch.arange(40), torch.tensor([59, 3, 2, 17, 17, 5])
    for rows, modality in itertools.product(some, ("image", "text")):
        real = real_tokens(store, modality)
        expected = np.concatenate([real[row] for row in rows]).astype(np.float64)
        here = rows[torch.from_numpy(store.present(modality))[rows]]
        found = Standardize(expected.shape[1]).fit(table.features[f"{modality}_tokens"], here)
        np.testing.assert_allclose(found.mean.numpy(), expected.mean(0), rtol=1e-5, atol=1e-7)
        np.testing.assert_allclose(found.scale.numpy(), 1 / expected.std(0), rtol=1e-5)


def test_many_tokens_are_sampled_evenly(table, monkeypatch):
    """Statistics of a hundred thousand images need not read them all."""
    monkeypatch.setattr("cachefuse.heads.FIT_TOKENS", 53)  # of up to 5 a row: 10 rows
    tokens, read = table.features["text_tokens"], []
    real = Tokens.read
    monkeypatch.setattr(Tokens, "read", lambda self, index: read.extend(index.tolist()) or real(self, index))
    rows = torch.arange(59, 0, -1)
    found = Standardize(2).fit(tokens, rows)
    places = [rows.tolist().index(row) for row in read]
    assert len(set(places)) == len(places) == 10
    assert places[0] == 0
    assert set(np.diff([*places, 59])) <= {5, 6}
    x, mask = real(tokens, torch.tensor(read))
    expected = x[mask].double()
    torch.testing.assert_close(found.mean, expected.mean(0).float())
    torch.testing.assert_close(found.scale, 1 / expected.std(0, correction=0).float())
    read.clear()
    monkeypatch.setattr("cachefuse.heads.FIT_TOKENS", 59 * 5)
    Standardize(2).fit(tokens, rows)
    assert read == rows.tolist()  # as many as they may be are all read


def test_statistics_need_tokens_that_are_finite():
    none = Tokens([torch.zeros(0, 2)] * 3)
    with pytest.raises(ConfigError, match="features to standardise have no rows"):
        Standardize(2).fit(none)
    bad = Tokens([torch.zeros(1, 2), torch.tensor([[0.0, torch.nan]])])
    with pytest.raises(ConfigError, match="features to standardise must be finite; dimension 1 of 2 is not"):
        Standardize(2).fit(bad)


def test_a_training_needs_a_row_that_has_the_modality(toy_store):
    store = toy_store(absent={"image": set(range(40))})
    with pytest.raises(ConfigError, match="no training row has a usable image; take a fusion that does without it"):
        train_head(store, CMA)


def test_tokens_are_not_copied_to_memory_as_pooled_features_are(store, table):
    model = FusionModel(small(table))
    assert table.at_hand(model.standardize) is None
    pooled = table.only(["image", "text"])
    assert pooled.at_hand(nn.ModuleDict({m: model.standardize[m] for m in pooled.features})) is not None


# What a store must have


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        ({}, "made.zarr holds no tokens of image; make them with cachefuse extract --dataset made --encoder toy "
             "--views pooled,tokens"),
        ({"image"}, "made.zarr holds no tokens of text; make them with cachefuse extract --dataset made --encoder toy "
                    "--views pooled,tokens"),
    ],
    ids=["none", "one"],
)  # fmt: skip
def test_a_store_without_tokens_says_how_to_make_them(tokens, message, make_store):
    rng = np.random.default_rng(0)
    x = {m: rng.normal(size=(20, 3)).astype(np.float16) for m in ("image", "text")}
    kept = {m: {"tokens": rng.normal(size=(20, 2, 3)).astype(np.float16)} for m in tokens}
    store = make_store(x, np.ones((20, 2), np.int8), ["train"] * 20, others=kept)
    for encoders in ((), ("toy",)):
        with pytest.raises(CacheError, match=re.escape(message) + "$"):
            train_head(store, CMA, encoders=encoders)
    train_head(store, replace(CMA, without=("sequence-attention",)))  # which reads none
    train_head(store, replace(CMA, fusion="sum", fusion_options={}))


def test_every_encoder_that_could_give_tokens_is_named(make_store, add_features):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(20, 3)).astype(np.float16)
    store = make_store({"text": x}, np.ones((20, 2), np.int8), ["train"] * 20)
    add_features(store, "hf:bert", "text", x, source="hf:/models/bert")
    message = "--dataset made --encoder hf:/models/bert --encoder toy --views pooled,tokens"
    with pytest.raises(CacheError, match=re.escape(message) + "$"):
        train_head(store, CMA)
    with pytest.raises(CacheError, match=re.escape("--dataset made --encoder hf:/models/bert --views pooled,tokens")):
        train_head(store, CMA, encoders=["bert"])


def test_features_without_tokens_are_left_out_where_others_have_them(store, add_features):
    add_features(store, "hf:bert", "text", np.ones((60, 4), np.float16))
    chosen = select_features(store, views=CMA.views)
    assert {m: [f.encoder for f in group] for m, group in chosen.items()} == {"image": ["toy"], "text": ["toy"]}
    assert train_head(store, CMA).encoders == (("toy", "image"), ("toy", "text"))


def test_tokens_of_two_encoders_do_not_go_together(store, add_features):
    rng = np.random.default_rng(0)
    tokens = rng.normal(size=(60, 2, 3)).astype(np.float16)
    add_features(store, "hf:bert", "text", np.ones((60, 4), np.float16), tokens=tokens)
    with pytest.raises(ConfigError, match="made has text tokens of several encoders; name one with --encoder"):
        train_head(store, CMA)
    assert train_head(store, CMA, encoders=["bert"]).modalities == ("text",)
