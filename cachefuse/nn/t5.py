"""T5's transformer (arXiv 1910.10683, and its version 1.1), on torch's scaled_dot_product_attention.

It differs from others in three ways. Scores are not divided by sqrt(D): the queries' initial weights are smaller.
Positions are a learnt bias on the scores, by distance; all layers share it. Norms only scale and linear layers have no
bias, so a token of zeros stays zero. Shapes: B batch, T tokens, S tokens of the memory that a decoder reads (the
encoder's output), H heads, D width of a head, W width, V vocabulary.
"""

import math
from dataclasses import dataclass, fields
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cachefuse.errors import ConfigError
from cachefuse.nn.heads import Dropout
from cachefuse.nn.masking import zero_absent
from cachefuse.registry import Options

KeyValues = tuple[Tensor, Tensor]  # (B, H, T, D) each
Memory = tuple[list[KeyValues], Tensor]  # each layer's keys and values of the memory, and the bias that masks padding

FEED_FORWARDS = ("relu", "gated-gelu")  # of versions 1.0 and 1.1
MAY_BE_ZERO = ("vocab_size", "num_decoder_layers", "decoder_start_token_id", "eos_token_id", "pad_token_id")


@dataclass(frozen=True)
class T5Settings:
    """The sizes of a T5, with the names in transformers' config.json. Raises ConfigError for a value out of range.

    The heads' widths ``d_kv`` need not add up to the width ``d_model``. If ``tied``, the token embedding also computes
    the logits, from hidden states scaled by W^-0.5, as in version 1.0.
    """

    d_model: int
    num_layers: int
    num_heads: int
    d_kv: int
    d_ff: int
    vocab_size: int = 0
    num_decoder_layers: int = 0
    feed_forward_proj: str = "relu"
    relative_attention_num_buckets: int = 32
    relative_attention_max_distance: int = 128
    dropout_rate: float = 0.1
    layer_norm_epsilon: float = 1e-6
    tied: bool = True
    decoder_start_token_id: int = 0
    eos_token_id: int = 1
    pad_token_id: int = 0

    def __post_init__(self) -> None:
        for field in fields(self):
            value, least = getattr(self, field.name), 0 if field.name in MAY_BE_ZERO else 1
            if field.type is int and (type(value) is not int or value < least):
                raise ConfigError(f"T5's {field.name} must be a whole number, at least {least}. Got {value!r} instead")
            if field.type is float and not (isinstance(value, int | float) and 0 <= value < 1):
                raise ConfigError(f"T5's {field.name} must be in [0, 1). Got {value!r} instead")
        if self.feed_forward_proj not in FEED_FORWARDS:
            choices = " or ".join(FEED_FORWARDS)
            raise ConfigError(f"T5's feed_forward_proj must be {choices}. Got {self.feed_forward_proj!r} instead")
        buckets, distance = self.relative_attention_num_buckets, self.relative_attention_max_distance
        if not 4 <= buckets < distance:
            raise ConfigError(
                "T5's relative_attention_num_buckets must be at least 4 and below relative_attention_max_distance. "
                f"Got {buckets} and {distance} instead"
            )

    @classmethod
    def from_scratch(cls, width: int, depth: int, heads: int, **more: Any) -> "T5Settings":
        """Return settings with T5's usual proportions: the heads split the width, the feed-forward is 4 x as wide."""
        if heads < 1 or width < 1 or width % heads:
            raise ConfigError(f"width must be a multiple of {heads}, the attention heads. Got {width} instead.")
        return cls(d_model=width, num_layers=depth, num_heads=heads, d_kv=width // heads, d_ff=4 * width, **more)

    @classmethod
    def from_config(cls, config: Options) -> "T5Settings":
        """Read settings from transformers' config.json. Raises ConfigError if it is no T5's, or lacks a setting."""
        if config.get("model_type") != "t5":
            raise ConfigError(f"its config.json has model_type {config.get('model_type')!r}, not 't5'")
        names = [field.name for field in fields(cls)]
        given = {name: config[name] for name in names if config.get(name) is not None}
        missing = [name for name in (*names[:5], "vocab_size") if name not in given]
        if missing:
            raise ConfigError(f"its config.json lacks {', '.join(missing)}")
        # transformers 5 always writes tie_word_embeddings as true, and writes its real value as scale_decoder_outputs.
        tied = config.get("scale_decoder_outputs", config.get("tie_word_embeddings", True))
        return cls(**{"num_decoder_layers": given["num_layers"], **given, "tied": tied is not False})


def linear(inputs: int, outputs: int, std: float) -> nn.Linear:
    """Return a linear layer without bias whose weights start at N(0, std^2)."""
    layer = nn.Linear(inputs, outputs, bias=False)
    nn.init.normal_(layer.weight, std=std)
    return layer


def norm(settings: T5Settings) -> nn.RMSNorm:
    """Return a norm that scales and does not shift: x / sqrt(mean(x^2) + eps) * weight."""
    return nn.RMSNorm(settings.d_model, eps=settings.layer_norm_epsilon)


class RelativeBias(nn.Module):
    """T5's attention bias by distance for each head: a bucket per short distance, wider buckets for long ones."""

    def __init__(self, settings: T5Settings, *, bidirectional: bool):
        super().__init__()
        self.bidirectional, self.max_distance = bidirectional, settings.relative_attention_max_distance
        self.table = nn.Embedding(settings.relative_attention_num_buckets, settings.num_heads)
        nn.init.normal_(self.table.weight, std=settings.d_model**-0.5)

    def forward(self, distance: Tensor) -> Tensor:
        """Map distances (T, S) int64, the key's position minus the query's, to the bias (1, H, T, S)."""
        return self.table(self.bucket(distance)).permute(2, 0, 1).unsqueeze(0)

    def bucket(self, distance: Tensor) -> Tensor:
        """Return the buckets (T, S) of distances; a causal bias treats keys after the query as distance 0."""
        n, offset = self.table.num_embeddings, torch.zeros_like(distance)
        if self.bidirectional:
            n //= 2
            offset = (distance > 0) * n
            distance = distance.abs()
        else:
            distance = (-distance).clamp(min=0)
        exact = n // 2
        # In float32 for models of any dtype: rounding in another dtype could change the bucket of a distance.
        share = torch.log(distance.clamp(min=exact).float() / exact) / math.log(self.max_distance / exact)
        far = (exact + (share * (n - exact)).long()).clamp(max=n - 1)
        return offset + torch.where(distance < exact, distance, far)


def distances(positions: Tensor) -> Tensor:
    """Return the distances (T, T) between positions (T,): the column's position minus the row's."""
    return positions - positions.unsqueeze(-1)


def mask_padding(bias: Tensor, mask: Tensor) -> Tensor:
    """Set a bias (1, H, T, S) to -inf where the mask (B, S) says that keys are padding: (B, H, T, S).

    A sample without real tokens is not masked: a softmax over nothing is NaN. Its tokens must be 0.
    """
    keys = mask | ~mask.any(-1, keepdim=True)
    return bias.masked_fill(~keys[:, None, None], -torch.inf)


class Attention(nn.Module):
    """softmax(q k^T + bias) v in each head."""

    def __init__(self, settings: T5Settings):
        super().__init__()
        width, inner = settings.d_model, settings.num_heads * settings.d_kv
        self.heads, self.dropout = settings.num_heads, settings.dropout_rate
        self.q = linear(width, inner, (width * settings.d_kv) ** -0.5)
        self.k, self.v = linear(width, inner, width**-0.5), linear(width, inner, width**-0.5)
        self.o = linear(inner, width, inner**-0.5)

    def keys_values(self, x: Tensor) -> KeyValues:
        """Return the keys and values of tokens (B, S, W)."""
        return self._split(self.k(x)), self._split(self.v(x))

    def forward(self, x: Tensor, keys_values: KeyValues, bias: Tensor) -> Tensor:
        """Attend from tokens (B, T, W) with a bias that broadcasts to (B, H, T, S): (B, T, W)."""
        p = self.dropout if self.training else 0.0
        q = self._split(self.q(x))
        x = F.scaled_dot_product_attention(q, *keys_values, attn_mask=bias, dropout_p=p, scale=1.0)  # (B, H, T, D)
        return self.o(x.transpose(1, 2).flatten(2))

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)


