"""Losses: ``loss(logits, targets, *, ..., reduction="mean")``, in float32 whatever the inputs' dtype; class weights.

``contrastive`` is apart from the others: it compares two batches of embeddings, and has no labels. Elsewhere logits and
targets are (B, C); multi-class targets are one-hot, so that all losses share one signature. Every loss and its gradient
is finite wherever the logits are. ``reduction`` is "mean", "sum" or "none".
"""

import inspect
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from cachefuse.errors import ConfigError
from cachefuse.nn import LOSSES, TARGETS
from cachefuse.registry import Options, lookup

Loss = Callable[[Tensor, Tensor], Tensor]  # logits (B, C) and targets (B, C) -> a number, or one a row

BETA = 0.999  # of the effective number of samples: a class counts for at most 1,000 of its rows
CLASS_WEIGHTS = ("balanced", "effective")
TINY_NORM = 1e-6  # below it a vector has no direction, and its gradient would be one of rounding
REDUCTIONS = {"mean": torch.mean, "none": lambda loss: loss, "sum": torch.sum}


def bce(logits: Tensor, targets: Tensor, *, reduction: str = "mean") -> Tensor:
    """Return the binary cross-entropy, the mean over batch and classes.

    Raises ConfigError if the shapes differ, UnknownNameError for an unknown reduction.
    """
    logits, targets = _as_float32(logits, targets)
    lookup(REDUCTIONS, reduction, "reduction")
    return F.binary_cross_entropy_with_logits(logits, targets, reduction=reduction)


def focal(logits: Tensor, targets: Tensor, *, gamma: float = 3.0, reduction: str = "mean") -> Tensor:
    """Return the focal loss, -y (1 - p)^gamma log p - (1 - y) p^gamma log(1 - p), the mean over batch and classes.

    arXiv 1708.02002, equation 4: no alpha weighting; gamma = 3 is the choice of "Multimodal multilabel classification
    with CLIP". Raises ConfigError if gamma is negative or the shapes differ, UnknownNameError for an unknown reduction.
    """
    if gamma < 0:
        raise ConfigError(f"gamma must be at least 0. Got {gamma} instead.")
    return asl(logits, targets, gamma_negative=gamma, gamma_positive=gamma, clip=0.0, reduction=reduction)


def asl(
    logits: Tensor,
    targets: Tensor,
    *,
    gamma_negative: float = 4.0,
    gamma_positive: float = 1.0,
    clip: float = 0.05,
    reduction: str = "mean",
) -> Tensor:
    """Return the asymmetric loss, -y (1 - p)^g+ log p - (1 - y) p_m^g- log(1 - p_m), with p_m = max(p - clip, 0).

    arXiv 2009.14119; equations 4 and 5 of "Multimodal multilabel classification with CLIP". The ASL authors' code sums
    over batch and classes (``reduction="sum"``), and takes the two powers as constants in the gradient; this one is the
    derivative of the formula.

    Raises ConfigError if a gamma is negative, clip outside [0, 1) or the shapes differ, UnknownNameError for an unknown
    reduction.
    """
    if min(gamma_negative, gamma_positive) < 0 or not 0 <= clip < 1:
        raise ConfigError(
            "gamma_negative and gamma_positive must be at least 0 and clip in [0, 1). "
            f"Got {gamma_negative}, {gamma_positive} and {clip} instead."
        )
    logits, targets = _as_float32(logits, targets)
    of_positive, of_negative = F.softplus(-logits), F.softplus(logits)  # -log p and -log(1 - p)
    # Powers are taken as exp(gamma * log): finite gradients where p underflows. For gamma 0 they are 1, and cost none.
    positive = torch.exp(-gamma_positive * of_negative) * of_positive if gamma_positive else of_positive
    if clip:
        not_p_m = (torch.sigmoid(-logits) + clip).clamp(max=1)
        # p_m is 0 for every easy negative, where a power below 1 has no derivative: stop just short of it.
        p_m = (1 - not_p_m).clamp(min=torch.finfo(torch.float32).tiny)
        negative = -(p_m**gamma_negative) * torch.log(not_p_m)
    else:
        negative = torch.exp(-gamma_negative * of_positive) * of_negative if gamma_negative else of_negative
    return _reduce(torch.lerp(negative, positive, targets), reduction)


def cross_entropy(logits: Tensor, targets: Tensor, *, smoothing: float = 0.0, reduction: str = "mean") -> Tensor:
    """Return the softmax cross-entropy with one-hot targets (B, C), the mean over the batch; "none" gives (B,).

    ``smoothing`` moves that share of each target to all classes evenly. Raises ConfigError if it is outside [0, 1) or
    the shapes differ, UnknownNameError for an unknown reduction.
    """
    if not 0 <= smoothing < 1:
        raise ConfigError(f"smoothing must be in [0, 1). Got {smoothing} instead.")
    logits, targets = _as_float32(logits, targets)
    return _reduce(F.cross_entropy(logits, targets, label_smoothing=smoothing, reduction="none"), reduction)


