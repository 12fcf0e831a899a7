"""L2-regularised logistic regression: all classes, penalties and folds at once, each step two matrix products.

For targets Y (n, C), weights W (D, C) and biases minimise sum log loss(Y, X W + b) + penalty / 2 |W|^2, as in
scikit-learn with C = 1 / penalty. The second derivative of the log loss is at most 1/4 for a sigmoid, and 1/2 for a
softmax (Böhning, "Multinomial logistic regression algorithm", 1992). So one factorisation per penalty gives a step that
never overshoots, for all rows and columns; momentum makes the steps longer (Nesterov, 1983), and starts again where it
leads uphill (O'Donoghue and Candès, "Adaptive restart for accelerated gradient schemes", 2015).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

PENALTIES = (0.03, 0.1, 0.3, 1.0, 3.0)
FOLDS = 3  # that choose the penalty
CLOSE, STEPS = 1e-4, 500  # of a solution: the largest change of a step relative to the weights, and the most steps
ROUGH = 3e-3  # of solutions that only choose the penalty
SURE = 15.0  # logits of the shares of a class, at most, to start with


@dataclass(frozen=True)
class Logistic:
    """The solution: logits are x ``weights`` (D, C) + ``bias`` (C,). ``penalty`` is the chosen one."""

    weights: Tensor
    bias: Tensor
    penalty: float


@torch.no_grad()
def logistic(
    x: Tensor,
    targets: Tensor,
    *,
    one_label: bool = False,
    groups: Tensor | None = None,
    seed: int = 0,
    penalties: Sequence[float] = PENALTIES,
) -> Logistic:
    """Fit rows (n, D) and targets (n, C): a softmax if each row has one label, else a sigmoid per class.

    The penalty has the lowest log loss on rows left out, of ``FOLDS`` folds; rows of one of the ``groups`` (n,) int64
    are in one fold.
    """
    chosen = penalties[0]
    if len(penalties) > 1:
        fold = _folds(len(x), groups, seed)
        learnt = torch.stack([fold != k for k in range(FOLDS)])  # (F, n)
        weights, bias = solve(x, targets, penalties, learnt, one_label, ROUGH)
        losses = torch.zeros(len(penalties), dtype=torch.float64, device=x.device)
        for k in range(FOLDS):
            out = ~learnt[k]
            for i in range(len(penalties)):
                losses[i] += _loss(x[out] @ weights[k, i] + bias[k, i], targets[out], one_label)
        chosen = penalties[int(losses.argmin())]
    everything = torch.ones(1, len(x), dtype=torch.bool, device=x.device)
    weights, bias = solve(x, targets, [chosen], everything, one_label)
    return Logistic(weights[0, 0], bias[0, 0], chosen)


@torch.no_grad()
def solve(
    x: Tensor,
    targets: Tensor,
    penalties: Sequence[float],
    learnt: Tensor,
    one_label: bool = False,
    close: float = CLOSE,
    steps: int = STEPS,
) -> tuple[Tensor, Tensor]:
    """Return weights (F, P, D, C) and biases (F, P, C) for P penalties, learnt from rows (F, n) bool of x (n, D)."""
    (n, width), n_classes, n_sets, n_penalties = x.shape, targets.shape[1], len(learnt), len(penalties)
    targets = targets.to(x.dtype)
    x = torch.cat([x, x.new_ones(n, 1)], dim=1)
    squares = (x.T @ x).double().mul_(0.5 if one_label else 0.25)
    decay = x.new_ones(width + 1)
    decay[-1] = 0  # the bias
    roots = []
    for penalty in penalties:
        bound = squares + torch.diag(penalty * decay.double() + 1e-6)
        roots.append(torch.linalg.cholesky(bound).to(x.dtype))
    factors = x.new_tensor(penalties)[:, None] * decay  # (P, D + 1)
    rows = learnt.T.to(x.dtype)[:, :, None, None]  # (n, F, 1, 1)
    w = x.new_zeros(n_penalties, width + 1, n_sets, n_classes)
    shares = (learnt.to(x.dtype) @ targets) / learnt.sum(1, keepdim=True).clamp(min=1)  # (F, C)
    w[:, -1] = shares.log().clamp(-SURE) if one_label else torch.logit(shares).clamp(-SURE, SURE)
    ahead, momentum = w.clone(), x.new_ones(n_penalties, 1, n_sets, n_classes)
    for _ in range(steps):
        logits = torch.einsum("nd,pdfc->nfpc", x, ahead)
        wrong = (logits.softmax(-1) if one_label else logits.sigmoid_()) - targets[:, None, None, :]
        slopes = torch.einsum("nd,nfpc->pdfc", x, wrong * rows) + factors[:, :, None, None] * ahead
        flat = slopes.reshape(n_penalties, width + 1, -1)
        change = torch.stack([torch.cholesky_solve(g, root) for g, root in zip(flat, roots, strict=True)])
        new = ahead - change.view_as(w)
        moved = new - w
        uphill = (slopes * moved).sum(1, keepdim=True) > 0
        momentum = torch.where(uphill, torch.ones_like(momentum), momentum)
        longer = (1 + (1 + 4 * momentum.square()).sqrt()) / 2
        ahead = new + (momentum - 1) / longer * moved
        w, momentum = new, longer
        if float(moved.abs().max()) <= close * max(1e-3, float(w[:, :-1].abs().max())):
            break
    w = w.permute(2, 0, 1, 3)  # (F, P, D + 1, C)
    return w[:, :, :-1], w[:, :, -1]


def _folds(n: int, groups: Tensor | None, seed: int) -> Tensor:
    """Return the fold of each of n rows, (n,)."""
    generator = torch.Generator().manual_seed(seed)
    if groups is None:
        return torch.randperm(n, generator=generator) % FOLDS
    _, group = groups.cpu().unique(return_inverse=True)
    return (torch.randperm(int(group.max()) + 1, generator=generator) % FOLDS)[group]


def _loss(logits: Tensor, targets: Tensor, one_label: bool) -> Tensor:
    """Return the sum of the log loss."""
    logits, targets = logits.double(), targets.double()
    if one_label:
        return torch.nn.functional.cross_entropy(logits, targets, reduction="sum")
    return torch.nn.functional.binary_cross_entropy_with_logits(logits, targets, reduction="sum")
