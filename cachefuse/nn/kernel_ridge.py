"""Kernel ridge regression in closed form: all classes and all penalties from one factorisation, with rows left out.

Rows are compared with m landmarks, some or all of the training rows (Nyström approximation: Williams and Seeger, "Using
the Nyström method to speed up kernel machines", 2000). With K (n, m) the kernel of rows and landmarks, and K_m (m, m)
of landmarks among themselves, the weights a (m, C) minimise |Y - mean(Y) - K a|^2 + penalty * a' K_m a.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

PENALTIES = (0.03, 0.3, 1.0, 3.0)
JITTER = 1e-5  # added to the diagonal of K_m, which equal rows make singular; kernels of float32 have errors of 1e-6
STEPS = 15  # of L-BFGS, for the weights of kernels
CLOSE = 3.0  # a normal prior on logarithms of weights of kernels: see ``kernel_weights``
PIECE = 4096  # rows of a kernel in memory at a time
PRIOR = 10.0  # of scales: see ``fit_logits``
SMALL = 0.01  # of a shift, which would be infinite for a class without positives
MAX_STEPS = 200  # of L-BFGS


@dataclass(frozen=True)
class KernelRidge:
    """The solution: f(x) = k(x) ``weights`` + ``bias``, with k(x) (m,) the kernel of a row and the landmarks.

    ``penalties`` (C,) are the chosen ones. ``left_out`` (k, C) are the values f of some training rows, each by the
    solution without the row and without the others of its group.
    """

    weights: Tensor
    bias: Tensor
    penalties: Tensor
    left_out: Tensor


@torch.no_grad()
def kernel_ridge(
    kernel: Callable[[Tensor], Tensor],
    landmarks: Tensor,
    targets: Tensor,
    *,
    measured: Tensor,
    groups: Tensor | None = None,
    penalties: Sequence[float] = PENALTIES,
) -> KernelRidge:
    """Solve for targets (n, C) of n rows; ``kernel`` returns K (b, m) of rows (b,), numbers below n, and landmarks.

    ``landmarks`` (m, m) is their own kernel. Of several penalties, each class gets the one with the least squared error
    of the values left out, of the ``measured`` rows (k,). A left-out value is y - r / (1 - h), with the residual r and
    the leverage h (Allen, "The relationship between variable selection and data augmentation", 1974). ``groups`` (n,)
    int64 number rows that are left out together: their h is a matrix. The mean of the targets is that of all rows.
    """
    targets = targets.double()
    bias = targets.mean(0)
    small = landmarks.double()
    small.diagonal().add_(JITTER * max(1.0, float(small.diagonal().mean())))
    root = torch.linalg.cholesky(small)

    def features(rows: Tensor) -> Tensor:  # (b, m), with the kernel as their products
        return torch.linalg.solve_triangular(root, kernel(rows).double().T, upper=False).T

    squares, products = torch.zeros_like(root), root.new_zeros(len(root), len(bias))
    for rows in torch.arange(len(targets), device=targets.device).split(PIECE):
        x = features(rows)
        squares.addmm_(x.T, x)
        products.addmm_(x.T, targets[rows] - bias)
    x, y = features(measured), targets[measured] - bias
    groups = None if groups is None else groups[measured]
    weights, residuals = torch.zeros_like(products), torch.full_like(y, torch.inf)
    chosen = torch.zeros_like(bias)
    for penalty in penalties:
        shrunk = squares.clone()
        shrunk.diagonal().add_(penalty)
        shrunk_root = torch.linalg.cholesky(shrunk)
        solution = torch.cholesky_solve(products, shrunk_root)  # (m, C)
        spread = torch.linalg.solve_triangular(shrunk_root, x.T, upper=False).T  # (k, m): H = spread spread'
        left_out = _left_out(y - x @ solution, 1 - spread.square().sum(1), partial(_rest, spread), groups)
        better = left_out.square().mean(0) < residuals.square().mean(0)
        weights[:, better], residuals[:, better], chosen[better] = solution[:, better], left_out[:, better], penalty
    weights = torch.linalg.solve_triangular(root.T, weights, upper=True)
    return KernelRidge(weights, bias, chosen, targets[measured] - residuals)


@torch.enable_grad()
def kernel_weights(kernels: Tensor, parts: Sequence[tuple[Tensor, Tensor]], groups: Tensor | None = None) -> Tensor:
    """Return the weights (M,) with which kernels (M, m, m) of rows among themselves add up to the best one.

    ``parts`` are tasks: the rows (k,) that have labels, and these (k, C). The weights have the least squared error of
    values left out, as in ``kernel_ridge``, over classes and with the penalty 1, and a normal prior on their logarithms
    (as in Chapelle et al., "Choosing multiple parameters for support vector machines", 2002). They are above 0.
    """
    kernels = kernels.double()
    logs = kernels.new_zeros(len(kernels)).requires_grad_()
    optimizer = torch.optim.LBFGS([logs], max_iter=STEPS, line_search_fn="strong_wolfe")
    tasks = []
    for rows, targets in parts:
        y = targets.double() - targets.double().mean(0)
        if y.square().sum() > 0:
            tasks.append((kernels[:, rows][:, :, rows], y, None if groups is None else groups[rows]))

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = CLOSE * logs.square().sum()
        for own, y, apart in tasks:
            shrunk = torch.tensordot(logs.exp(), own, 1)
            shrunk = shrunk + torch.eye(len(y)).to(shrunk)
            inverse = torch.cholesky_inverse(torch.linalg.cholesky(shrunk))
            left_out = _left_out(inverse @ y, inverse.diagonal(), partial(_block, inverse), apart)
            loss = loss + left_out.square().sum() * (len(y) / y.square().sum())
        loss.backward()
        return loss

    if tasks:
        optimizer.step(closure)
    return logs.detach().exp()


def _left_out(residuals: Tensor, diagonal: Tensor, block: Callable[[Tensor], Tensor], groups: Tensor | None) -> Tensor:
    """Return the residuals (k, C) of rows left out, from those of the fit, y - H y, or any multiple.

    ``diagonal`` (k,) is of 1 - H or the same multiple, and ``block`` returns its blocks (g, s, s) of rows (g, s).
    """
    alone = residuals / diagonal[:, None]
    if groups is None:
        return alone
    _, group, sizes = groups.unique(return_inverse=True, return_counts=True)
    order, starts = group.argsort(stable=True), sizes.cumsum(0) - sizes
    for size in sizes[sizes > 1].unique().tolist():
        members = order[starts[sizes == size][:, None] + torch.arange(size, device=order.device)]  # (g, size)
        for rows in members.split(max(1, PIECE // size)):
            alone[rows] = torch.linalg.solve(block(rows), residuals[rows])
    return alone


def _rest(spread: Tensor, rows: Tensor) -> Tensor:
    """Return blocks of 1 - ``spread spread'``."""
    hat = spread[rows] @ spread[rows].transpose(1, 2)
    return torch.eye(rows.shape[1]).to(hat) - hat


