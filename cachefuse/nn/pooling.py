"""Poolings reduce tokens to a fixed number of tokens, from "Where to fuse", sections 1.3.3 and 2.2.

Every pooling is ``Pooling(width, n_tokens)``. It maps tokens (B, T, D), T at least 1, with a mask (B, T) of the real
ones, to K tokens (B, K, D) with a mask (B, K). A sample without tokens gets a mask of False and tokens of 0. Padding
has no effect, for any length and any values, even NaN.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cachefuse.errors import ConfigError
from cachefuse.feature_spec import FeatureSpec
from cachefuse.nn import ATTENTION_HEADS, POOLINGS
from cachefuse.nn.masking import zero_absent
from cachefuse.nn.named import NamedModules
from cachefuse.printable import listed

PoolSpec = str | Mapping[str, Any]  # "image=attention:14", or the same as a table
Pooled = tuple[Tensor, Tensor]  # tokens (B, K, D) and their mask (B, K)


class _Pooling(nn.Module):
    """Base class with K, the number of output tokens. Raises ConfigError if K is below 1."""

    def __init__(self, width: int, n_tokens: int):
        super().__init__()
        if n_tokens < 1:
            raise ConfigError(f"pooling must keep at least 1 token. Got {n_tokens} instead.")
        self.n_tokens = n_tokens

    def _output_mask(self, mask: Tensor) -> Tensor:
        """Return the mask (B, K) of the output tokens."""
        return mask.any(1, keepdim=True).expand(-1, self.n_tokens)


class _SpanPool(_Pooling, ABC):
    """Pool K consecutive spans of a sample's real tokens, of nearly equal length.

    Span k of n tokens is from floor(k n / K) up to ceil((k + 1) n / K), as in adaptive pooling. Spans overlap by a
    token if n is no multiple of K; they repeat tokens if n is below K.
    """

    def forward(self, x: Tensor, mask: Tensor) -> Pooled:
        k, n = torch.arange(self.n_tokens, device=x.device), mask.sum(1, keepdim=True)  # (K,), (B, 1)
        start, end = k * n // self.n_tokens, -(-(k + 1) * n // self.n_tokens)  # (B, K) each
        output_mask = self._output_mask(mask)
        return zero_absent(self.reduce(x, mask, start, end), output_mask), output_mask

    @abstractmethod
    def reduce(self, x: Tensor, mask: Tensor, start: Tensor, end: Tensor) -> Tensor:
        """Reduce tokens (B, T, D) to (B, K, D); span k holds the real tokens from start up to end, (B, K) each."""


class MeanPool(_SpanPool):
    """The mean of each span (equation 14); with K = 1, the mean of all tokens."""

    def reduce(self, x: Tensor, mask: Tensor, start: Tensor, end: Tensor) -> Tensor:
        place = (mask.cumsum(1) - 1).unsqueeze(1)  # (B, 1, T), among the real tokens
        inside = (start.unsqueeze(-1) <= place) & (place < end.unsqueeze(-1)) & mask.unsqueeze(1)  # (B, K, T)
        # One product reads every token once; gathering the spans would copy all tokens.
        shares = inside.to(x.dtype) / (end - start).clamp(min=1).unsqueeze(-1)
        return shares @ zero_absent(x, mask)


class MaxPool(_SpanPool):
    """The maximum of each span, in each dimension (equation 15)."""

    def reduce(self, x: Tensor, mask: Tensor, start: Tensor, end: Tensor) -> Tensor:
        longest = mask.shape[1]
        # The most tokens in a span, computed from shapes only: reading the mask would wait for the GPU.
        length = min(longest, -(-longest // self.n_tokens) + 1)
        place = start.unsqueeze(-1) + torch.arange(length, device=x.device)  # (B, K, L), among the real tokens
        real = place < end.unsqueeze(-1)
        order = mask.int().argsort(dim=1, descending=True, stable=True)  # (B, T), real tokens first
        index = order.gather(1, place.clamp(max=longest - 1).flatten(1))  # (B, K L)
        rows = torch.arange(len(x), device=x.device).unsqueeze(-1)
        spans = x[rows, index].unflatten(1, (self.n_tokens, length))  # (B, K, L, D)
        return spans.masked_fill(~real.unsqueeze(-1), torch.finfo(x.dtype).min).amax(2)


class AttentionPool(_Pooling):
    """K sums of the tokens, each weighted by a softmax of its own learnt query's scores (equation 16).

    The heads split the width: each head weights its slice of every token. Keys are a linear map of the normalised
    tokens, so scores start at unit variance for tokens of any scale. Values are the tokens themselves.
    """

    no_weight_decay = ("query",)

    def __init__(self, width: int, n_tokens: int, heads: int = ATTENTION_HEADS):
        super().__init__(width, n_tokens)
        if width % heads:
            raise ConfigError(f"width must be a multiple of {heads}, the attention heads. Got {width} instead.")
        self.heads = heads
        self.query = nn.Parameter(torch.randn(n_tokens, width))
        self.norm = nn.RMSNorm(width, eps=1e-6)
        self.key = nn.Linear(width, width, bias=False)
        nn.init.normal_(self.key.weight, std=width**-0.5)

    def forward(self, x: Tensor, mask: Tensor) -> Pooled:
        x, output_mask = zero_absent(x, mask), self._output_mask(mask)
        q, k, v = map(self._split, (self.query.expand(len(x), -1, -1), self.key(self.norm(x)), x))
        # A sample without tokens attends to its padding, which is now 0: a softmax over nothing is NaN.
        keys = mask | ~mask.any(1, keepdim=True)
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=keys[:, None, None])  # (B, H, K, D / H)
        return zero_absent(x.transpose(1, 2).flatten(2), output_mask), output_mask

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)


def read_pool(pool: PoolSpec) -> dict[str, tuple[str, int]]:
    """Return each modality's kind of pooling and number of tokens. Raises ConfigError if ``pool`` has another form."""
    pairs = [pair.partition("=")[::2] for pair in pool.split(",") if pair] if isinstance(pool, str) else ()
    given: list[tuple[str, Any]] = [*pairs, *(pool.items() if isinstance(pool, Mapping) else ())]
    poolings: dict[str, tuple[str, int]] = {}
    for modality, value in given:
        kind, _, n = value.partition(":") if isinstance(value, str) else (value[0], ":", value[-1])
        modality, kind, n = modality.strip(), kind.strip(), str(n).strip()
        if not modality or not n.isdecimal():
            raise ConfigError(f"pool must look like image=attention:14,text=mean:8. Got {pool!r} instead")
        if modality in poolings:
            raise ConfigError(f"pool names {modality} twice")
        poolings[modality] = kind, int(n)
    return poolings


def build_pools(pool: PoolSpec, specs: Mapping[str, FeatureSpec]) -> nn.ModuleDict:
    """Return the pooling of each modality that ``pool`` names; ``specs`` describe the tokens of each modality.

    Raises ConfigError for a modality without a spec, or for more tokens than a sample has.
    """
    pools = {}
    for modality, (kind, n_tokens) in read_pool(pool).items():
        if modality not in specs:
            raise ConfigError(f"pool names {modality!r}; it can pool: {listed(specs) or 'none'}")
        pooling, spec = POOLINGS[kind], specs[modality]
        if spec.n_tokens and n_tokens > spec.n_tokens:
            raise ConfigError(f"cannot pool {modality} to {n_tokens} tokens: a sample has at most {spec.n_tokens}")
        pools[modality] = pooling(spec.width, n_tokens)
    return NamedModules(pools)
