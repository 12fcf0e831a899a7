"""Losses, ``loss(logits, targets, *, ..., reduction="mean")``, in float32 or float64, and class weights.

``contrastive`` differs from the others: it compares two batches of embeddings, without labels. The others take logits
and targets (B, C); multi-class targets are one-hot, so all losses share one signature. For finite logits, every loss
and its gradient are finite. ``reduction`` is "mean", "sum" or "none".
"""

import inspect
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from cachefuse.errors import ConfigError
from cachefuse.nn import LOSSES, TARGETS
from cachefuse.registry import Options, lookup

Loss = Callable[[Tensor, Tensor], Tensor]  # logits (B, C) and targets (B, C) -> a number, or one per row

BETA = 0.999  # of the effective number of samples, which is then below 1,000 for each class
CLASS_WEIGHTS = ("balanced", "effective")
TINY_NORM = 1e-6  # a shorter vector has no direction: its gradient would be rounding error
REDUCTIONS = {"mean": torch.mean, "none": lambda loss: loss, "sum": torch.sum}


def probe_loss(loss: Loss) -> None:
    """Take the loss of three rows, to see errors of a loss before a training. Raises ValueError for a wrong shape."""
    value = loss(torch.zeros(3, 2), torch.eye(3, 2))
    if value.shape:
        raise ValueError(f"must return one number, the mean over rows. Got the shape {tuple(value.shape)} instead")


def bce(logits: Tensor, targets: Tensor, *, reduction: str = "mean") -> Tensor:
    """Return the binary cross-entropy, averaged over batch and classes.

    Raises ConfigError if the shapes differ, UnknownNameError for an unknown reduction.
    """
    logits, targets = _as_floats(logits, targets)
    lookup(REDUCTIONS, reduction, "reduction")
    return F.binary_cross_entropy_with_logits(logits, targets, reduction=reduction)


def focal(logits: Tensor, targets: Tensor, *, gamma: float = 3.0, reduction: str = "mean") -> Tensor:
    """Return the focal loss, -y (1 - p)^gamma log p - (1 - y) p^gamma log(1 - p), averaged over batch and classes.

    arXiv 1708.02002, equation 4, without alpha weighting; gamma = 3 as in "Multimodal multilabel classification with
    CLIP". Raises ConfigError if gamma is negative or the shapes differ, UnknownNameError for an unknown reduction.
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
    over batch and classes (``reduction="sum"``), and its gradient treats the two powers as constants. The gradient here
    is the derivative of the formula.

    Raises ConfigError if a gamma is negative, clip is outside [0, 1) or the shapes differ, UnknownNameError for an
    unknown reduction.
    """
    if min(gamma_negative, gamma_positive) < 0 or not 0 <= clip < 1:
        raise ConfigError(
            "gamma_negative and gamma_positive must be at least 0 and clip in [0, 1). "
            f"Got {gamma_negative}, {gamma_positive} and {clip} instead."
        )
    logits, targets = _as_floats(logits, targets)
    neg_log_p, neg_log_not_p = F.softplus(-logits), F.softplus(logits)  # -log p and -log(1 - p)
    # Powers are exp(gamma * log): their gradients are finite if p underflows. For gamma 0 they are 1 and are skipped.
    positive = torch.exp(-gamma_positive * neg_log_not_p) * neg_log_p if gamma_positive else neg_log_p
    if clip:
        not_p_m = (torch.sigmoid(-logits) + clip).clamp(max=1)
        # p_m is 0 for every easy negative, and a power below 1 has no derivative at 0: clamp just above it.
        p_m = (1 - not_p_m).clamp(min=torch.finfo(torch.float32).tiny)
        negative = -(p_m**gamma_negative) * torch.log(not_p_m)
    else:
        negative = torch.exp(-gamma_negative * neg_log_p) * neg_log_not_p if gamma_negative else neg_log_not_p
    return _reduce(torch.lerp(negative, positive, targets), reduction)


def cross_entropy(logits: Tensor, targets: Tensor, *, smoothing: float = 0.0, reduction: str = "mean") -> Tensor:
    """Return the softmax cross-entropy with one-hot targets (B, C), averaged over the batch; "none" gives (B,).

    ``smoothing`` is the share of each target that is spread evenly over all classes. Raises ConfigError if it is
    outside [0, 1) or the shapes differ, UnknownNameError for an unknown reduction.
    """
    if not 0 <= smoothing < 1:
        raise ConfigError(f"smoothing must be in [0, 1). Got {smoothing} instead.")
    logits, targets = _as_floats(logits, targets)
    return _reduce(F.cross_entropy(logits, targets, label_smoothing=smoothing, reduction="none"), reduction)


