"""What is done to stored features before a model reads them: (..., D), any float dtype, to float32."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cachefuse.errors import ConfigError
from cachefuse.store.rows import FeatureRows
from cachefuse.store.tokens import Tokens

FIT_ROWS, FIT_FLOATS = 4096, 2**24  # most to convert to float64 at a time: 128 MB
FIT_TOKENS = 2**20  # about the most tokens to compute statistics from


class Standardize(nn.Module):
    """Scale features to mean 0 and standard deviation 1 in each dimension: (..., D), any float dtype, to float32.

    It is the identity until ``fit``. A dimension is dead if it varies by at most half a step of its dtype at its mean:
    the variation is rounding. Its scale is 0, so all its outputs are 0.
    """

    mean: Tensor
    scale: Tensor

    def __init__(self, width: int):
        super().__init__()
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("scale", torch.ones(width))

    @torch.no_grad()
    def fit(self, x: FeatureRows | Tokens, rows: Tensor | None = None) -> "Standardize":
        """Compute mean and standard deviation of ``x`` (N, D), or of its ``rows`` (n,) int64, and return self.

        Of many tokens (N, T_i, D) it uses an even sample of the rows. It works in float64 and in chunks: a large
        float16 memory map is read once and never converted whole. Raises ConfigError if there are no rows or tokens,
        or a value is not finite.
        """
        rows = torch.arange(x.shape[0], device=x.device) if rows is None else rows.to(x.device)
        if isinstance(x, Tokens):
            most = max(1, FIT_TOKENS // x.n_tokens)
            chunks = x.chunks(rows[torch.arange(most) * len(rows) // most] if len(rows) > most else rows)
        else:
            chunk_rows = max(1, min(FIT_ROWS, FIT_FLOATS // x.shape[1]))
            chunks = (x.index_select(0, some_rows) for some_rows in rows.split(chunk_rows))
        total, squares = self.mean.new_zeros((2, len(self.mean)), dtype=torch.float64)
        precision, count = torch.finfo(torch.float32).eps, 0
        for chunk in chunks:
            count += len(chunk)
            precision = max(precision, torch.finfo(chunk.dtype).eps)
            values = chunk.to(total)
            total += values.sum(0)
            squares += values.square().sum(0)
        if not count:
            raise ConfigError("features to standardise have no rows")
        if not squares.isfinite().all():
            bad = int((~squares.isfinite()).nonzero()[0])
            raise ConfigError(f"features to standardise must be finite; dimension {bad} of {len(squares)} is not")
        mean = total / count
        # In a dimension that is not dead, the difference cancels at most 14 of float64's 16 digits.
        std = (squares / count - mean.square()).clamp(min=0).sqrt()
        half_a_step = mean.abs().clamp(min=torch.finfo(torch.float16).tiny) * (precision / 2)
        self.mean.copy_(mean)
        self.scale.copy_(torch.where(std > half_a_step, 1 / std, 0))
        return self

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.mean).mul_(self.scale).float()


class UnitRows(nn.Module):
    """Scale each row, or each token, to length 1. Rows of zeros stay zero."""

    def __init__(self, width: int):
        super().__init__()

    def fit(self, x: FeatureRows | Tokens, rows: Tensor | None = None) -> "UnitRows":
        """Return self: a row does not depend on others."""
        return self

    def forward(self, x: Tensor) -> Tensor:
        return F.normalize(x.float(), dim=-1)


class Unscaled(nn.Module):
    """Leave features as they are."""

    def __init__(self, width: int):
        super().__init__()

    def fit(self, x: FeatureRows | Tokens, rows: Tensor | None = None) -> "Unscaled":
        """Return self: there is nothing to fit."""
        return self

    def forward(self, x: Tensor) -> Tensor:
        return x.float()


SCALINGS: dict[str, type[Standardize | UnitRows | Unscaled]] = {
    "features": Standardize,
    "rows": UnitRows,
    "none": Unscaled,
}
