"""L-BFGS trains scikit-learn's logistic regression: the same objective, with an intercept that is not penalised.

scikit-learn minimises C * sum of losses + |w|^2 / 2, cachefuse mean of losses + weight_decay / 2 * |w|^2. So
weight_decay = 1 / (C n) for ce, and 1 / (C n K) for bce, which is a mean over K classes too.
"""

import numpy as np
import pytest
from sklearn.datasets import load_breast_cancer, load_digits, load_iris, load_wine, make_classification
from sklearn.linear_model import LogisticRegression

from cachefuse import FusionClassifier

EXACT = {"tol": 1e-13, "max_iter": 10_000, "solver": "newton-cholesky"}


def few_rows(n, X, y):
    return X[:: len(X) // n], y[:: len(X) // n]


def imbalanced():
    return make_classification(400, 12, n_informative=6, n_classes=3, weights=[0.9, 0.07, 0.03], random_state=0)


DATA = {
    "random": lambda: make_classification(300, 10, n_informative=5, n_classes=4, random_state=1),
    "imbalanced": imbalanced,
    "iris": lambda: load_iris(return_X_y=True),
    "wine": lambda: load_wine(return_X_y=True),
    "breast_cancer": lambda: load_breast_cancer(return_X_y=True),
    "digits": lambda: few_rows(300, *load_digits(return_X_y=True)),
}


def trained(x, targets, c, loss, class_weights="none", **settings):
    """Weights (K, D) and biases (K,) of the linear head."""
    n, k = len(x), targets.shape[1] if targets.ndim == 2 else 1
    classifier = FusionClassifier(
        fusion="concat", head="linear", optimizer="lbfgs", loss=loss, weight_decay=1 / (c * n * k), thresholds="none",
        class_weights=class_weights, **settings,
    ).fit(x, targets)  # fmt: skip
    head = classifier.models_[0].fusion.head
    return head.weight.detach().double().numpy(), head.bias.detach().double().numpy()


def standardised(x):
    """Float64 (n, D) of mean 0 and population deviation 1; a constant column is 0."""
    x = x.astype(np.float64)
    deviation = x.std(axis=0)
    return (x - x.mean(axis=0)) / np.where(deviation > 0, deviation, 1)


def assert_equal(ours, theirs):
    for mine, reference in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(mine, reference, rtol=0, atol=1e-4)


def logistic(c, x, y, class_weight=None):
    model = LogisticRegression(C=c, class_weight=class_weight, **EXACT).fit(x, y)
    return model.coef_, model.intercept_


def one_by_one(c, x, targets, class_weight=None):
    """A logistic regression a column of the targets."""
    columns = [logistic(c, x, column, class_weight) for column in targets.T]
    return np.concatenate([w for w, _ in columns]), np.concatenate([b for _, b in columns])


@pytest.mark.parametrize(
    "name", [name if name != "digits" else pytest.param(name, marks=pytest.mark.slow) for name in DATA]
)
@pytest.mark.parametrize("c", [0.01, pytest.param(1.0, marks=pytest.mark.slow), 100.0])
def test_one_label_equals_multinomial_logistic_regression(name, c):
    x, y = DATA[name]()
    x = x.astype(np.float32)
    weights, biases = trained(x, y, c, "ce")
    if len(weights) == 2:  # two columns of a softmax: the difference has half of both columns' penalty
        weights, biases, c = weights[1:] - weights[:1], biases[1:] - biases[:1], 2 * c
    assert_equal((weights, biases), logistic(c, standardised(x), y))


@pytest.mark.parametrize("name", DATA)
@pytest.mark.parametrize("c", [0.01, pytest.param(1.0, marks=pytest.mark.slow), 10.0])
def test_several_labels_equal_a_logistic_regression_each(name, c):
    x, y = DATA[name]()
    x, targets = x.astype(np.float32), (y[:, None] == np.arange(y.max() + 1)).astype(int)
    assert_equal(trained(x, targets, c, "bce"), one_by_one(c, standardised(x), targets))


def test_balanced_class_weights_are_scikit_learns():
    x, y = imbalanced()
    x, targets = x.astype(np.float32), (y[:, None] == np.arange(3)).astype(int)
    ours = trained(x, y, 1.0, "ce", class_weights="balanced")
    assert_equal(ours, logistic(1.0, standardised(x), y, "balanced"))
    ours = trained(x, targets, 1.0, "bce", class_weights="balanced")
    assert_equal(ours, one_by_one(1.0, standardised(x), targets, "balanced"))


def test_the_seed_does_not_matter():
    x, y = load_iris(return_X_y=True)
    first, second = (trained(x.astype(np.float32), y, 1.0, "ce", random_state=seed) for seed in (0, 1))
    assert_equal(first, second)


def test_without_features_that_help_the_intercept_gives_the_frequencies():
    """A penalised intercept would give probabilities nearer to a half: its calibration is wrong."""
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(500, 3)).astype(np.float32), (np.arange(500) < 25).astype(int)
    classifier = FusionClassifier(head="linear", fusion="concat", optimizer="lbfgs", weight_decay=10.0).fit(x, y)
    assert classifier.predict_proba(x)[:, 1].mean() == pytest.approx(0.05, abs=1e-5)


def test_all_parameters_decay_if_asked():
    x, y = load_iris(return_X_y=True)
    weights, biases = trained(x.astype(np.float32), y, 0.01, "ce", decay="all")
    z, one_hot, decay = standardised(x), np.eye(3)[y], 1 / (0.01 * len(x))
    logits = z @ weights.T + biases
    p = np.exp(logits - logits.max(1, keepdims=True))
    error = (p / p.sum(1, keepdims=True) - one_hot) / len(x)
    assert np.abs(error.sum(0) + decay * biases).max() < 1e-6
    assert np.abs(error.T @ z + decay * weights).max() < 1e-6


@pytest.mark.parametrize("shift", [30, 1000])
@pytest.mark.parametrize("c", [0.01, 1.0, 100.0])
def test_features_far_from_0_are_no_worse(shift, c, caplog):
    """Without standardisation too: only the intercept depends on where they are."""
    rng = np.random.default_rng(7)
    x, y = (rng.normal(size=(60, 6)) + shift).astype(np.float32), np.arange(60) % 3
    weights, biases = trained(x, y, c, "ce", standardize="none")
    model = LogisticRegression(C=c, **EXACT).fit(x.astype(np.float64), y)
    np.testing.assert_allclose(weights, model.coef_, atol=2e-5)
    np.testing.assert_allclose(biases, model.intercept_, atol=1e-4)
    assert "minimum" not in caplog.text


def test_a_stop_before_the_minimum_is_said(caplog):
    x = np.random.default_rng(7).normal(size=(60, 6)) * [1e-4, 1e4, 1, 10, 1e3, 0.1]
    trained(x.astype(np.float32), np.arange(60) % 3, 100.0, "ce", standardize="none", epochs=1)
    assert "before the minimum" in caplog.text
