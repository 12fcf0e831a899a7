"""Pooling of tokens to a set number of them, from "Where to fuse", sections 1.3.3 and 2.2.

Every pooling is ``Pooling(width, n_tokens)`` and maps tokens (B, T, D) with a mask (B, T) of the real ones, T at least
1, to K tokens (B, K, D) with a mask (B, K): all False for a sample that has no token, whose pooled ones are 0. Whatever
padding holds, NaN included, and however much there is of it, makes no difference.
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

PoolSpec = str | Mapping[str, Any]  # "image=attention:14", or {"image": ["attention", 14]}
Pooled = tuple[Tensor, Tensor]  # tokens (B, K, D) and their mask (B, K)


class _Pooling(nn.Module):
    """What all have in common: the number K of tokens that come out, at least 1; else ConfigError."""

    def __init__(self, width: int, n_tokens: int):
        super().__init__()
        if n_tokens < 1:
            raise ConfigError(f"pooling must leave at least 1 token. Got {n_tokens} instead.")
        self.n_tokens = n_tokens

    def _any(self, mask: Tensor) -> Tensor:
        """Return the mask (B, K) of the tokens that come out."""
        return mask.any(1, keepdim=True).expand(-1, self.n_tokens)


class _SpanPool(_Pooling, ABC):
    """Pools K spans of a sample's real tokens, one after the other and nearly equal in length.

    Span k of n tokens is from floor(k n / K) up to ceil((k + 1) n / K), as in adaptive pooling: spans overlap by a
    token where n is no multiple of K, and repeat tokens where n is less than K.
    """

    def forward(self, x: Tensor, mask: Tensor) -> Pooled:
        k, n = torch.arange(self.n_tokens, device=x.device), mask.sum(1, keepdim=True)  # (K,), (B, 1)
        start, end = k * n // self.n_tokens, -(-(k + 1) * n // self.n_tokens)  # (B, K) each
        here = self._any(mask)
        return zero_absent(self.reduce(x, mask, start, end), here), here

    @abstractmethod
    def reduce(self, x: Tensor, mask: Tensor, start: Tensor, end: Tensor) -> Tensor:
        """Reduce tokens (B, T, D) to (B, K, D): span k is of the real tokens from start up to end (B, K)."""


class MeanPool(_SpanPool):
    """The mean of each span (equation 14); with one token, of all."""

    def reduce(self, x: Tensor, mask: Tensor, start: Tensor, end: Tensor) -> Tensor:
        place = (mask.cumsum(1) - 1).unsqueeze(1)  # (B, 1, T), among the real tokens
        inside = (start.unsqueeze(-1) <= place) & (place < end.unsqueeze(-1)) & mask.unsqueeze(1)  # (B, K, T)
        # One product reads every token once; to gather the spans would copy all of them.
        shares = inside.to(x.dtype) / (end - start).clamp(min=1).unsqueeze(-1)
        return shares @ zero_absent(x, mask)


class MaxPool(_SpanPool):
    """The maximum of each span, in each dimension (equation 15)."""

    def reduce(self, x: Tensor, mask: Tensor, start: Tensor, end: Tensor) -> Tensor:
        longest = mask.shape[1]
        # As long as any span may be, from shapes alone: to look at the mask, a GPU would have to be waited for.
        length = min(longest, -(-longest // self.n_tokens) + 1)
        place = start.unsqueeze(-1) + torch.arange(length, device=x.device)  # (B, K, L), among the real tokens
        real = place < end.unsqueeze(-1)
        order = mask.int().argsort(dim=1, descending=True, stable=True)  # (B, T), the real tokens first
        index = order.gather(1, place.clamp(max=longest - 1).flatten(1))  # (B, K L)
        rows = torch.arange(len(x), device=x.device).unsqueeze(-1)
        spans = x[rows, index].unflatten(1, (self.n_tokens, length))  # (B, K, L, D)
        return spans.masked_fill(~real.unsqueeze(-1), torch.finfo(x.dtype).min).amax(2)


class AttentionPool(_Pooling):
    """K sums of the tokens, each weighted by a softmax of its own learnt query's scores (equation 16).

    The heads share the width: each weighs its part of every token. Keys are a linear map of the normalised tokens, so
    that the scores start at unit variance whatever the scale of the tokens; what is summed are the tokens themselves.
    """

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
        x, here = zero_absent(x, mask), self._any(mask)
        q, k, v = (self._split(part) for part in (self.query.expand(len(x), -1, -1), self.key(self.norm(x)), x))
        # A sample without a token attends to its padding, which is 0 here: over nothing, the softmax would be NaN.
        keys = mask | ~mask.any(1, keepdim=True)
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=keys[:, None, None])  # (B, H, K, D / H)
        return zero_absent(x.transpose(1, 2).flatten(2), here), here

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)


def read_pool(pool: PoolSpec) -> dict[str, tuple[str, int]]:
    """Return the kind of pooling and the number of tokens by modality. Raises ConfigError for another form."""
    pairs = [part.partition("=")[::2] for part in pool.split(",") if part] if isinstance(pool, str) else ()
    given: list[tuple[str, Any]] = [*pairs, *(pool.items() if isinstance(pool, Mapping) else ())]
    found: dict[str, tuple[str, int]] = {}
    for modality, how in given:
        kind, _, n = how.partition(":") if isinstance(how, str) else (how[0], ":", how[-1])
        modality, kind, n = modality.strip(), kind.strip(), str(n).strip()
        if not modality or not n.isdecimal():
            raise ConfigError(f"pool must look like image=attention:14,text=mean:8. Got {pool!r} instead")
        if modality in found:
            raise ConfigError(f"pool names {modality} twice")
        found[modality] = kind, int(n)
    return found


def build_pools(pool: PoolSpec, specs: Mapping[str, FeatureSpec]) -> nn.ModuleDict:
    """Return the pooling of each modality that ``pool`` names; ``specs`` are those of tokens by modality.

    Raises ConfigError for a modality that is not among them, or more tokens than a sample has.
    """
    pools = {}
    for modality, (kind, n_tokens) in read_pool(pool).items():
        if modality not in specs:
            raise ConfigError(f"pool names {modality!r}, which does not join; those that do: {', '.join(specs)}")
        pooling, spec = POOLINGS[kind], specs[modality]
        if spec.n_tokens and n_tokens > spec.n_tokens:
            raise ConfigError(f"can't pool {modality} to {n_tokens} tokens: a sample has {spec.n_tokens} at most")
        pools[modality] = pooling(spec.width, n_tokens)
    return NamedModules(pools)
