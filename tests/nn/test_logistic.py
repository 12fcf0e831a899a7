"""Logistic regression against scikit-learn."""

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss

from cachefuse.nn.logistic import FOLDS, PENALTIES, logistic, solve

N, D, C = 240, 12, 3


@pytest.fixture
def data():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(N, D, generator=generator, dtype=torch.float64)
    signal = x @ torch.randn(D, C, generator=generator, dtype=torch.float64) + torch.tensor([0.0, -2.0, -4.0])
    return x, signal + torch.randn(N, C, generator=generator)


def reference(penalty):
    return LogisticRegression(C=1 / penalty, tol=1e-10, max_iter=10_000)


@pytest.mark.parametrize("penalty", [0.01, 0.3, 10.0])
def test_classes_are_those_of_the_library(data, penalty):
    x, signal = data
    y = (signal > 0).double()
    weights, bias = solve(x, y, [penalty], torch.ones(1, N, dtype=torch.bool), close=1e-7, steps=5000)
    for c in range(C):
        model = reference(penalty).fit(x, y[:, c])
        np.testing.assert_allclose(weights[0, 0, :, c], model.coef_[0], atol=2e-3)
        np.testing.assert_allclose(bias[0, 0, c], model.intercept_[0], atol=2e-3)


def test_one_label_is_that_of_the_library(data):
    x, signal = data
    labels = signal.argmax(1)
    y = torch.nn.functional.one_hot(labels, C).double()
    weights, bias = solve(x, y, [0.5], torch.ones(1, N, dtype=torch.bool), True, close=1e-7, steps=5000)
    shares = (x @ weights[0, 0] + bias[0, 0]).softmax(1)
    np.testing.assert_allclose(shares, reference(0.5).fit(x, labels).predict_proba(x), atol=1e-3)


def test_each_set_of_rows_and_each_penalty_is_solved_on_its_own(data):
    x, signal = data
    y = (signal > 0).double()
    learnt = torch.stack([torch.arange(N) % 3 != k for k in range(2)])
    weights, bias = solve(x, y, [0.1, 5.0], learnt, close=1e-7, steps=5000)
    for k in range(2):
        for i, penalty in enumerate((0.1, 5.0)):
            model = reference(penalty).fit(x[learnt[k]], y[learnt[k], 0])
            np.testing.assert_allclose(weights[k, i, :, 0], model.coef_[0], atol=2e-3)
            np.testing.assert_allclose(bias[k, i, 0], model.intercept_[0], atol=2e-3)


def test_the_penalty_has_the_least_loss_on_rows_left_out(data):
    x, signal = data
    y = (signal > 0).double()
    fold = torch.randperm(N, generator=torch.Generator().manual_seed(3)) % FOLDS
    losses = []
    for penalty in PENALTIES:
        total = 0.0
        for k in range(FOLDS):
            for c in range(C):
                model = reference(penalty).fit(x[fold != k], y[fold != k, c])
                total += log_loss(y[fold == k, c], model.predict_proba(x[fold == k])[:, 1], normalize=False)
        losses.append(total)
    assert logistic(x, y, seed=3).penalty == PENALTIES[int(np.argmin(losses))]


def test_groups_are_left_out_together():
    """Rows and their copies: apart, the copies would ask for no penalty."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(60, 40, generator=generator, dtype=torch.float64).repeat(4, 1)
    y = (torch.rand(60, C, generator=generator) < 0.5).double().repeat(4, 1)
    groups = torch.arange(60).repeat(4)
    assert logistic(x, y).penalty < logistic(x, y, groups=groups).penalty == max(PENALTIES)


def test_a_class_that_all_rows_or_none_have_is_finite(data):
    x, _ = data
    y = torch.zeros(N, 2, dtype=torch.float64)
    y[:, 1] = 1
    found = logistic(x, y)
    probabilities = (x @ found.weights + found.bias).sigmoid()
    assert probabilities.isfinite().all()
    assert (probabilities[:, 0] < 0.05).all()
    assert (probabilities[:, 1] > 0.95).all()