class FeedForward(nn.Module):
    """wo relu(wi x), or since version 1.1 wo (gelu(wi_0 x) * wi_1 x)."""

    def __init__(self, settings: T5Settings):
        super().__init__()
        width, hidden = settings.d_model, settings.d_ff
        self.gated = settings.feed_forward_proj == "gated-gelu"
        if self.gated:
            self.wi_0, self.wi_1 = linear(width, hidden, width**-0.5), linear(width, hidden, width**-0.5)
        else:
            self.wi = linear(width, hidden, width**-0.5)
        self.wo = linear(hidden, width, hidden**-0.5)
        self.dropout = Dropout(settings.dropout_rate)

    def forward(self, x: Tensor) -> Tensor:
        x = F.gelu(self.wi_0(x), approximate="tanh") * self.wi_1(x) if self.gated else self.wi(x).relu()
        return self.wo(self.dropout(x))


class _Layer(nn.Module):
    def __init__(self, settings: T5Settings):
        super().__init__()
        self.attention_norm, self.attention = norm(settings), Attention(settings)
        self.feed_forward_norm, self.feed_forward = norm(settings), FeedForward(settings)
        self.dropout = Dropout(settings.dropout_rate)


class EncoderLayer(_Layer):
    """Self-attention and feed-forward; each reads normalised tokens and is added to the tokens."""

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        """Map tokens (B, T, W), with a bias that broadcasts to (B, H, T, T), to (B, T, W)."""
        normed = self.attention_norm(x)
        x = x + self.dropout(self.attention(normed, self.attention.keys_values(normed), bias))
        return x + self.dropout(self.feed_forward(self.feed_forward_norm(x)))


