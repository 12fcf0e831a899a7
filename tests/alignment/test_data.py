"""Pairs as they are read: draws, statistics, and whole trainings on stores."""

import numpy as np
import pytest
import torch

from cachefuse.alignment import data as module
from cachefuse.alignment.config import AlignConfig
from cachefuse.alignment.data import PairData, SideRows, fit_statistics, in_batches, open_pairs
from cachefuse.alignment.loop import embed_samples
from cachefuse.alignment.model import Aligner
from cachefuse.alignment.train import align

M, T = 10, 4
QUICK = {"lr": 3e-3, "ema": 0.9, "dropout": 0.1}  # learns within a few epochs

pytestmark = pytest.mark.usefixtures("one_thread")


def test_batches_hold_every_sample_once():
    samples = np.arange(100, 121)
    drawn = list(in_batches(samples, 4, torch.Generator().manual_seed(0)))
    assert [len(part) for part in drawn] == [4] * 5  # one alone has no negatives
    assert len({*torch.cat(drawn).tolist()} & {*samples.tolist()}) == 20
    assert sorted(torch.cat(list(in_batches(samples[:20], 4, torch.Generator()))).tolist()) == samples[:20].tolist()


class TestDraws:
    def data(self, modalities, counts, n=40):
        offsets = [np.concatenate([[0], np.cumsum(np.resize(each, n))]) for each in counts]
        sides = [SideRows(m, torch.zeros(int(o[-1]), 3), o) for m, o in zip(modalities, offsets, strict=True)]
        return PairData("made", (sides[0], sides[1]), np.arange(n), np.repeat("train", n))

    def test_each_sample_has_one_of_its_own_items_on_either_side(self):
        data = self.data(("image", "text"), ([1], [1, 3, 5]))
        samples, generator = torch.arange(40).flip(0), torch.Generator().manual_seed(0)
        seen = set()
        for _ in range(100):
            for side, rows in zip(data.sides, data.draw(samples, generator), strict=True):
                owners = np.searchsorted(side.offsets, rows.numpy(), side="right") - 1
                assert owners.tolist() == samples.tolist()
            seen |= set(rows.tolist())
        assert seen == set(range(int(data.sides[1].offsets[-1])))  # in time all of them

    def test_of_the_same_texts_they_are_different_ones(self):
        data = self.data(("text", "text"), ([1, 2, 3], [1, 2, 3]))
        generator = torch.Generator().manual_seed(0)
        alone = torch.from_numpy(np.diff(data.sides[0].offsets) == 1)
        pairs = set()
        for _ in range(100):
            a, b = data.draw(torch.arange(40), generator)
            assert torch.equal(a == b, alone)
            pairs |= set(zip((a - a[0]).tolist(), (b - a[0]).tolist(), strict=True))
        assert {(3, 4), (3, 5), (4, 3), (4, 5), (5, 3), (5, 4)} <= pairs  # of the third sample, which has three


class TestStatistics:
    def test_are_those_of_the_real_tokens_of_some_samples(self, make_store):
        rng = np.random.default_rng(0)
        texts = [[rng.normal(3, 2, (n, 6)).astype(np.float16)] for n in rng.integers(1, 30, 50)]
        images = [rng.normal(-1, 5, (4, 8)).astype(np.float16) for _ in range(50)]
        store = make_store(["train"] * 50, images={"vit": images}, texts={"bert": texts}, view="tokens")
        data, _ = open_pairs(store, view="tokens")
        model = Aligner([8, 6], AlignConfig(width=8))
        chosen = np.arange(0, 50, 3)
        fit_statistics(model, data, chosen)
        for standardize, rows in zip(model.standardize, (images, [own for (own,) in texts]), strict=True):
            tokens = np.concatenate([rows[i] for i in chosen]).astype(np.float64)
            np.testing.assert_allclose(standardize.mean, tokens.mean(0), rtol=1e-5)
            np.testing.assert_allclose(1 / standardize.scale, tokens.std(0), rtol=1e-5)

    def test_are_those_of_every_item_of_a_sample(self, correlated):
        data = correlated(60, 20)
        model = Aligner([12, 10], AlignConfig(width=8))
        fit_statistics(model, data, data.of("train"))
        for standardize, side, n in zip(model.standardize, data.sides, (60, 120), strict=True):
            np.testing.assert_allclose(standardize.mean, side.rows[:n].double().mean(0), rtol=1e-5, atol=1e-6)

    def test_of_many_tokens_are_those_of_an_even_spread(self, monkeypatch):
        monkeypatch.setattr(module, "FIT_TOKENS", 400)
        monkeypatch.setattr(module, "PIECE_ROWS", 10)
        n = 1000
        x = torch.linspace(0, 1, n)[:, None, None].expand(n, 7, 3).contiguous()
        sides = (SideRows("image", x, np.arange(n + 1)), SideRows("text", x, np.arange(n + 1)))
        model = Aligner([3, 3], AlignConfig(width=8))
        fit_statistics(model, PairData("made", sides, np.arange(n), np.repeat("train", n)), np.arange(n))
        assert model.standardize[0].mean.tolist() == pytest.approx([0.5] * 3, abs=0.05)


