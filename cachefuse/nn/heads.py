"""Heads map one vector per sample, or its tokens, to logits. Before them, ``Standardize`` standardises the features.

Every head is ``Head(width, classes, *, layers=(), activation="gelu", dropout=0.0, n_tokens=0)`` and maps (B, D) to
(B, C). ``n_tokens`` is the number of tokens side by side in the width; 0 for a pooled feature. Training uses a head's
``default_layers`` if no layers are given.
"""

from typing import ClassVar

import torch
from torch import Tensor, nn

from cachefuse.errors import ConfigError
from cachefuse.nn import ACTIVATIONS
from cachefuse.store.rows import FeatureRows
from cachefuse.store.tokens import Tokens

FIT_ROWS, FIT_FLOATS = 4096, 2**24  # most to convert to float64 at a time: 128 MB
FIT_TOKENS = 2**20  # about the most tokens to compute statistics from


class Linear(nn.Linear):
    """One linear layer, a linear probe; activation, dropout and n_tokens have no effect.

    Raises ConfigError if ``layers`` are given.
    """

    default_layers: ClassVar[tuple[int, ...]] = ()

    def __init__(
        self,
        width: int,
        classes: int,
        *,
        layers: tuple[int, ...] = (),
        activation: str = "gelu",
        dropout: float = 0.0,
        n_tokens: int = 0,
    ):
        if layers:
            raise ConfigError(
                f"head 'linear' has no hidden layers. Got {tuple(layers)} instead; head 'mlp' takes them."
            )
        super().__init__(width, classes)


class MLP(nn.Module):
    """Linear, activation and dropout for each hidden width in ``layers``, then a Linear to the classes.

    It reads tokens like a vector: ``n_tokens`` has no effect.
    Raises ConfigError for layers or dropout out of range, UnknownNameError for an unknown activation.
    """

    default_layers: ClassVar[tuple[int, ...]] = (512,)

    def __init__(
        self,
        width: int,
        classes: int,
        *,
        layers: tuple[int, ...] = (),
        activation: str = "gelu",
        dropout: float = 0.0,
        n_tokens: int = 0,
    ):
        super().__init__()
        _check(layers, dropout)
        act = ACTIVATIONS[activation]
        modules: list[nn.Module] = []
        for hidden in layers:
            modules += [nn.Linear(width, hidden), act(), Dropout(dropout)]
            width = hidden
        self.layers = nn.Sequential(*modules, nn.Linear(width, classes))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


class GatedMLP(nn.Module):
    """A gated block for each (even) hidden width in ``layers``, then a Linear to the classes.

    gMLP (arXiv 2105.08050) gates along the tokens. With ``n_tokens`` this head does so too, and classifies the mean of
    the tokens. A pooled feature has no token axis, so its gate acts along the channels: see ``SpatialGate`` and
    ``ChannelGate``. Raises ConfigError for layers or dropout out of range, UnknownNameError for an unknown activation.
    """

    default_layers: ClassVar[tuple[int, ...]] = (512,)

    def __init__(
        self,
        width: int,
        classes: int,
        *,
        layers: tuple[int, ...] = (),
        activation: str = "gelu",
        dropout: float = 0.0,
        n_tokens: int = 0,
    ):
        super().__init__()
        _check(layers, dropout)
        if any(hidden % 2 for hidden in layers):
            raise ConfigError(
                f"layers of head 'gmlp' must be even: it splits them in halves. Got {tuple(layers)} instead."
            )
        act = ACTIVATIONS[activation]
        self.n_tokens = n_tokens
        width = width // (n_tokens or 1)
        self.blocks = nn.Sequential(*(GatedBlock(width, hidden, act(), dropout, n_tokens) for hidden in layers))
        self.classify = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        if not self.n_tokens:
            return self.classify(self.blocks(x))
        return self.classify(self.blocks(x.unflatten(-1, (self.n_tokens, -1))).mean(-2))


class GatedBlock(nn.Module):
    """x + W2 s(act(W1 x)), where the gate s halves the channels (arXiv 2105.08050, section 2)."""

    def __init__(self, width: int, hidden: int, activation: nn.Module, dropout: float, n_tokens: int = 0):
        super().__init__()
        self.expand = nn.Linear(width, hidden)
        self.activation = activation
        self.gate = SpatialGate(hidden, n_tokens) if n_tokens else ChannelGate(hidden)
        self.dropout = Dropout(dropout)
        self.project = nn.Linear(hidden // 2, width)

    def forward(self, x: Tensor) -> Tensor:
        z = self.activation(self.expand(x))  # (B, H)
        s = self.gate(z)  # (B, H / 2)
        return x + self.project(self.dropout(s))  # (B, D)


class ChannelGate(nn.Module):
    """s(z) = u * (LN(v) W + b), with (u, v) the halves of z's channels: (B, H) to (B, H / 2).

    The gating unit of arXiv 2105.08050, section 2.1, with W along the channels instead of the tokens. It starts with W
    near 0 and b = 1, so the gate starts as the identity on u.
    """

    def __init__(self, hidden: int):
        super().__init__()
        half = hidden // 2
        self.norm = nn.LayerNorm(half)
        self.linear = nn.Linear(half, half)
        nn.init.uniform_(self.linear.weight, -1e-3 / half, 1e-3 / half)
        nn.init.ones_(self.linear.bias)

    def forward(self, z: Tensor) -> Tensor:
        u, v = z.chunk(2, dim=-1)  # (B, H / 2) each
        return u * self.linear(self.norm(v))


class SpatialGate(nn.Module):
    """s(z) = u * (W LN(v) + b), with (u, v) the halves of z's channels: (B, T, H) to (B, T, H / 2), W along the tokens.

    The gating unit of arXiv 2105.08050, equation 3. It starts with W uniform within 1e-3 / T and b = 1.
    """

    def __init__(self, hidden: int, tokens: int):
        super().__init__()
        self.norm = nn.LayerNorm(hidden // 2)
        self.linear = nn.Linear(tokens, tokens)
        nn.init.uniform_(self.linear.weight, -1e-3 / tokens, 1e-3 / tokens)
        nn.init.ones_(self.linear.bias)

    def forward(self, z: Tensor) -> Tensor:
        u, v = z.chunk(2, dim=-1)  # (B, T, H / 2) each
        return u * self.linear(self.norm(v).transpose(-1, -2)).transpose(-1, -2)


class Dropout(nn.Dropout):
    """Dropout with cheap masks on a CPU, where torch's masks take longer than the GEMM of the layer before.

    16 random bits decide on each value: the rate is ``p`` to within 2^-17.
    """

    def forward(self, x: Tensor) -> Tensor:
        if x.device.type != "cpu" or not self.training or not self.p:
            return super().forward(x)
        dropped = min(round(self.p * 2**16), 2**16 - 1)  # of the 2^16 values of the bits
        bits = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(-(2**63), None)
        bits = bits.view(torch.int16)[: x.numel()].view(x.shape)
        keep = torch.ge(bits, dropped - 2**15, out=torch.empty_like(x))  # 0 or 1, in x's dtype
        return x * keep.mul_(2**16 / (2**16 - dropped))


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


def _check(layers: tuple[int, ...], dropout: float) -> None:
    if any(hidden < 1 for hidden in layers):
        raise ConfigError(f"layers must have a width of at least 1. Got {tuple(layers)} instead.")
    if not 0 <= dropout < 1:
        raise ConfigError(f"dropout must be in [0, 1). Got {dropout} instead.")
