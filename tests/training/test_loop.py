import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import nn

from cachefuse.errors import TrainingError
from cachefuse.feature_spec import pooled_specs
from cachefuse.fusion.base import Model
from cachefuse.fusion.late import SumFusion
from cachefuse.nn.losses import bce
from cachefuse.training.batches import Batches
from cachefuse.training.feature_table import FeatureTable
from cachefuse.training.inference import mean_loss, predict_logits, spread, to_scores
from cachefuse.training.loop import Optimization, Validation, fit
from cachefuse.training.optim import NesterovSGD, adam
from fixtures.messages import naming


class Probe(Model):
    """A linear model of one modality."""

    def __init__(self, width, classes):
        super().__init__()
        self.linear = nn.Linear(width, classes)

    def forward(self, features, present):
        return self.linear(features["image"].float())


def table_of(x, y):
    n = len(x)
    return FeatureTable(
        {"image": torch.tensor(x)},
        pooled_specs({"image": x.shape[1]}),
        {"image": torch.ones(n, dtype=torch.bool)},
        torch.tensor(y),
        np.ones(n, bool),
        None,
    )


@pytest.fixture
def table():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(40, 5)).astype(np.float32)
    return table_of(x, (x @ rng.normal(size=(5, 3)) > 0).astype(np.uint8))


def train(
    table, *, scores=None, lr=0.1, optimizer=torch.optim.SGD, loss=bce, batch_size=0, patience=3, seed=0,
    by_loss=False, **options
):  # fmt: skip
    """Fit a probe; ``scores`` are what validation says after each epoch."""
    torch.manual_seed(0)
    model = Probe(table.features["image"].shape[1], table.targets.shape[1])
    given = iter(scores or ())
    history = fit(
        model,
        loss,
        Batches(table, torch.arange(len(table.targets)), batch_size, torch.Generator().manual_seed(seed)),
        Optimization(optimizer(model.parameters(), lr=lr)),
        validation=Validation(torch.arange(8), lambda logits: next(given), patience, by_loss) if scores else None,
        **{"epochs": 6, **options},
    )
    return model, history


def weights(model):
    return model.linear.weight.detach().numpy().copy()


def test_full_batch_gradient_descent_equals_arithmetic(table):
    torch.manual_seed(0)
    start = Probe(5, 3).linear
    w, b = start.weight.detach().double().numpy(), start.bias.detach().double().numpy()
    x, y = table.features["image"].double().numpy(), table.targets.double().numpy()
    losses = []
    for _ in range(6):
        z = x @ w.T + b
        losses.append(np.mean(np.logaddexp(0, z) - y * z))
        gradient = (1 / (1 + np.exp(-z)) - y) / y.size
        w, b = w - 0.1 * gradient.T @ x, b - 0.1 * gradient.sum(0)
    model, history = train(table)
    np.testing.assert_allclose(weights(model), w, atol=1e-6)
    np.testing.assert_allclose(model.linear.bias.detach(), b, atol=1e-6)
    np.testing.assert_allclose([epoch.loss for epoch in history.epochs], losses, atol=1e-6)


def test_the_loss_of_an_epoch_weighs_a_short_batch_by_its_rows(table):
    _, full = train(table, lr=1e-9, epochs=1)
    _, parts = train(table, lr=1e-9, epochs=1, batch_size=12)
    assert parts.epochs[0].loss == pytest.approx(full.epochs[0].loss, abs=1e-6)


def test_nesterov_is_torchs(table):
    ours, _ = train(table, optimizer=NesterovSGD)
    theirs, _ = train(table, optimizer=lambda params, lr: torch.optim.SGD(params, lr, momentum=0.9, nesterov=True))
    np.testing.assert_allclose(weights(ours), weights(theirs), rtol=1e-6)  # one kernel for all steps rounds elsewhere


def test_steps_equal_arithmetic_over_the_same_batches(table):
    torch.manual_seed(0)
    start = Probe(5, 3).linear
    w, b = start.weight.detach().double().numpy(), start.bias.detach().double().numpy()
    batches, losses = Batches(table, torch.arange(40), 12, torch.Generator().manual_seed(0)), []
    for _ in range(6):
        total = 0.0
        for features, _, targets in batches:
            x, y = features["image"].double().numpy(), targets.double().numpy()
            z = x @ w.T + b
            total += np.mean(np.logaddexp(0, z) - y * z) * len(x)
            gradient = (1 / (1 + np.exp(-z)) - y) / y.size
            w, b = w - 0.1 * gradient.T @ x, b - 0.1 * gradient.sum(0)
        losses.append(total / 40)
    model, history = train(table, batch_size=12)
    np.testing.assert_allclose(weights(model), w, atol=1e-6)
    np.testing.assert_allclose([epoch.loss for epoch in history.epochs], losses, atol=1e-6)


@pytest.mark.parametrize("batch_size", [0, 12])
def test_the_same_seed_gives_the_same_bytes(table, batch_size):
    (first, one), (again, two) = (train(table, batch_size=batch_size, lr=0.5) for _ in range(2))
    assert weights(first).tobytes() == weights(again).tobytes()
    assert one == two