def test_aligns_a_store(make_store):
    """From files, with a sample that lacks an image, one that has no text, and tokens of different numbers."""
    rng = np.random.default_rng(0)
    z = rng.normal(size=(150, 5))
    images = [x.astype(np.float16) for x in np.tanh(z @ rng.normal(size=(5, 12)))]
    texts = [(x + 0.1 * rng.normal(size=(2, 10))).astype(np.float16) for x in z @ rng.normal(size=(5, 10))]
    images[7], texts[8] = None, np.empty((0, 10), np.float16)
    store = make_store(["train"] * 110 + ["val"] * 40, images={"vit": images}, texts={"bert": texts})
    config = AlignConfig(**QUICK, width=32, epochs=20, batch_size=32, patience=10)
    before = torch.get_rng_state()
    runs = [align(store, config, device="cpu") for _ in range(2)]
    assert torch.equal(torch.get_rng_state(), before)
    first, second = (run.model.state_dict() for run in runs)
    assert all(torch.equal(first[name], second[name]) for name in first)
    result = runs[0].results["val"]
    assert result.n_samples == 40
    assert {name: (d.n_queries, d.n_gallery) for name, d in result.directions.items()} == {
        "image to text": (40, 80), "text to image": (80, 40)
    }  # fmt: skip
    assert all(direction.recall[1] > 0.2 for direction in result.directions.values())
    assert all(direction.recall[10] > 0.7 for direction in result.directions.values())


def test_aligns_two_encoders_of_the_same_texts(make_store):
    """Three captions each: what is looked for is another caption of the same sample, not the caption itself."""
    rng = np.random.default_rng(0)
    z = rng.normal(size=(120, 1, 5)) + 0.1 * rng.normal(size=(120, 3, 5))
    texts = {name: list((z @ rng.normal(size=(5, 10))).astype(np.float16)) for name in ("bert", "roberta")}
    store = make_store(["train"] * 90 + ["val"] * 30, texts=texts)
    data, _ = open_pairs(store)
    assert data.same_texts
    model = Aligner([10, 10], AlignConfig(width=16))
    for one in embed_samples(model, data, data.of("val")):
        assert one.items.tolist() == list(range(270, 360))
        assert one.owners.tolist() == np.repeat(np.arange(30), 3).tolist()
    config = AlignConfig(**QUICK, width=16, epochs=15, batch_size=32)
    run = align(store, config, device="cpu")
    assert len(run.results["val"].directions) == 2
    for direction in run.results["val"].directions.values():
        assert (direction.n_queries, direction.n_gallery) == (90, 90)
        assert direction.recall[5] > 0.4  # chance is below 0.12


def test_aligns_tokens(make_store):
    rng = np.random.default_rng(0)
    z = rng.normal(size=(60, 4))
    images = [(x + 0.1 * rng.normal(size=(3, 8))).astype(np.float16) for x in z @ rng.normal(size=(4, 8))]
    texts = [
        [(x + 0.1 * rng.normal(size=(n, 6))).astype(np.float16)]
        for x, n in zip(z @ rng.normal(size=(4, 6)), rng.integers(1, 9, 60), strict=True)
    ]
    store = make_store(["train"] * 45 + ["val"] * 15, images={"vit": images}, texts={"bert": texts}, view="tokens")
    config = AlignConfig(**QUICK, op="additive-attention", views="tokens", width=16, epochs=15, batch_size=16)
    run = align(store, config, device="cpu")
    assert all(direction.recall[5] > 0.5 for direction in run.results["val"].directions.values())
