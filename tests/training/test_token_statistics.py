"""Statistics of tokens beside pooled features: of real tokens of training rows, and of a sample of many."""

import itertools

import numpy as np
import pytest
import torch
from torch import nn

from cachefuse.errors import ConfigError
from cachefuse.fusion.cma import CMAFusion
from cachefuse.fusion.model import FusionModel
from cachefuse.nn.heads import Linear
from cachefuse.nn.scaling import Standardize
from cachefuse.runs.train import train_head
from cachefuse.store.tokens import Tokens
from cachefuse.training.selection import load_table, select_features
from fixtures.messages import naming


def real_tokens(store, modality):
    """Each row's tokens (T_i, D), as they are stored; of rows that lack the modality none."""
    rows, present = store.open_features("toy", modality).rows("tokens"), store.present(modality)
    return [rows[row][: len(rows[row]) * present[row]] for row in range(len(store))]


def test_statistics_are_those_of_real_tokens(make_store, cma):
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
    table = load_table(store, select_features(store, views=cma.reads), cma.reads)
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
    return CMAFusion(table.specs, 2, Linear, width=4, heads=1, depth=1)


def test_statistics_of_a_store_are_those_of_its_tokens(token_store, table):
    some = torch.arange(40), torch.tensor([59, 3, 2, 17, 17, 5])
    for rows, modality in itertools.product(some, ("image", "text")):
        real = real_tokens(token_store, modality)
        expected = np.concatenate([real[row] for row in rows]).astype(np.float64)
        here = rows[torch.from_numpy(token_store.present(modality))[rows]]
        found = Standardize(expected.shape[1]).fit(table.features[f"{modality}_tokens"], here)
        np.testing.assert_allclose(found.mean.numpy(), expected.mean(0), rtol=1e-5, atol=1e-7)
        np.testing.assert_allclose(found.scale.numpy(), 1 / expected.std(0), rtol=1e-5)


def test_many_tokens_are_sampled_evenly(table, monkeypatch):
    """Statistics of a hundred thousand images need not read them all."""
    monkeypatch.setattr("cachefuse.nn.scaling.FIT_TOKENS", 53)  # of up to 5 a row: 10 rows
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
    monkeypatch.setattr("cachefuse.nn.scaling.FIT_TOKENS", 59 * 5)
    Standardize(2).fit(tokens, rows)
    assert read == rows.tolist()  # as many as they may be are all read


def test_statistics_need_tokens_that_are_finite():
    none = Tokens([torch.zeros(0, 2)] * 3)
    with pytest.raises(ConfigError, match="rows"):
        Standardize(2).fit(none)
    bad = Tokens([torch.zeros(1, 2), torch.tensor([[0.0, torch.nan]])])
    with pytest.raises(ConfigError, match=naming("standardise 1 2")):
        Standardize(2).fit(bad)


def test_a_training_needs_a_row_that_has_the_modality(toy_store, cma):
    store = toy_store(absent={"image": set(range(40))})
    with pytest.raises(ConfigError, match=naming("image fusion")):
        train_head(store, cma)


def test_tokens_are_not_copied_to_memory_as_pooled_features_are(table):
    model = FusionModel(small(table))
    assert table.in_memory(model.standardize) is None
    pooled = table.only(["image", "text"])
    assert pooled.in_memory(nn.ModuleDict({m: model.standardize[m] for m in pooled.features})) is not None