def _block(matrix: Tensor, rows: Tensor) -> Tensor:
    return matrix[rows[:, :, None], rows[:, None, :]]


def fit_logits(values: Tensor, targets: Tensor, one_label: bool = False) -> tuple[Tensor, Tensor]:
    """Return the scale (C,) and the shift (C,) with which ``values * scale + shift`` are logits of targets (n, C).

    They minimise the log loss: of a sigmoid per class (Platt, "Probabilistic outputs for support vector machines",
    1999), or of a softmax with one scale if each row has one label. A scale is above 0, so that it keeps the order of a
    class's values. Normal priors on logarithms draw that of a class towards the common one, and this towards logits of
    deviation 1. Targets are in [0, 1].
    """
    values, targets = values.double(), targets.double()
    size = 1 / values.std().clamp(min=1e-6)
    common, own, shift = (values.new_zeros(n).requires_grad_() for n in (1, values.shape[1], values.shape[1]))
    optimizer = torch.optim.LBFGS([common, own, shift], max_iter=MAX_STEPS, line_search_fn="strong_wolfe")

    def scale() -> Tensor:
        return size * (common if one_label else common + own).exp()

    def closure() -> Tensor:
        optimizer.zero_grad()
        logits = values * scale() + shift
        if one_label:
            loss = F.cross_entropy(logits, targets, reduction="sum")
        else:
            loss = F.binary_cross_entropy_with_logits(logits, targets, reduction="sum")
        priors = PRIOR * (own.square().sum() + common.square().sum()) + SMALL * shift.square().sum()
        loss = (loss + priors) / len(values)
        loss.backward()
        return loss

    with torch.enable_grad():
        optimizer.step(closure)
    return scale().detach().expand(values.shape[1]).clone(), shift.detach()
