"""Kernel ridge regression against scikit-learn, and the values of rows left out against solutions without them."""

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from sklearn.kernel_ridge import KernelRidge as Reference
from sklearn.metrics.pairwise import rbf_kernel

from cachefuse.nn.kernel_ridge import CLOSE, fit_logits, kernel_ridge, kernel_weights

N, C = 40, 3


@pytest.fixture
def rows():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(N, 4))
    y = (x[:, :C] + 0.5 * rng.normal(size=(N, C)) > 0).astype(float)
    return rbf_kernel(x), y


def solve(kernel, y, landmarks=None, **options):
    kernel, y = torch.from_numpy(kernel), torch.from_numpy(y)
    landmarks = torch.arange(len(y)) if landmarks is None else torch.as_tensor(landmarks)
    options = {"measured": torch.arange(len(y)), **options}
    return kernel_ridge(lambda at: kernel[at][:, landmarks], kernel[landmarks][:, landmarks], y, **options)


@pytest.mark.parametrize("penalty", [0.3, 3.0])
def test_all_rows_as_landmarks_are_as_in_scikit_learn(rows, penalty):
    kernel, y = rows
    solution = solve(kernel, y, penalties=[penalty])
    reference = Reference(alpha=penalty, kernel="precomputed").fit(kernel, y - y.mean(0))
    ours = kernel @ solution.weights.numpy() + solution.bias.numpy()
    np.testing.assert_allclose(ours, reference.predict(kernel) + y.mean(0), atol=1e-4)
    assert solution.penalties.tolist() == [penalty] * C


