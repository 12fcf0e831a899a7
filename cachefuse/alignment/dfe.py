"""The Deep Fusion Encoder: one small encoder for all modalities; a context vector identifies the modality.

"Context-Based Multimodal Fusion" (CBMF), section III: ``f(g_m(x) (*) g(c_m))``. Each side has a projection g_m and a
context c_m. The encoder f is shared: fusion, LayerNorm, one transformer block, residual connection. The input is a
sequence (B, T, D) with a mask (B, T) of the real tokens; pooled features are a sequence of length 1.

Every operation is ``Operation(width)`` and maps tokens (B, T, W), a context (W,) and a mask (B, T) to (B, T, W).
"""

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn

from cachefuse.alignment import OPERATIONS
from cachefuse.nn.heads import Dropout
from cachefuse.nn.masking import masked_mean
from cachefuse.nn.transformer import TransformerBlock
from cachefuse.registry import lookup


class Add(nn.Module):
    """x + c."""

    def __init__(self, width: int):
        super().__init__()

    def forward(self, x: Tensor, context: Tensor, mask: Tensor) -> Tensor:
        return x + context


class Multiply(nn.Module):
    """x * (1 + c): near the identity at the start, since contexts start near 0."""

    def __init__(self, width: int):
        super().__init__()

    def forward(self, x: Tensor, context: Tensor, mask: Tensor) -> Tensor:
        return x * (1 + context)


class Concat(nn.Module):
    """W [x; c], back to the width: the same as a linear map of x plus a linear map of the context."""

    def __init__(self, width: int):
        super().__init__()
        self.linear = nn.Linear(2 * width, width)

    def forward(self, x: Tensor, context: Tensor, mask: Tensor) -> Tensor:
        return self.linear(torch.cat([x, context.expand_as(x)], dim=-1))


class _Attention(nn.Module, ABC):
    """x + softmax(scores) V, with the context as the query and the tokens as keys and values: CBMF, equation 2.

    The result is added to every token, as in the authors' later code (LightCRL), so that the transformer block gets the
    sequence and its mask. With one token the softmax is 1, and the context has no effect.
    """

    @abstractmethod
    def scores(self, x: Tensor, context: Tensor) -> Tensor:
        """Return the attention score of each token (B, T, W) for a context (W,): (B, T)."""

    def forward(self, x: Tensor, context: Tensor, mask: Tensor) -> Tensor:
        weights = self.scores(x, context).masked_fill(~mask, -torch.inf).softmax(dim=1)  # (B, T)
        return x + (weights.unsqueeze(-1) * x).sum(dim=1, keepdim=True)


class AdditiveAttention(_Attention):
    """Scores W1 tanh(W2 q + W3 k) (arXiv 1409.0473)."""

    def __init__(self, width: int):
        super().__init__()
        self.query, self.key = nn.Linear(width, width), nn.Linear(width, width, bias=False)
        self.score = nn.Linear(width, 1, bias=False)

    def scores(self, x: Tensor, context: Tensor) -> Tensor:
        return self.score(torch.tanh(self.query(context) + self.key(x))).squeeze(-1)


class DotAttention(_Attention):
    """Scores q . k / sqrt(W) (arXiv 1706.03762), with linear maps to query and key."""

    def __init__(self, width: int):
        super().__init__()
        self.query, self.key = nn.Linear(width, width), nn.Linear(width, width, bias=False)

    def scores(self, x: Tensor, context: Tensor) -> Tensor:
        return self.key(x) @ self.query(context) / x.shape[-1] ** 0.5


class GeneralAttention(_Attention):
    """Scores q . W k (arXiv 1508.04025), without a scale: the sixth operation of the authors' later code (LightCRL)."""

    def __init__(self, width: int):
        super().__init__()
        self.key = nn.Linear(width, width, bias=False)  # a bias adds the same to all scores: softmax ignores it

    def scores(self, x: Tensor, context: Tensor) -> Tensor:
        return self.key(x) @ context


class Projection(nn.Sequential):
    """The projection g_m of a side to the common width: Linear, ReLU, Linear, as in ConVIRT (arXiv 2010.00747)."""

    def __init__(self, width: int, out: int, dropout: float = 0.0):
        super().__init__(nn.Linear(width, out), nn.ReLU(), Dropout(dropout), nn.Linear(out, out))


class DeepFusionEncoder(nn.Module):
    """A projection and a context for each side, and one shared encoder: (B, T, D_m) of side m to (B, W)."""

    def __init__(self, widths: tuple[int, ...], width: int, *, operation: str = "add", dropout: float = 0.0):
        super().__init__()
        self.project = nn.ModuleList(Projection(each, width, dropout) for each in widths)
        self.context = nn.Embedding(len(widths), width)
        nn.init.normal_(self.context.weight, std=0.02)
        self.operation = lookup(OPERATIONS, operation, "operation")(width)
        self.norm = nn.LayerNorm(width)
        self.block = TransformerBlock(width, dropout=dropout)

    def forward(self, x: Tensor, mask: Tensor, side: int) -> Tensor:
        if x.shape[1] > 1:
            x = x.masked_fill(~mask.unsqueeze(-1), 0)  # padding can hold NaN
        fused = self.operation(self.project[side](x), self.context.weight[side], mask)  # (B, T, W)
        return masked_mean(fused + self.block(self.norm(fused), mask), mask)


class ProjectionEncoder(nn.Module):
    """The baseline: a projection for each side and nothing shared, as in ConVIRT, but over frozen encoders."""

    def __init__(self, widths: tuple[int, ...], width: int, *, operation: str = "add", dropout: float = 0.0):
        super().__init__()
        self.project = nn.ModuleList(Projection(each, width, dropout) for each in widths)

    def forward(self, x: Tensor, mask: Tensor, side: int) -> Tensor:
        return masked_mean(self.project[side](x), mask)