def contrastive(
    x: Tensor, y: Tensor, temperature: Tensor | float, *, targets: str = "soft", detach: bool = True
) -> Tensor:
    """Return the symmetric contrastive loss of M pairs (x_i, y_i): x and y are (M, D), compared by their cosines.

    "Context-Based Multimodal Fusion", equations 3 to 6: L = 1 / (2 M) sum_ij t_ij l1_ij + t_ji l2_ij, where
    l1_ij = -log softmax_j(<x_i, y_j> / T), l2_ij = -log softmax_j(<y_i, x_j> / T), and the soft targets are
    t_ij = softmax_j((<x_i, x_j> + <y_i, y_j>) / (2 T)): pairs that resemble one another are no full negatives. They are
    taken of the embeddings as they are, and with ``detach`` no gradient passes through them. Hard targets are the
    identity: InfoNCE (arXiv 1807.03748) both ways. Float64 stays float64.

    Raises ConfigError if the shapes differ or for other targets.
    """
    if x.ndim != 2 or x.shape != y.shape:
        raise ConfigError(f"x and y must both have shape (M, D). Got {tuple(x.shape)} and {tuple(y.shape)} instead.")
    if targets not in TARGETS:
        raise ConfigError(f"targets must be one of {', '.join(TARGETS)}. Got {targets!r} instead.")
    x, y = (F.normalize(e if e.dtype == torch.float64 else e.float(), dim=1, eps=TINY_NORM) for e in (x, y))
    scores = x @ y.T / temperature  # (M, M)
    l1, l2 = -scores.log_softmax(1), -scores.T.log_softmax(1)
    if targets == "hard":
        return (l1.diagonal().mean() + l2.diagonal().mean()) / 2
    t = ((x @ x.T + y @ y.T) / (2 * temperature)).softmax(1)
    t = t.detach() if detach else t
    return ((t * l1).sum() + (t.T * l2).sum()) / (2 * len(x))


def build_loss(name: str, options: Options, weights: Tensor | None = None) -> Loss:
    """Return ``loss(logits, targets)`` with its options set, and classes weighted by ``class_weights`` where given.

    Raises UnknownNameError for an unknown loss, ConfigError for an option that it does not take.
    """
    loss = LOSSES[name]
    known = [key for key in inspect.signature(loss).parameters if key not in ("logits", "targets")]
    for key in options:
        if key not in known:
            raise ConfigError(f"loss {name!r} has no option {key!r}; it takes: {', '.join(known)}")
    if weights is None:
        return lambda logits, targets: loss(logits, targets, **options)
    reduction = options.get("reduction", "mean")

    def weighted(logits: Tensor, targets: Tensor) -> Tensor:
        each = loss(logits, targets, **{**options, "reduction": "none"})  # (B, C), or (B,) of a softmax
        if weights.ndim == 1:
            # The mean of its labels' weights: a softmax's loss has their sum already.
            of_row = (targets * weights.to(each.device)).sum(1) / targets.sum(1).clamp(min=TINY_NORM)  # (B,)
            return _reduce(each * (of_row if each.ndim == 1 else of_row.unsqueeze(1)), reduction)
        absent, present = weights.to(each.device)  # (C,) each
        return _reduce(each * torch.lerp(absent, present, targets.to(absent)), reduction)

    return weighted


def per_task(
    losses: Sequence[tuple[slice, Loss]],
) -> Loss:
    """Return ``loss(logits, targets)`` of several tasks: the mean of each one's, given with its columns of (B, C).

    A task's loss is over the rows that have its label, those whose targets in its columns are not -1; 0 if none has.
    """

    def loss(logits: Tensor, targets: Tensor) -> Tensor:
        total = logits.sum() * 0  # has a gradient, and the logits' device, also where no row has any label
        for columns, own in losses:
            here = targets[:, columns.start] >= 0  # (B,)
            if here.any():
                total = total + own(logits[here, columns], targets[here, columns])
        return total / len(losses)

    return loss


def class_weights(targets: Tensor, kind: str, task: str) -> Tensor:
    """Return weights by numbers n in ``targets`` (N, C): of each class's negatives and positives, (2, C), or (C,).

    "balanced": proportional to 1 / n; "effective": to (1 - b) / (1 - b^n), with b = 0.999 (arXiv 1901.05555, equation
    2). In multi-label each class balances its own negatives and positives. In multi-class the classes balance one
    another, and (C,) is what a row of each weighs. The mean weight is 1. Raises ConfigError for another kind.
    """
    if kind not in CLASS_WEIGHTS:
        raise ConfigError(f"class weights must be one of {', '.join(CLASS_WEIGHTS)}. Got {kind!r} instead.")
    positives = targets.sum(0, dtype=torch.float64)
    counts = torch.stack([len(targets) - positives, positives])  # (2, C)
    effective = counts if kind == "balanced" else (1 - BETA**counts) / (1 - BETA)
    inverse = torch.where(counts > 0, 1 / effective.clamp(min=1), 0)
    if task == "multiclass":
        inverse, counts = inverse[1], counts[1]
        return (inverse * len(targets) / (inverse * counts).sum()).float()
    return (inverse * len(targets) / (inverse * counts).sum(0)).float()


def _as_float32(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    # Shapes that differ would broadcast to a loss that looks like one.
    if logits.ndim != 2 or logits.shape != targets.shape:
        raise ConfigError(
            "logits and targets must both have shape (B, C). "
            f"Got {tuple(logits.shape)} and {tuple(targets.shape)} instead."
        )
    return logits.float(), targets.float()


def _reduce(loss: Tensor, reduction: str) -> Tensor:
    return lookup(REDUCTIONS, reduction, "reduction")(loss)
