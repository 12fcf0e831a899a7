"""Tokens beside pooled features in a table: batches, and pieces to predict."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch

from cachefuse.errors import UnknownNameError
from cachefuse.runs.tables import StoreTables
from cachefuse.runs.train import train_head
from cachefuse.training import feature_table as module
from cachefuse.training.batches import Batches
from cachefuse.training.config import TrainConfig
from cachefuse.training.selection import load_table, select_features
from fixtures.messages import naming

NAMES = ["image", "image_tokens", "text", "text_tokens"]
ABSENT = {"image": {3, 41}, "text": {2, 41}}  # the rows of token_store that lack a modality


def own_tokens(store, modality):
    """Each row's tokens (T_i, D), as they are stored."""
    rows = store.open_features("toy", modality).rows("tokens")
    return [rows[row] for row in range(len(store))]


# Batches


def test_a_fusion_is_given_the_views_that_it_reads(token_store, table):
    assert list(table.features) == list(table.present) == NAMES
    assert [type(x).__name__ for x in table.features.values()] == ["Rows", "Tokens"] * 2
    assert {name: x.shape for name, x in table.features.items()} == {
        "image": (60, 6), "image_tokens": (60, 3), "text": (60, 5), "text_tokens": (60, 2),
    }  # fmt: skip
    assert {name: spec.n_tokens for name, spec in table.specs.items() if spec.view == "tokens"} == {
        "image_tokens": 4, "text_tokens": 5,
    }  # fmt: skip
    pooled = TrainConfig(fusion="cma", ablate=("sequence-attention",)).reads
    few = load_table(token_store, select_features(token_store, views=pooled), pooled)
    assert list(few.features) == ["image", "text"]


def test_a_batch_is_the_stored_rows_with_masks_of_what_is_there(token_store, table):
    for rows, modality in itertools.product(([3], [2, 41, 3, 0], [59, 4, 4, 17], list(range(60))), ("image", "text")):
        features, present = table.batch(torch.tensor(rows))
        pooled, tokens = token_store.open_features("toy", modality).read(), own_tokens(token_store, modality)
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
        with pytest.raises(UnknownNameError, match=naming(f"{name} image text")):
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


def test_the_same_seed_trains_the_same_model(token_store, cma):
    runs = (train_head(token_store, replace(cma, seed=seed)) for seed in (0, 0, 1))
    one, two, other = (run.members[0].model.state_dict() for run in runs)
    assert all(torch.equal(x, two[name]) for name, x in one.items())
    assert not torch.equal(one["fusion.embed.text.weight"], other["fusion.embed.text.weight"])


def test_rows_of_rare_classes_are_drawn_more_often_among_tokens(table):
    sample_weights = torch.zeros(60, dtype=torch.float64)
    sample_weights[[5, 17]] = 1
    batches = Batches(table, torch.arange(60), 16, torch.Generator().manual_seed(0), sample_weights)
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


def test_a_model_predicts_each_row_as_it_does_alone(token_store, monkeypatch, cma):
    run = train_head(token_store, cma)
    tables, rows = StoreTables([run], token_store, "cpu"), torch.tensor([59, 2, 41, 3, 17, 0, 58, 8, 4])
    expected = np.concatenate([run.scores(tables, row[None]) for row in rows])
    for size in (1, 4, 100):
        monkeypatch.setattr(module, "PIECE_FLOATS", size * ROW_FLOATS)
        np.testing.assert_allclose(run.scores(tables, rows), expected, atol=1e-6)
