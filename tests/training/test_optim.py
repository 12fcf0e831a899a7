import math

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from sklearn.linear_model import LogisticRegression
from torch import nn

from cachefuse.feature_spec import pooled_specs
from cachefuse.fusion.base import Model
from cachefuse.nn.losses import bce, cross_entropy
from cachefuse.training import OPTIMIZERS, SCHEDULES
from cachefuse.training.batches import Batches
from cachefuse.training.feature_table import FeatureTable
from cachefuse.training.loop import Optimization, fit
from cachefuse.training.optim import LBFGS, NesterovSGD, adam, adamw, constant, cosine, onecycle

N, D, C = 120, 5, 3


class Probe(Model):
    """A linear model of one modality."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(D, C)

    def forward(self, features, present):
        return self.linear(features["image"])


@pytest.fixture
def data():
    """Features (N, D) and labels that they do not separate."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(N, D))
    return x, x @ rng.normal(size=(D, C)) + 2 * rng.normal(size=(N, C))


def table_of(x, targets):
    return FeatureTable(
        features={"image": torch.tensor(x, dtype=torch.float32)},
        specs=pooled_specs({"image": x.shape[1]}),
        present={"image": torch.ones(len(x), dtype=torch.bool)},
        targets=torch.tensor(targets.astype(np.uint8)),
        labelled=np.ones(len(x), bool),
        splits=np.array(["train"] * len(x)),
    )


def train(table, loss, make, epochs, schedule=constant, batch_size=0):
    torch.manual_seed(0)
    model = Probe()
    optimizer = make(model.parameters())
    scheduled = schedule(optimizer, epochs * -(-len(table.targets) // (batch_size or len(table.targets))))
    history = fit(
        model,
        loss,
        Batches(table, torch.arange(len(table.targets)), batch_size, torch.Generator().manual_seed(0)),
        Optimization(optimizer, scheduled),
        epochs=epochs,
    )
    return model.linear, history, scheduled


@pytest.mark.parametrize("weight_decay", [1e-3, 0.1])
class TestLBFGS:
    def test_multi_label_optimum_is_scikit_learns(self, data, weight_decay):
        """Each label is a logistic regression; the mean over N rows and C labels makes its C 1 / (N C decay).

        The bias is penalised like the weights, so that for scikit-learn it is the weight of a feature of ones.
        """
        x, signal = data
        y = signal > 0
        linear, _, _ = train(table_of(x, y), bce, lambda p: LBFGS(p, weight_decay=weight_decay), epochs=10)
        ones = np.concatenate([x, np.ones((N, 1))], axis=1)
        for c in range(C):
            theirs = LogisticRegression(C=1 / (N * C * weight_decay), fit_intercept=False, tol=1e-10, max_iter=10_000)
            coefficients = theirs.fit(ones, y[:, c]).coef_[0]
            ours = [*linear.weight[c].tolist(), linear.bias[c].item()]
            np.testing.assert_allclose(ours, coefficients, atol=2e-3 * np.abs(coefficients).max())

    def test_multi_class_optimum_is_scikit_learns(self, data, weight_decay):
        x, signal = data
        y = signal.argmax(axis=1)
        table = table_of(x, np.eye(C)[y])
        linear, _, _ = train(table, cross_entropy, lambda p: LBFGS(p, weight_decay=weight_decay), epochs=10)
        ones = np.concatenate([x, np.ones((N, 1))], axis=1)
        theirs = LogisticRegression(C=1 / (N * weight_decay), fit_intercept=False, tol=1e-10, max_iter=10_000)
        coefficients = theirs.fit(ones, y).coef_
        ours = torch.cat([linear.weight, linear.bias[:, None]], dim=1).detach().numpy()
        np.testing.assert_allclose(ours, coefficients, atol=2e-3 * np.abs(coefficients).max())

    def test_the_loss_that_it_tells_has_the_penalty(self, data, weight_decay):
        x, signal = data
        y = (signal > 0).astype(float)

        def objective(flat):
            w, b = flat[: C * D].reshape(C, D), flat[C * D :]
            z = x @ w.T + b
            return np.mean(np.logaddexp(0, z) - y * z) + weight_decay / 2 * np.square(flat).sum()

        best = minimize(objective, np.zeros(C * D + C), method="BFGS", options={"gtol": 1e-8})
        _, history, _ = train(table_of(x, y), bce, lambda p: LBFGS(p, weight_decay=weight_decay), epochs=10)
        assert history.epochs[-1].loss == pytest.approx(best.fun, rel=1e-5)
        assert [epoch.loss for epoch in history.epochs] == sorted((e.loss for e in history.epochs), reverse=True)


def test_lbfgs_gets_further_in_a_step_than_adam_in_many(data):
    x, signal = data
    table = table_of(x, signal > 0)
    _, few, _ = train(table, bce, LBFGS, epochs=3)
    _, many, _ = train(table, bce, lambda p: adam(p, lr=1e-3), epochs=100)
    assert few.epochs[-1].loss < many.epochs[-1].loss


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (adam, torch.optim.Adam),
        (adamw, torch.optim.AdamW),
        (NesterovSGD, lambda p, lr, weight_decay: torch.optim.SGD(p, lr, 0.9, 0, weight_decay, nesterov=True)),
    ],
    ids=["adam", "adamw", "sgd"],
)
def test_the_others_are_torchs(data, ours, theirs):
    x, signal = data
    results = []
    for make in (ours, theirs):
        linear, _, _ = train(
            table_of(x, signal > 0), bce, lambda p, make=make: make(p, lr=0.05, weight_decay=0.1), 20, batch_size=50
        )
        results.append(linear.weight.detach().numpy())
    np.testing.assert_allclose(*results, atol=1e-5)


