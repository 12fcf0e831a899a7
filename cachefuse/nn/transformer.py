"""A transformer block over tokens, with a mask for padding."""

import torch.nn.functional as F
from torch import Tensor, nn

from cachefuse.errors import ConfigError
from cachefuse.nn import ATTENTION_HEADS
from cachefuse.nn.heads import Dropout

EXPANSION = 4  # of the block's hidden layer


class TransformerBlock(nn.Module):
    """Self-attention and an MLP; each reads normalised tokens and is added to them (arXiv 1706.03762, 2002.04745)."""

    def __init__(self, width: int, heads: int = ATTENTION_HEADS, dropout: float = 0.0):
        super().__init__()
        if heads < 1 or width < 1 or width % heads:
            raise ConfigError(f"width must be a multiple of {heads}, the attention heads. Got {width} instead.")
        if not 0 <= dropout < 1:
            raise ConfigError(f"dropout must be at least 0 and below 1. Got {dropout} instead")
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.mlp = nn.Sequential(
            nn.Linear(width, EXPANSION * width), nn.GELU(), Dropout(dropout), nn.Linear(EXPANSION * width, width)
        )
        self.dropout = Dropout(dropout)

    def forward(self, x: Tensor, mask: Tensor | None, n_queries: int | None = None) -> Tensor:
        """Map tokens (B, T, W) to (B, T, W), with a mask (B, T) of the real tokens, None if all are real.

        ``n_queries`` maps only the first tokens, at a fraction of the cost: a last block's other outputs are not used.
        """
        normed = self.norm1(x)
        x = x[:, :n_queries]
        x = x + self.dropout(self.out(self._attend(normed, x.shape[1], mask)))
        return x + self.dropout(self.mlp(self.norm2(x)))

    def _attend(self, x: Tensor, n_queries: int, mask: Tensor | None) -> Tensor:
        length, width = x.shape[1:]
        weight, bias = self.qkv.weight, self.qkv.bias
        if length == 1:  # a single token attends to itself: queries and keys have no effect
            return F.linear(x, weight[2 * width :], bias[2 * width :])
        if n_queries == length:
            qkv = self.qkv(x).chunk(3, dim=-1)
        else:
            query = F.linear(x[:, :n_queries], weight[:width], bias[:width])
            qkv = (query, *F.linear(x, weight[width:], bias[width:]).chunk(2, dim=-1))
        q, k, v = (projected.unflatten(-1, (self.heads, -1)).transpose(1, 2) for projected in qkv)
        key_mask = None if mask is None else mask[:, None, None, :]
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=key_mask)  # (B, H, T, W / H)
        return attended.transpose(1, 2).flatten(2)
