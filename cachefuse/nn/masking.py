"""Masks of absent features and of padding tokens."""

from torch import Tensor


def zero_absent(x: Tensor, present: Tensor) -> Tensor:
    """Set absent vectors of ``x`` (..., D) to 0; ``present`` (...) bool is True for present rows or real tokens."""
    if present.device.type == "cpu" and present.all():  # saves a copy; on a GPU the check would wait for the kernel
        return x
    # Filled, not multiplied: values of absent rows, even NaN, must not reach logits or gradients.
    return x.masked_fill(~present.unsqueeze(-1), 0)


def masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    """Return the mean (B, W) over the real tokens of (B, T, W); values of padding, even NaN, have no effect."""
    if x.shape[1] == 1:
        return x[:, 0]
    return x.masked_fill(~mask.unsqueeze(-1), 0).sum(1) / mask.sum(1, keepdim=True).clamp(min=1)