def test_another_seed_gives_other_batches(table):
    first, other = (train(table, batch_size=12, seed=seed)[0] for seed in (0, 1))
    assert not np.allclose(weights(first), weights(other), atol=1e-5)


@pytest.mark.parametrize("sample_weights", [None, torch.ones(40, dtype=torch.float64)])
@pytest.mark.parametrize("modality_dropout", [0.0, 0.5])
def test_what_an_absent_row_holds_makes_no_difference(sample_weights, modality_dropout):
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(2, 40, 5)).astype(np.float32), (rng.random((40, 3)) < 0.5).astype(np.uint8)
    here = torch.from_numpy(rng.random((2, 40)) < 0.8)
    here[0] |= ~here[1]
    specs = pooled_specs({"image": 5, "text": 5})

    def trained(filling):
        features = {
            m: torch.from_numpy(values).masked_fill(~at[:, None], filling)
            for m, values, at in zip(("image", "text"), x, here, strict=True)
        }
        table = FeatureTable(
            features, specs, dict(zip(features, here, strict=True)), torch.tensor(y), np.ones(40, bool), None
        )
        torch.manual_seed(0)
        model = SumFusion(specs, 3, nn.Linear)
        generator = torch.Generator().manual_seed(0)
        batches = Batches(table, torch.arange(40), 9, generator, sample_weights, modality_dropout)
        history = fit(model, bce, batches, Optimization(adam(model.parameters(), lr=0.05)), epochs=3)
        return [*(p.detach() for p in model.parameters()), torch.tensor([epoch.loss for epoch in history.epochs])]

    assert all(map(torch.equal, trained(0.0), trained(math.nan)))


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="what glibc does")
def test_one_batchs_memory_serves_the_next():
    """In a process of its own: in one that has run other tests, it depends on what those left in the heap."""
    code = """
import resource, torch
from cachefuse.training.loop import keep_freed_memory
keep_freed_memory()
begun = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20):
    torch.ones(10_000_000).add_(1)  # 40 MB: 9,766 pages
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - begun)
"""
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=600)
    assert int(found.stdout) < 10 * 9766  # of 20; a busy system may take some pages back meanwhile


def test_restores_the_best_epochs_weights(table):
    best, _ = train(table, epochs=2)
    model, history = train(table, scores=[0.1, 0.5, 0.5, 0.4, 0.2, 0.3], patience=10)
    assert [epoch.best for epoch in history.epochs] == [True, True, False, False, False, False]
    assert history.best_epoch == 2
    assert np.array_equal(weights(model), weights(best))


def test_stops_after_patience_epochs_without_a_better_score(table):
    _, history = train(table, scores=[0.1, 0.5, 0.4, 0.3, 0.5, 0.9])
    assert (len(history.epochs), history.best_epoch) == (5, 2)


def test_by_loss_the_lowest_validation_loss_is_the_best(table):
    """The scores say that the first epoch is best; the loss overfits to noise at this rate, and rises again."""
    noise = table_of(table.features["image"].numpy(), np.eye(3, dtype=np.uint8)[np.arange(40) % 3])
    best = {}
    for lr in (0.05, 3.0, 60.0):
        _, history = train(noise, scores=[0.9 - 0.1 * i for i in range(6)], patience=10, by_loss=True, lr=lr)
        losses = [epoch.val_loss for epoch in history.epochs]
        assert history.best_epoch == 1 + int(np.argmin(losses))
        best[lr] = history.best_epoch
    assert len({*best.values()}) > 1


def test_without_patience_the_last_epoch_stays(table):
    last, _ = train(table)
    model, history = train(table, scores=[0.9, 0.5, 0.4, 0.3, 0.2, 0.1], patience=0)
    assert (len(history.epochs), history.best_epoch) == (6, 6)
    assert np.array_equal(weights(model), weights(last))


def test_without_validation_trains_all_epochs(table):
    _, history = train(table, patience=2)
    assert (len(history.epochs), history.best_epoch) == (6, 6)
    assert {epoch.score for epoch in history.epochs} == {None}


def test_a_score_that_is_not_defined_counts_as_none(table):
    _, history = train(table, scores=[math.nan] * 6, patience=2)
    assert (len(history.epochs), history.best_epoch) == (6, 6)


@pytest.mark.parametrize(
    ("scores", "best", "n_epochs"),
    [
        ([0.5, 0.7, 0.4, 0.3, 0.6, math.nan], 2, 6),
        ([0.5, 0.7, math.nan, 0.6, 0.4, 0.3], 2, 6),
        ([0.5, 0.7, math.nan, 0.6, math.nan, 0.8], 6, 6),
        ([0.5, math.nan, math.nan, math.nan, math.nan, 0.9], 1, 5),
        ([math.nan, math.nan, 0.2, 0.1, 0.1, 0.1], 3, 6),
    ],
)
def test_a_number_is_better_than_a_score_that_is_not_defined(table, scores, best, n_epochs):
    _, history = train(table, scores=scores, patience=4)
    assert (history.best_epoch, len(history.epochs)) == (best, n_epochs)