@pytest.mark.parametrize("name", sorted(OPTIMIZERS))
def test_every_optimizer_lowers_the_loss(data, name):
    x, signal = data
    make = OPTIMIZERS[name]
    _, history, _ = train(table_of(x, signal > 0), bce, lambda p: make(p, lr=0.05, weight_decay=0.0), epochs=5)
    assert history.epochs[-1].loss < history.epochs[0].loss


def rates(schedule, steps, lr=0.1, optimizer=torch.optim.SGD):
    """The learning rate of each step, and that after the last."""
    optimizer = optimizer([nn.Parameter(torch.zeros(1))], lr=lr)
    scheduled = schedule(optimizer, steps)
    seen = []
    for _ in range(steps):
        seen.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduled.step()
    return [*seen, optimizer.param_groups[0]["lr"]]


@pytest.mark.parametrize("steps", [1, 2, 3, 7, 100])
def test_cosine_ends_at_zero(steps):
    expected = [0.05 * (1 + math.cos(math.pi * t / steps)) for t in range(steps + 1)]
    assert rates(cosine, steps) == pytest.approx(expected, abs=1e-9)
    assert rates(cosine, steps)[-1] == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("steps", [*range(1, 25), 100, 1000])
def test_onecycle_has_a_rate_for_every_step(steps):
    seen = rates(onecycle, steps)
    assert len(seen) == steps + 1
    assert 0 <= min(seen) < max(seen) <= 0.1 + 1e-9
    assert seen[-1] < 1e-5
    peak = int(np.argmax(seen))
    assert seen[: peak + 1] == sorted(seen[: peak + 1])
    assert seen[peak:] == sorted(seen[peak:], reverse=True)


@pytest.mark.parametrize("steps", [100, 1000])
def test_onecycle_peaks_at_the_learning_rate_after_three_tenths(steps):
    seen = rates(onecycle, steps)
    assert max(seen) == pytest.approx(0.1, rel=2e-3)
    assert np.argmax(seen) == pytest.approx(0.3 * steps, abs=1)
    assert seen[0] == pytest.approx(0.1 / 25)


def test_constant_stays():
    assert set(rates(constant, 5)) == {0.1}


@pytest.mark.parametrize("schedule", sorted(SCHEDULES))
@pytest.mark.parametrize("batch_size", [0, 1, 50, 119, 120, 121])
@pytest.mark.parametrize("epochs", [1, 3])
def test_the_loop_takes_as_many_steps_as_a_schedule_is_told(data, schedule, batch_size, epochs):
    x, signal = data
    taken = SCHEDULES[schedule]
    table = table_of(x, signal > 0)
    _, _, scheduled = train(table, bce, lambda p: adam(p, lr=0.01), epochs, schedule=taken, batch_size=batch_size)
    steps = epochs * {0: 1, 1: 120, 50: 3, 119: 2, 120: 1, 121: 1}[batch_size]
    assert scheduled.last_epoch == steps
    expected = {"constant": 0.01, "cosine": 0, "onecycle": 0.01 / 25e4}[schedule]
    assert scheduled.get_last_lr()[0] == pytest.approx(expected, rel=1e-3, abs=1e-12)
