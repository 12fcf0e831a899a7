"""Features that are absent in some rows, and tokens that are padding."""

from torch import Tensor


def zero_absent(x: Tensor, present: Tensor) -> Tensor:
    """Set what is absent of ``x`` (..., D) to 0; ``present`` (...) is bool: rows that are there, or real tokens."""
    if present.device.type == "cpu" and present.all():  # a copy less; on a GPU to ask would be to wait
        return x
    # Filled, not multiplied: whatever an absent row holds, NaN included, stays out of the logits and the gradients.
    return x.masked_fill(~present.unsqueeze(-1), 0)


def masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    """Return the mean (B, W) over the real tokens of (B, T, W); whatever padding holds stays out of it."""
    if x.shape[1] == 1:
        return x[:, 0]
    return x.masked_fill(~mask.unsqueeze(-1), 0).sum(1) / mask.sum(1, keepdim=True).clamp(min=1)