def contrastive(
    x: Tensor, y: Tensor, temperature: Tensor | float, *, targets: str = "soft", detach: bool = True
) -> Tensor:
    """Return the symmetric contrastive loss of M pairs (x_i, y_i), x and y (M, D), with cosine similarities.

    "Context-Based Multimodal Fusion", equations 3 to 6: L = 1 / (2 M) sum_ij t_ij l1_ij + t_ji l2_ij, where
    l1_ij = -log softmax_j(<x_i, y_j> / T), l2_ij = -log softmax_j(<y_i, x_j> / T), and the soft targets are
    t_ij = softmax_j((<x_i, x_j> + <y_i, y_j>) / (2 T)): similar pairs are not full negatives. Soft targets come from
    the current embeddings; with ``detach`` no gradient passes through them. Hard targets are the identity: InfoNCE
    (arXiv 1807.03748) in both directions. Float64 stays float64.

    Equation 5 prints "/ 2 . T". Soft targets read it as a division by 2 T, so that targets and scores have the same
    temperature. "printed" targets read it from left to right, half the sum times T: for a T below 1 they are nearly
    equal for all pairs. Its numerator has x and y, its denominator the embeddings; both are the embeddings here.

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
    similar = (x @ x.T + y @ y.T) / 2
    t = (similar * temperature if targets == "printed" else similar / temperature).softmax(1)
    t = t.detach() if detach else t
    return ((t * l1).sum() + (t.T * l2).sum()) / (2 * len(x))


def build_loss(name: str, options: Options, weights: Tensor | None = None) -> Loss:
    """Return ``loss(logits, targets)`` with its options set, weighted by ``weights`` of ``class_weights`` if given.

    Raises UnknownNameError for an unknown loss, ConfigError for an unknown option.
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
        losses = loss(logits, targets, **{**options, "reduction": "none"})  # (B, C), or (B,) for a softmax
        if weights.ndim == 1:
            # The mean of the row's label weights: a softmax's loss sums over the labels already.
            of_row = (targets * weights.to(losses.device)).sum(1) / targets.sum(1).clamp(min=TINY_NORM)  # (B,)
            return _reduce(losses * (of_row if losses.ndim == 1 else of_row.unsqueeze(1)), reduction)
        negative, positive = weights.to(losses.device)  # (C,) each
        return _reduce(losses * torch.lerp(negative, positive, targets.to(negative)), reduction)

    return weighted


def per_task(
    losses: Sequence[tuple[slice, Loss]],
) -> Loss:
    """Return the mean loss of several tasks, ``loss(logits, targets)``, given each task's columns of (B, C) and loss.

    A task's loss is over its labelled rows: targets are -1 in rows without its label. It is 0 without labelled rows.
    """

    def loss(logits: Tensor, targets: Tensor) -> Tensor:
        total = logits.sum() * 0  # has a gradient, and the logits' device, even without labels
        for columns, task_loss in losses:
            labelled = targets[:, columns.start] >= 0  # (B,)
            if labelled.any():
                total = total + task_loss(logits[labelled, columns], targets[labelled, columns])
        return total / len(losses)

    return loss


def class_weights(targets: Tensor, kind: str, task: str) -> Tensor:
    """Return weights from the counts n of labels in ``targets`` (N, C): (2, C) for multi-label, (C,) for multi-class.

    "balanced" weights are proportional to 1 / n, "effective" weights to (1 - b) / (1 - b^n), with b = 0.999 (arXiv
    1901.05555, equation 2). In multi-label, they balance the negatives and positives of each class, (2, C). In
    multi-class, they balance the classes: (C,) weights a row by its class. The mean weight is 1. Raises ConfigError for
    an unknown kind.
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


def _as_floats(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    # Different shapes would broadcast to a wrong loss without an error.
    if logits.ndim != 2 or logits.shape != targets.shape:
        raise ConfigError(
            "logits and targets must both have shape (B, C). "
            f"Got {tuple(logits.shape)} and {tuple(targets.shape)} instead."
        )
    logits = logits if logits.dtype == torch.float64 else logits.float()
    return logits, targets.to(logits)


def _reduce(loss: Tensor, reduction: str) -> Tensor:
    return lookup(REDUCTIONS, reduction, "reduction")(loss)
