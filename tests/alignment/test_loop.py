"""The training loop of an alignment: exact gradients by chunks, early stopping, interruption, divergence."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from cachefuse.alignment import data as module
from cachefuse.alignment import loop
from cachefuse.alignment.config import AlignConfig
from cachefuse.alignment.data import PairData, SideRows, embed, fit_statistics, in_batches, open_pairs
from cachefuse.alignment.loop import backward, embed_samples, fit
from cachefuse.alignment.model import BOUNDS, TEMPERATURE, Aligner
from cachefuse.alignment.ranks import best_ranks, recall_at
from cachefuse.alignment.train import align
from cachefuse.errors import TrainingError
from cachefuse.registry import METHODS, OPERATIONS, OPTIMIZERS, SCHEDULES, TARGETS, lookup

WIDTHS = (6, 5)
M, T = 10, 4
SMALL = {"width": 16, "epochs": 3, "batch_size": 64, "patience": 0, "dropout": 0.2}
QUICK = {"lr": 3e-3, "ema": 0.9, "dropout": 0.1}  # learns within a few epochs

pytestmark = pytest.mark.usefixtures("one_thread")


def exact(seed=0, **options):
    """Return a model in float64; what stores hold is float32 at most, and so is what ``Standardize`` gives."""
    torch.manual_seed(seed)
    model = Aligner(WIDTHS, AlignConfig(width=8, **options))
    model.standardize = nn.ModuleList(nn.Identity() for _ in WIDTHS)
    return model.double()


def batch(n_tokens=T, seed=0):
    """Return ``read(side, rows)`` of 2 M rows of tokens in float64, and M of them on either side."""
    generator = torch.Generator().manual_seed(seed)
    x = [torch.randn(2 * M, n_tokens, width, generator=generator, dtype=torch.float64) for width in WIDTHS]
    mask = torch.arange(n_tokens) < torch.randint(1, n_tokens + 1, (2 * M, 1), generator=generator)
    items = tuple(torch.randperm(2 * M, generator=generator)[:M] for _ in WIDTHS)
    return (lambda side, index: (x[side][index], mask[index])), items


def run_backward(model, read, items, chunk_size, targets="soft", seed=None):
    """Return the loss, and the gradients by name."""
    if seed is not None:
        torch.manual_seed(seed)
    model.zero_grad()
    value = backward(model, read, items, chunk_size, targets)
    return value, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_same(found, expected):
    value, gradients = found
    assert value.item() == pytest.approx(expected[0].item(), abs=1e-12)
    assert gradients.keys() == expected[1].keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected[1][name], rtol=1e-10, atol=1e-10, msg=name)


class TestBackward:
    @pytest.mark.parametrize("targets", TARGETS)
    @pytest.mark.parametrize("op", sorted(OPERATIONS))
    def test_by_chunks_it_is_the_whole_batchs(self, op, targets):
        model = exact(op=op, dropout=0.0)
        read, items = batch()
        expected = run_backward(model, read, items, 0, targets)
        assert len(expected[1]) > 10
        for chunk_size in (1, 2, 3, 4, 7, 9, 10, 11, 1000):
            assert_same(run_backward(model, read, items, chunk_size, targets), expected)

    @pytest.mark.parametrize("method", sorted(METHODS))
    def test_of_pooled_features_too(self, method):
        model = exact(method=method, dropout=0.0)
        read, items = batch(n_tokens=1)
        expected = run_backward(model, read, items, 0)
        for chunk_size in (1, 3, 5):
            assert_same(run_backward(model, read, items, chunk_size), expected)

    @pytest.mark.parametrize("chunk_size", [0, 3])
    def test_the_temperature_has_the_gradient_of_the_loss(self, chunk_size):
        model = exact(dropout=0.0)
        read, items = batch()
        found = run_backward(model, read, items, chunk_size, "hard")[1]["log_temperature"].item()
        losses = []
        for moved in (1e-6, -1e-6):
            with torch.no_grad():
                model.log_temperature += moved
                losses.append(model.loss(*(model(i, read(i, items[i])) for i in (0, 1)), "hard").item())
                model.log_temperature -= moved
        assert found == pytest.approx((losses[0] - losses[1]) / 2e-6, rel=1e-5)
        assert found != 0

    @pytest.mark.parametrize("chunk_size", [1, 3, 5, 9])
    def test_dropout_drops_the_same_on_the_way_back(self, chunk_size):
        """Against one graph through the same chunks, drawn in the same order."""
        model = exact(dropout=0.4)
        read, items = batch()
        torch.manual_seed(7)
        both = [torch.cat([model(i, read(i, part)) for part in items[i].split(chunk_size)]) for i in (0, 1)]
        after = torch.get_rng_state()
        value = model.loss(*both, "soft")
        model.zero_grad()
        value.backward()
        expected = value.detach(), {name: p.grad.clone() for name, p in model.named_parameters()}
        assert_same(run_backward(model, read, items, chunk_size, seed=7), expected)
        assert torch.equal(torch.get_rng_state(), after)  # as if the chunks had been embedded once

    def test_dropout_is_drawn_anew_each_time(self):
        model = exact(dropout=0.4)
        read, items = batch()
        values = [run_backward(model, read, items, 3, seed=seed)[0].item() for seed in (0, None, 0)]
        assert values[0] == values[2] != values[1]

    def test_what_is_drawn_next_does_not_depend_on_the_way_back(self):
        model = exact(dropout=0.0)
        read, items = batch()
        torch.manual_seed(3)
        expected = torch.rand(3)
        for chunk_size in (0, 3):
            run_backward(model, read, items, chunk_size, seed=3)
            assert torch.equal(torch.rand(3), expected)

    @pytest.mark.parametrize("chunk_size", [0, 3])
    def test_gradients_add_up(self, chunk_size):
        model = exact(dropout=0.0)
        read, items = batch()
        once = {name: x.clone() for name, x in run_backward(model, read, items, chunk_size)[1].items()}
        backward(model, read, items, chunk_size, "soft")
        for name, p in model.named_parameters():
            torch.testing.assert_close(p.grad, 2 * once[name])

    @pytest.mark.parametrize("chunk_size", [0, 3])
    def test_leaves_modes_as_they_were(self, chunk_size):
        model = exact()
        value = run_backward(model, *batch(), chunk_size)[0]
        assert not value.requires_grad
        assert torch.is_grad_enabled()
        assert model.training

    def test_a_model_takes_as_many_rows_at_a_time_as_a_chunk_has(self):
        sizes = []
        model = exact(dropout=0.0)
        read, items = batch()

        def counting(side, index):
            sizes.append((side, len(index), torch.is_grad_enabled()))
            return read(side, index)

        backward(model, counting, items, 4, "soft")
        assert [(side, n) for side, n, _ in sizes] == [(0, 4), (0, 4), (0, 2), (1, 4), (1, 4), (1, 2)] * 2
        assert [with_graph for *_, with_graph in sizes] == [False] * 6 + [True] * 6


def prepare(data, config, seed=0):
    """Return what ``fit`` takes, as ``align`` makes it."""
    torch.manual_seed(seed)
    model = Aligner([side.width for side in data.sides], config)
    fit_statistics(model, data, data.of("train"))
    optimizer = lookup(OPTIMIZERS, config.optimizer, "optimizer")(model.parameters(), lr=config.lr)
    schedule = lookup(SCHEDULES, config.schedule, "schedule")(optimizer, 10_000)
    return (
        model,
        config,
        data,
        data.of("train"),
        data.of("val"),
        optimizer,
        schedule,
        torch.Generator().manual_seed(seed),
    )


def scripted(monkeypatch, scores):
    """Have validation say what it is told: (recall at 1, loss) by epoch."""
    told = iter(scores)
    monkeypatch.setattr(loop, "_validate", lambda *_: next(told))


def weights(model):
    return {name: x.clone() for name, x in model.state_dict().items()}


def same_weights(a, b):
    return a.keys() == b.keys() and all(torch.equal(x, b[name]) for name, x in a.items())


@pytest.mark.parametrize(("method", "op"), [("dfe", "add"), ("dfe", "dot-attention"), ("projection", "add")])
@pytest.mark.parametrize("targets", TARGETS)
def test_training_finds_what_belongs_together(correlated, method, op, targets):
    """64 images and 128 texts that were not trained on, chance 1 in 64 to 1 in 128."""
    data = correlated()
    config = AlignConfig(method=method, op=op, targets=targets, **QUICK, width=32, epochs=30, batch_size=64)
    arguments = prepare(data, config)
    both = embed_samples(arguments[0], data, data.of("val"))
    assert recall_at(best_ranks(*both), 1) < 0.15
    history = fit(*arguments)
    both = embed_samples(arguments[0], data, data.of("val"))
    for pair in (both, both[::-1]):
        assert recall_at(best_ranks(*pair), 1) > 0.5
    best = history.epochs[history.best_epoch - 1]
    assert best.score == pytest.approx(np.mean([recall_at(best_ranks(*pair), 1) for pair in (both, both[::-1])]))
    assert best.score == max(epoch.score for epoch in history.epochs)
    assert history.epochs[-1].loss < history.epochs[0].loss


def test_chunks_train_the_same_model(correlated):
    data = correlated(96, 32)
    trained = []
    for chunk_size in (0, 7, 64):
        arguments = prepare(data, AlignConfig(**{**SMALL, "dropout": 0.0}, chunk_size=chunk_size, ema=0.0))
        history = fit(*arguments)
        trained.append((weights(arguments[0]), [epoch.loss for epoch in history.epochs]))
    for found, losses in trained[1:]:
        assert losses == pytest.approx(trained[0][1], rel=1e-4)
        for name, x in found.items():
            torch.testing.assert_close(x, trained[0][0][name], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("lr", [10.0, 1e4])
@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_the_temperature_stays_within_its_bounds(correlated, lr, optimizer):
    """What learns nothing would have it ever higher."""
    config = AlignConfig(**{**SMALL, "epochs": 4}, lr=lr, optimizer=optimizer, schedule="constant", ema=0.0)
    arguments = prepare(correlated(96, 32), config)
    seen = []
    fit(*arguments, on_epoch=lambda epoch: seen.append(arguments[0].log_temperature.item()))
    assert seen == [BOUNDS[1]] * 4


@pytest.mark.parametrize(("gradient", "bound"), [(1.0, BOUNDS[0]), (-1.0, BOUNDS[1])])
def test_the_temperature_comes_back_from_its_bounds(correlated, monkeypatch, gradient, bound):
    """It is the parameter itself that is bounded: no distance is to be made good before it moves again."""
    signs = iter([gradient] * 40 + [-gradient])

    def backward_of_one_parameter(model, *_):
        model.log_temperature.grad = torch.tensor(next(signs))
        return torch.tensor(1.0)

    monkeypatch.setattr(loop, "backward", backward_of_one_parameter)
    config = AlignConfig(**{**SMALL, "epochs": 41}, lr=0.5, optimizer="sgd", schedule="constant", ema=0.0)
    arguments = prepare(correlated(32, 0), config)
    arguments[5].param_groups[0].update(momentum=0.0, nesterov=False)
    seen = []
    fit(*arguments, on_epoch=lambda epoch: seen.append(arguments[0].log_temperature.item()))
    assert seen[20:40] == pytest.approx([bound] * 20)
    assert seen[40] == pytest.approx(bound + gradient * 0.5)


def test_the_temperature_starts_where_clips_does_and_is_bounded():
    model = Aligner(WIDTHS, AlignConfig(width=8))
    assert model.temperature.item() == pytest.approx(TEMPERATURE)
    for value, expected in ((-100.0, 0.01), (100.0, 1.0), (math.log(0.5), 0.5)):
        with torch.no_grad():
            model.log_temperature.fill_(value)
        assert model.temperature.item() == pytest.approx(expected)
        model.bound_temperature()
        assert model.log_temperature.exp().item() == pytest.approx(expected)


@pytest.mark.parametrize("chunk_size", [0, 20])
def test_same_seed_same_weights(correlated, chunk_size):
    data = correlated(96, 32)
    trained = []
    for seed in (0, 0, 1):
        arguments = prepare(data, AlignConfig(**SMALL, chunk_size=chunk_size), seed)
        fit(*arguments)
        trained.append(weights(arguments[0]))
    assert same_weights(trained[0], trained[1])
    assert not same_weights(trained[0], trained[2])


class TestEarlyStopping:
    def fit(self, correlated, monkeypatch, scores, **options):
        """Return the history, the weights after each epoch and those that stayed."""
        scripted(monkeypatch, scores)
        config = AlignConfig(**{**SMALL, "epochs": len(scores), "ema": 0.0, **options})
        arguments = prepare(correlated(96, 32), config)
        after = []
        history = fit(*arguments, on_epoch=lambda epoch: after.append(weights(arguments[0])))
        return history, after, weights(arguments[0])

    def test_by_recall(self, correlated, monkeypatch):
        scores = [(0.1, 9.0), (0.3, 8.0), (0.2, 1.0), (0.3, 0.5), (0.25, 0.1), (0.9, 0.1)]
        history, after, kept = self.fit(correlated, monkeypatch, scores, patience=3)
        assert [epoch.score for epoch in history.epochs] == [0.1, 0.3, 0.2, 0.3, 0.25]
        assert [epoch.best for epoch in history.epochs] == [True, True, False, False, False]
        assert history.best_epoch == 2
        assert same_weights(kept, after[1])

    def test_by_loss(self, correlated, monkeypatch):
        scores = [(0.9, 3.0), (0.1, 2.0), (0.2, 2.5), (0.9, 2.0), (0.9, 1.0)]
        history, after, kept = self.fit(correlated, monkeypatch, scores, patience=2, monitor="loss")
        assert [epoch.val_loss for epoch in history.epochs] == [3.0, 2.0, 2.5, 2.0]
        assert [epoch.best for epoch in history.epochs] == [True, True, False, False]
        assert history.best_epoch == 2
        assert same_weights(kept, after[1])

    @pytest.mark.parametrize("monitor", ["r1", "loss"])
    def test_patience_0_trains_all_epochs_and_keeps_the_best(self, correlated, monkeypatch, monitor):
        scores = [(0.1, 3.0), (0.9, 0.1), (0.5, 2.0), (0.2, 2.0), (0.3, 2.0), (0.8, 1.0)]
        history, after, kept = self.fit(correlated, monkeypatch, scores, patience=0, monitor=monitor)
        assert len(history.epochs) == 6
        assert history.best_epoch == 2
        assert not history.interrupted
        assert same_weights(kept, after[1])

    def test_a_recall_of_0_is_a_first_best(self, correlated, monkeypatch):
        history, after, kept = self.fit(correlated, monkeypatch, [(0.0, 3.0), (0.0, 2.0)])
        assert history.best_epoch == 1
        assert same_weights(kept, after[0])

    def test_patience_1_stops_at_the_first_epoch_that_is_no_better(self, correlated, monkeypatch):
        history, *_ = self.fit(correlated, monkeypatch, [(0.1, 1.0), (0.2, 1.0), (0.2, 1.0), (0.9, 1.0)], patience=1)
        assert len(history.epochs) == 3


def test_without_validation_the_last_epoch_stays(correlated):
    data = correlated(64, 0)
    arguments = prepare(data, AlignConfig(**SMALL, ema=0.0))
    after = []
    history = fit(*arguments, on_epoch=lambda epoch: after.append(weights(arguments[0])))
    assert history.best_epoch == 3
    assert [(epoch.score, epoch.val_loss) for epoch in history.epochs] == [(None, None)] * 3
    assert same_weights(weights(arguments[0]), after[2])


def test_averaged_weights_are_those_validated_and_kept(correlated):
    data = correlated(96, 32)
    arguments = prepare(data, AlignConfig(**SMALL, ema=0.9))
    model = arguments[0]
    after = []
    history = fit(*arguments, on_epoch=lambda epoch: after.append(weights(model)))
    assert not same_weights(weights(model), after[history.best_epoch - 1])
    both = embed_samples(model, data, data.of("val"))
    score = np.mean([recall_at(best_ranks(*pair), 1) for pair in (both, both[::-1])])
    assert history.epochs[history.best_epoch - 1].score == pytest.approx(score)


class TestInterruption:
    def test_keeps_the_best_epoch(self, correlated, monkeypatch):
        scripted(monkeypatch, [(0.1, 3.0), (0.5, 2.0), (0.2, 1.0), (0.9, 1.0)])
        arguments = prepare(correlated(96, 32), AlignConfig(**{**SMALL, "epochs": 4}, ema=0.0))
        after = []

        def interrupt(epoch):
            after.append(weights(arguments[0]))
            if epoch.epoch == 3:
                raise KeyboardInterrupt

        history = fit(*arguments, on_epoch=interrupt)
        assert history.interrupted
        assert len(history.epochs) == 3
        assert history.best_epoch == 2
        assert same_weights(weights(arguments[0]), after[1])

    def test_in_the_middle_of_an_epoch(self, correlated, monkeypatch):
        scripted(monkeypatch, [(0.1, 3.0)] * 9)
        arguments = prepare(correlated(96, 32), AlignConfig(**SMALL, ema=0.0))
        after, steps = [], []

        def stop_at_the_fourth(model, *rest):
            steps.append(1)
            if len(steps) == 4:  # two steps an epoch
                raise KeyboardInterrupt
            return backward(model, *rest)

        monkeypatch.setattr(loop, "backward", stop_at_the_fourth)
        history = fit(*arguments, on_epoch=lambda epoch: after.append(weights(arguments[0])))
        assert history.interrupted
        assert len(history.epochs) == 1
        assert same_weights(weights(arguments[0]), after[0])

    def test_before_there_is_a_best_epoch_it_is_passed_on(self, correlated, monkeypatch):
        def interrupted(*_):
            raise KeyboardInterrupt

        monkeypatch.setattr(loop, "_validate", interrupted)
        with pytest.raises(KeyboardInterrupt):
            fit(*prepare(correlated(96, 32), AlignConfig(**SMALL)))


@pytest.mark.parametrize("chunk_size", [0, 20])
def test_divergence_says_so(correlated, chunk_size):
    config = AlignConfig(**SMALL, lr=1e38, optimizer="sgd", schedule="constant", chunk_size=chunk_size)
    with pytest.raises(TrainingError, match=r"training diverged in epoch 1: the loss is nan; take a lower lr"):
        fit(*prepare(correlated(256, 32), config))


@pytest.mark.parametrize("monitor", ["r1", "loss"])
def test_divergence_in_the_last_step_says_so(correlated, monitor):
    """The loss is that before the step, and fine; what the step leaves is not."""
    config = AlignConfig(**{**SMALL, "epochs": 1, "batch_size": 512}, lr=1e30, schedule="constant", monitor=monitor)
    with pytest.raises(TrainingError, match="training diverged"):
        fit(*prepare(correlated(256, 32), config))


def test_the_loss_is_the_mean_over_pairs(correlated, monkeypatch):
    """Batches of 64 and 36: each counts for its pairs."""
    values = iter([torch.tensor(1.0), torch.tensor(3.0)] * 3)
    monkeypatch.setattr(loop, "backward", lambda *_: next(values))
    history = fit(*prepare(correlated(100, 8), AlignConfig(**SMALL, optimizer="sgd", schedule="constant")))
    assert [epoch.loss for epoch in history.epochs] == pytest.approx([(64 + 3 * 36) / 100] * 3)


def test_the_validation_loss_is_that_of_first_items_in_batches_of_trainings(correlated):
    data = correlated(96, 50)
    arguments = prepare(data, AlignConfig(**{**SMALL, "batch_size": 32, "epochs": 1}, ema=0.0, lr=1e-30))
    history = fit(*arguments)
    model, samples = arguments[0], data.of("val")
    x, y = embed(model, 0, data.sides[0], samples), embed(model, 1, data.sides[1], 2 * samples)
    with torch.no_grad():
        parts = [model.loss(x[a:b], y[a:b], "hard").item() for a, b in ((0, 32), (32, 50))]
    assert history.epochs[0].val_loss == pytest.approx((32 * parts[0] + 18 * parts[1]) / 50, rel=1e-5)


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
    assert same_weights(weights(runs[0].model), weights(runs[1].model))
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
    config = AlignConfig(**QUICK, op="additive-attention", view="tokens", width=16, epochs=15, batch_size=16)
    run = align(store, config, device="cpu")
    assert all(direction.recall[5] > 0.5 for direction in run.results["val"].directions.values())