def test_weights_of_kernels_have_the_least_error_left_out(rows):
    kernel, y = rows
    kernels, groups = np.stack([kernel, rbf_kernel(np.random.default_rng(1).normal(size=(N, 4)))]), np.arange(N) // 2

    def loss(logs):
        total, left_out = np.tensordot(np.exp(logs), kernels, 1), y - y.mean(0)
        for group in range(N // 2):
            out, rest = groups == group, groups != group
            reference = Reference(alpha=1.0, kernel="precomputed").fit(total[np.ix_(rest, rest)], (y - y.mean(0))[rest])
            left_out[out] -= reference.predict(total[np.ix_(out, rest)])
        return N * (left_out**2).sum() / ((y - y.mean(0)) ** 2).sum() + CLOSE * (logs**2).sum()

    parts = [(torch.arange(N), torch.from_numpy(y))]
    weights = kernel_weights(torch.from_numpy(kernels), parts, torch.from_numpy(groups)).numpy()
    best = minimize(loss, np.zeros(2), method="Nelder-Mead", options={"xatol": 1e-4, "fatol": 1e-6})
    assert loss(np.log(weights)) < best.fun + 1e-3
    assert weights[0] > weights[1]


def test_few_landmarks_solve_the_normal_equations(rows):
    kernel, y = rows
    few = [3, 8, 20, 31]
    solution = solve(kernel, y, few, penalties=[0.5])
    k, small = kernel[:, few], kernel[np.ix_(few, few)]
    weights = np.linalg.solve(k.T @ k + 0.5 * small, k.T @ (y - y.mean(0)))
    np.testing.assert_allclose(solution.weights.numpy(), weights, atol=1e-3)


@pytest.mark.parametrize("size", [1, 2, 5])
def test_left_out_values_are_those_without_the_group(rows, size):
    kernel, y = rows
    groups = torch.arange(N) // size
    solution = solve(kernel, y, penalties=[1.0], groups=groups)
    for group in groups.unique():
        out, rest = (groups == group).numpy(), (groups != group).numpy()
        reference = Reference(alpha=1.0, kernel="precomputed").fit(kernel[np.ix_(rest, rest)], (y - y.mean(0))[rest])
        value = reference.predict(kernel[np.ix_(out, rest)]) + y.mean(0)
        np.testing.assert_allclose(solution.left_out.numpy()[out], value, atol=1e-3)


def test_groups_of_several_sizes_in_any_order(rows):
    kernel, y = rows
    groups = torch.from_numpy(np.random.default_rng(1).integers(0, 12, N) * 7)
    left_out = solve(kernel, y, penalties=[1.0], groups=groups).left_out.numpy()
    for group in groups.unique():
        out, rest = (groups == group).numpy(), (groups != group).numpy()
        reference = Reference(alpha=1.0, kernel="precomputed").fit(kernel[np.ix_(rest, rest)], (y - y.mean(0))[rest])
        np.testing.assert_allclose(left_out[out], reference.predict(kernel[np.ix_(out, rest)]) + y.mean(0), atol=1e-3)


def test_each_class_gets_the_penalty_with_the_least_error_left_out(rows):
    kernel, y = rows
    y = np.column_stack([y[:, 0], np.random.default_rng(2).integers(0, 2, N)])  # the second cannot be learnt
    penalties = [0.1, 1.0, 100.0]
    errors = []
    for penalty in penalties:
        errors.append(((solve(kernel, y, penalties=[penalty]).left_out.numpy() - y) ** 2).mean(0))
    chosen = solve(kernel, y, penalties=penalties)
    assert chosen.penalties.tolist() == np.array(penalties)[np.argmin(errors, axis=0)].tolist()
    assert chosen.penalties[1] > chosen.penalties[0]
    np.testing.assert_allclose(((chosen.left_out.numpy() - y) ** 2).mean(0), np.min(errors, axis=0))


def test_equal_rows_and_a_kernel_of_float32_can_be_solved(rows):
    kernel, y = rows
    twice = np.tile(kernel, (2, 2)).astype(np.float32)
    solution = solve(twice, np.tile(y, (2, 1)))
    assert solution.weights.isfinite().all()
    assert solution.left_out.isfinite().all()


def test_only_measured_rows_are_left_out(rows):
    kernel, y = rows
    some = torch.tensor([2, 5, 30])
    every, few = solve(kernel, y, penalties=[1.0]), solve(kernel, y, penalties=[1.0], measured=some)
    torch.testing.assert_close(few.left_out, every.left_out[some])
    torch.testing.assert_close(few.weights, every.weights)


def log_loss(y, logits):
    return (np.logaddexp(0, logits) - y * logits).sum()


def test_logits_of_one_class_minimise_the_log_loss():
    rng = np.random.default_rng(0)
    values = rng.normal(size=(2000, 1))
    y = (rng.random((2000, 1)) < 1 / (1 + np.exp(1 - 3 * values))).astype(float)
    scale, shift = fit_logits(torch.from_numpy(values), torch.from_numpy(y))
    best = minimize(lambda p: log_loss(y, values * p[0] + p[1]), np.zeros(2)).x
    np.testing.assert_allclose([scale[0], shift[0]], best, rtol=0.05)  # but for the priors


def test_a_class_with_few_positives_gets_nearly_the_common_scale():
    rng = np.random.default_rng(0)
    values = rng.normal(size=(500, 3))
    y = (rng.random((500, 3)) < 1 / (1 + np.exp(-4 * values))).astype(float)
    y[:, 2] = 0
    y[values[:, 2].argmax(), 2] = 1  # of this one alone, no finite scale is the best
    scale, shift = (x.numpy() for x in fit_logits(torch.from_numpy(values), torch.from_numpy(y)))
    assert 0.5 < scale[2] / scale[:2].mean() < 2
    assert np.isfinite(shift).all()


def test_scales_are_above_zero_where_values_tell_nothing():
    rng = np.random.default_rng(0)
    values, y = torch.from_numpy(rng.normal(size=(300, 2))), torch.from_numpy(rng.integers(0, 2, (300, 2)))
    scale, shift = fit_logits(values, y)
    assert (scale > 0).all()
    torch.testing.assert_close(shift.sigmoid(), y.double().mean(0), atol=0.05, rtol=0)


def test_a_softmax_has_one_scale():
    rng = np.random.default_rng(0)
    values = rng.normal(size=(3000, 4))
    odds = np.exp(2.5 * values + [0, 1, 0, -1])
    label = [rng.choice(4, p=row / row.sum()) for row in odds]
    scale, shift = fit_logits(torch.from_numpy(values), torch.eye(4)[label], one_label=True)
    torch.testing.assert_close(scale, torch.full((4,), 2.5).double(), atol=0.2, rtol=0)
    torch.testing.assert_close(shift - shift.mean(), torch.tensor([0, 1, 0, -1.0]).double(), atol=0.25, rtol=0)