def test_training_that_diverges_to_nan_is_an_error(table):
    huge = table_of(np.full((4, 5), 1e30, np.float32), np.ones((4, 3), np.uint8))
    with pytest.raises(TrainingError, match=r"epoch \d.*(nan|inf).*lr"):
        train(huge, lr=1e30, loss=lambda logits, targets: logits.square().mean())


def test_weights_that_diverge_in_the_last_step_are_an_error(table):
    with pytest.raises(TrainingError, match=naming("logits lr")):
        train(table, lr=3e38, epochs=1, loss=lambda logits, targets: 100 * bce(logits, targets))


def test_a_model_far_worse_than_saying_nothing_is_an_error(table):
    with pytest.raises(TrainingError, match=naming("loss 0 0.6931")):
        train(table, lr=1e6, epochs=1)


def test_a_first_batch_that_happens_to_be_easy_is_no_divergence():
    x = np.array([[8.0], [-1.0], [-1.0], [-1.0]], np.float32)
    table = table_of(x, np.array([[1], [1], [0], [1]], np.uint8))
    model = Probe(1, 1)
    nn.init.constant_(model.linear.weight, 1.0)
    nn.init.zeros_(model.linear.bias)
    optimization = Optimization(torch.optim.SGD(model.parameters(), lr=1e-3))
    history = fit(model, bce, Batches(table, torch.arange(4), 0, torch.Generator()), optimization, epochs=1)
    assert history.epochs[0].loss > 0.5


def interrupt_in(epoch):
    def on_epoch(done):
        if done.epoch == epoch:
            raise KeyboardInterrupt

    return on_epoch


def test_an_interrupt_keeps_the_best_epoch_so_far(table):
    best, _ = train(table, epochs=2)
    model, history = train(
        table, scores=[0.1, 0.5, 0.4, 0.9], patience=10, on_epoch=interrupt_in(3), keep_interrupted=True
    )
    assert history.interrupted
    assert (len(history.epochs), history.best_epoch) == (3, 2)
    assert np.array_equal(weights(model), weights(best))


def test_an_interrupt_in_the_middle_of_an_epoch_keeps_the_last_whole_one(table):
    whole, _ = train(table, epochs=1, batch_size=10)
    batches = iter(range(100))

    def loss(logits, targets):
        if torch.is_grad_enabled() and next(batches) == 6:
            raise KeyboardInterrupt
        return bce(logits, targets)

    model, history = train(table, batch_size=10, loss=loss, keep_interrupted=True)
    assert (history.interrupted, len(history.epochs), history.best_epoch) == (True, 1, 1)
    assert np.array_equal(weights(model), weights(whole))


def test_an_interrupt_before_the_first_epoch_is_over_is_passed_on(table):
    def loss(logits, targets):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(table, loss=loss, keep_interrupted=True)


def test_an_interrupt_before_anything_is_learnt_is_passed_on(table):
    with pytest.raises(KeyboardInterrupt):
        train(table, lr=1e6, on_epoch=interrupt_in(1), keep_interrupted=True)


def test_an_interrupt_is_passed_on_where_it_is_not_to_be_kept(table):
    with pytest.raises(KeyboardInterrupt):
        train(table, on_epoch=interrupt_in(3))


def test_logits_come_in_order_without_dropout(table):
    model = nn.Sequential()
    model.forward = lambda features, present: nn.functional.dropout(features["image"], 0.5, model.training)
    rows = torch.tensor([3, 1, 2])
    assert torch.equal(predict_logits(model.train(), table, rows), table.features["image"][rows])


def test_scores_are_probabilities():
    logits = torch.tensor([[0.0, 2.0], [100.0, -100.0]])
    assert torch.equal(to_scores(logits, "bce"), logits.sigmoid())
    assert to_scores(logits, "ce").sum(1).tolist() == pytest.approx([1, 1])


def test_many_rows_are_measured_in_parts(table, monkeypatch):
    logits, rows = torch.randn(30, 3), torch.arange(30).flip(0)
    expected = bce(logits, table.targets[rows].float()).item()
    assert mean_loss(bce, logits, table, rows) == expected
    seen = []

    def loss(x, targets):
        seen.append(len(x))
        return bce(x, targets)

    monkeypatch.setattr("cachefuse.training.inference.PIECE_FLOATS", 3 * 7)
    assert mean_loss(loss, logits, table, rows) == pytest.approx(expected, abs=1e-7)
    assert seen == [7, 7, 7, 7, 2]


def test_rows_are_measured_evenly_where_they_are_many():
    rows = torch.arange(100, 1100)
    assert torch.equal(spread(rows, 1000), rows)
    assert spread(rows, 4).tolist() == [100, 350, 600, 850]
    assert len(spread(rows, 999).unique()) == 999