class DecoderLayer(_Layer):
    """Self-attention, attention to the memory and feed-forward; each reads normalised tokens and is added to them."""

    def __init__(self, settings: T5Settings):
        super().__init__(settings)
        self.cross_attention_norm, self.cross_attention = norm(settings), Attention(settings)

    def forward(self, x: Tensor, bias: Tensor, memory: KeyValues, padding_bias: Tensor) -> Tensor:
        """Map tokens (B * K, T, W), K texts for each memory, with a bias that broadcasts to (B * K, H, T, T)."""
        normed = self.attention_norm(x)
        x = x + self.dropout(self.attention(normed, self.attention.keys_values(normed), bias))
        return self.read(x, memory, padding_bias)

    def read(self, x: Tensor, memory: KeyValues, padding_bias: Tensor) -> Tensor:
        """Map tokens (B * K, T, W) through the part of the layer after self-attention."""
        rows, width = max(1, len(memory[0])), x.shape[-1]
        queries = self.cross_attention_norm(x).reshape(len(memory[0]), x.numel() // width // rows, width)  # K * T each
        x = x + self.dropout(self.cross_attention(queries, memory, padding_bias).reshape(x.shape))
        return x + self.dropout(self.feed_forward(self.feed_forward_norm(x)))


class T5Encoder(nn.Module):
    """Layers of self-attention over embedded tokens."""

    def __init__(self, settings: T5Settings):
        super().__init__()
        self.bias = RelativeBias(settings, bidirectional=True)
        self.layers = nn.ModuleList(EncoderLayer(settings) for _ in range(settings.num_layers))
        self.norm = norm(settings)
        self.dropout = Dropout(settings.dropout_rate)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """Map embedded tokens (B, T, W), with a mask (B, T) of the real ones, to (B, T, W)."""
        x = self.dropout(zero_absent(x, mask))
        bias = mask_padding(self.bias(distances(torch.arange(x.shape[1], device=x.device))), mask)
        for layer in self.layers:
            x = layer(x, bias)
        return self.dropout(self.norm(x))


class T5Decoder(nn.Module):
    """Layers of causal self-attention and of attention to a memory."""

    def __init__(self, settings: T5Settings):
        super().__init__()
        self.bias = RelativeBias(settings, bidirectional=False)
        self.layers: Any = nn.ModuleList(DecoderLayer(settings) for _ in range(settings.num_decoder_layers))
        self.norm = norm(settings)
        self.dropout = Dropout(settings.dropout_rate)

    def prepare_memory(self, memory: Tensor, mask: Tensor) -> Memory:
        """Compute keys and values of a memory (B, S, W), with a mask (B, S) of its real tokens, once for all steps."""
        memory = zero_absent(memory, mask)
        padding_bias = mask_padding(memory.new_zeros(1, 1, 1, mask.shape[1]), mask)
        return [layer.cross_attention.keys_values(memory) for layer in self.layers], padding_bias

    def forward(self, x: Tensor, memory: Memory) -> Tensor:
        """Map embedded tokens (B * K, T, W), K texts for each memory; a token attends to itself and earlier tokens."""
        distance = distances(torch.arange(x.shape[1], device=x.device))  # (T, T)
        bias = self.bias(distance).masked_fill(distance > 0, -torch.inf)
        x = self.dropout(x)
        for layer, keys_values in zip(self.layers, memory[0], strict=True):
            x = layer(x, bias, keys_values, memory[1])
        return self.dropout(self.norm(x))


class T5(nn.Module):
    """Map token ids to the encoder's output, then to the logits of the tokens that the decoder writes."""

    def __init__(self, settings: T5Settings):
        super().__init__()
        self.settings = settings
        self.embedding = nn.Embedding(settings.vocab_size, settings.d_model)  # starts at N(0, 1), as T5's
        self.encoder = T5Encoder(settings)
        self.decoder: Any = T5Decoder(settings) if settings.num_decoder_layers else None
        untied = self.decoder is not None and not settings.tied
        self.lm_head = linear(settings.d_model, settings.vocab_size, settings.d_model**-0.5) if untied else None

    def encode(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Map token ids (B, T) with a mask (B, T) of the real ones to the encoder's output (B, T, W)."""
        return self.encoder(self.embedding(ids.masked_fill(~mask, self.settings.pad_token_id)), mask)

    def decode(self, targets: Tensor, memory: Tensor, mask: Tensor) -> Tensor:
        """Return the logits (B, T, V) of each target (B, T), given the targets before it and a memory (B, S, W).

        The mask (B, S) marks the memory's real tokens. Targets below 0, which a loss ignores, are treated as padding.
        """
        before = F.pad(targets[:, :-1], (1, 0), value=self.settings.decoder_start_token_id)
        x = self.embedding(before.masked_fill(before < 0, self.settings.pad_token_id))
        return self.logits(self.decoder(x, self.decoder.prepare_memory(memory, mask)))

    def logits(self, hidden: Tensor) -> Tensor:
        """Map the decoder's output (..., W) to logits (..., V)."""
        if self.lm_head is not None:
            return self.lm_head(hidden)
        return F.linear(hidden * self.settings.d_model**-0.5, self.embedding.weight)

    def forward(self, ids: Tensor, mask: Tensor, targets: Tensor) -> Tensor:
        """Return the logits (B, T, V) of each target (B, T), given the targets before it and a text (B, S)."""
        return self.decode(targets, self.encode(ids, mask), mask)
