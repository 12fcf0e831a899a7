"""The training loop of an alignment: exact gradients by chunks, early stopping, interruption, divergence."""

import math

import numpy as np
import pytest
import torch

from cachefuse.alignment import loop
from cachefuse.alignment.config import AlignConfig
from cachefuse.alignment.data import embed, fit_statistics
from cachefuse.alignment.loop import backward, embed_samples, fit
from cachefuse.alignment.model import BOUNDS, TEMPERATURE, Aligner
from cachefuse.alignment.ranks import best_ranks, recall_at
from cachefuse.errors import TrainingError
from cachefuse.nn import TARGETS
from cachefuse.training import OPTIMIZERS, SCHEDULES
from cachefuse.training.loop import Optimization
from cachefuse.training.optim import EMA
from fixtures.messages import naming

WIDTHS = (6, 5)
M, T = 10, 4
SMALL = {"width": 16, "epochs": 3, "batch_size": 64, "patience": 0, "dropout": 0.2}
QUICK = {"lr": 3e-3, "ema": 0.9, "dropout": 0.1}  # learns within a few epochs

pytestmark = pytest.mark.usefixtures("one_thread")


def prepare(data, config, seed=0):
    """Return what ``fit`` takes, as ``align`` makes it."""
    torch.manual_seed(seed)
    model = Aligner([side.width for side in data.sides], config)
    fit_statistics(model, data, data.of("train"))
    optimizer = OPTIMIZERS[config.optimizer](model.parameters(), lr=config.lr)
    schedule = SCHEDULES[config.schedule](optimizer, 10_000)
    return (
        model,
        config,
        data,
        data.of("train"),
        data.of("val"),
        Optimization(optimizer, schedule, EMA(model, config.ema) if config.ema else None),
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


@pytest.mark.parametrize(
    ("method", "op"),
    [("dfe", "add"), pytest.param("dfe", "dot-attention", marks=pytest.mark.slow), ("projection", "add")],
)
@pytest.mark.parametrize("targets", [name for name in TARGETS if name != "printed"])  # which are nearly uniform
@pytest.mark.one_in(3)
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
    arguments[5].optimizer.param_groups[0].update(momentum=0.0, nesterov=False)
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
    with pytest.raises(TrainingError, match=naming("1 loss nan lr")):
        fit(*prepare(correlated(256, 32), config))


@pytest.mark.parametrize("monitor", ["r1", "loss"])
def test_divergence_in_the_last_step_says_so(correlated, monitor):
    """The loss is that before the step, and fine; what the step leaves is not."""
    config = AlignConfig(**{**SMALL, "epochs": 1, "batch_size": 512}, lr=1e30, schedule="constant", monitor=monitor)
    with pytest.raises(TrainingError, match=naming("lr")):
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
