"""Heads map one vector per sample, or its tokens, to logits.

Every head is ``Head(width, classes, *, layers=(), activation="gelu", dropout=0.0, n_tokens=0)`` and maps (B, D) to
(B, C). ``n_tokens`` is the number of tokens side by side in the width; 0 for a pooled feature. Training uses a head's
``default_layers`` if no layers are given.
"""

from collections.abc import Mapping
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from cachefuse.errors import ConfigError
from cachefuse.nn import ACTIVATIONS


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
    """x + W2 s(act(W1 LN(x))), where the gate s halves the channels (arXiv 2105.08050, section 2 and its code).

    Weights that were saved before the block had LN load too: the block is then as it was.
    """

    def __init__(self, width: int, hidden: int, activation: nn.Module, dropout: float, n_tokens: int = 0):
        super().__init__()
        self.norm: nn.Module = nn.LayerNorm(width)
        self.expand = nn.Linear(width, hidden)
        self.activation = activation
        self.gate = SpatialGate(hidden, n_tokens) if n_tokens else ChannelGate(hidden)
        self.dropout = Dropout(dropout)
        self.project = nn.Linear(hidden // 2, width)
        cast(Any, self).register_load_state_dict_pre_hook(_without_norm)

    def forward(self, x: Tensor) -> Tensor:
        z = self.activation(self.expand(self.norm(x)))  # (B, H)
        s = self.gate(z)  # (B, H / 2)
        return x + self.project(self.dropout(s))  # (B, D)


def _without_norm(block: nn.Module, state: Mapping[str, Tensor], prefix: str, *_: object) -> None:
    """Remove the input norm of a block whose weights lack it."""
    if f"{prefix}expand.weight" in state and not any(key.startswith(f"{prefix}norm.") for key in state):
        block.norm = nn.Identity()


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


def _check(layers: tuple[int, ...], dropout: float) -> None:
    if any(hidden < 1 for hidden in layers):
        raise ConfigError(f"layers must have a width of at least 1. Got {tuple(layers)} instead.")
    if not 0 <= dropout < 1:
        raise ConfigError(f"dropout must be in [0, 1). Got {dropout} instead.")
