"""T5's transformer (arXiv 1910.10683, and its version 1.1), on torch's scaled_dot_product_attention.

Three things set it apart. Scores are not divided by sqrt(D): the queries' start makes up for it. Positions are a learnt
bias on the scores, by distance, which all layers share. Norms only scale, and nothing else has a bias either, so that a
token of zeros stays one. Shapes: B batch, T tokens, S tokens of the memory that a decoder reads (the encoder's output),
H heads, D a head's width, W width, V vocabulary.
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
Memory = tuple[list[KeyValues], Tensor]  # each layer's keys and values of the memory, and the bias that shuts padding

FEED_FORWARDS = ("relu", "gated-gelu")  # of versions 1.0 and 1.1
FROM_ZERO = ("vocab_size", "num_decoder_layers", "decoder_start_token_id", "eos_token_id", "pad_token_id")


@dataclass(frozen=True)
class T5Settings:
    """The shape of a T5, by the names in transformers' config.json. Raises ConfigError for one that is out of range.

    The heads' widths ``d_kv`` need not add up to the width ``d_model``. ``tied``: the token embedding also gives the
    logits, of hidden states scaled by W^-0.5, as in version 1.0.
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
            value, least = getattr(self, field.name), 0 if field.name in FROM_ZERO else 1
            if field.type is int and (type(value) is not int or value < least):
                raise ConfigError(f"T5's {field.name} must be a whole number from {least} on. Got {value!r} instead")
            if field.type is float and not (isinstance(value, int | float) and 0 <= value < 1):
                raise ConfigError(f"T5's {field.name} must be in [0, 1). Got {value!r} instead")
        if self.feed_forward_proj not in FEED_FORWARDS:
            choices = " or ".join(FEED_FORWARDS)
            raise ConfigError(f"T5's feed_forward_proj must be {choices}. Got {self.feed_forward_proj!r} instead")
        buckets, distance = self.relative_attention_num_buckets, self.relative_attention_max_distance
        if not 4 <= buckets < distance:
            raise ConfigError(f"T5's relative attention needs 4 buckets, and more distances. Got {buckets}, {distance}")

    @classmethod
    def from_scratch(cls, width: int, depth: int, heads: int, **more: Any) -> "T5Settings":
        """Settings of T5's usual proportions: heads that share the width, a feed-forward four times as wide."""
        if heads < 1 or width < 1 or width % heads:
            raise ConfigError(f"width must be a multiple of {heads}, the attention heads. Got {width} instead.")
        return cls(d_model=width, num_layers=depth, num_heads=heads, d_kv=width // heads, d_ff=4 * width, **more)

    @classmethod
    def from_config(cls, config: Options) -> "T5Settings":
        """Take settings from transformers' config.json of a T5. Raises ConfigError if it is not one's, or lacks any."""
        if config.get("model_type") != "t5":
            raise ConfigError(f"its config.json is of model_type {config.get('model_type')!r}, not 't5'")
        names = [field.name for field in fields(cls)]
        given = {name: config[name] for name in names if config.get(name) is not None}
        missing = [name for name in (*names[:5], "vocab_size") if name not in given]
        if missing:
            raise ConfigError(f"its config.json lacks {', '.join(missing)}")
        # transformers 5 writes tie_word_embeddings as true whatever it was, and keeps what it was by another name.
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
    """T5's bias by distance, one for each head: a bucket for every short one, then ever wider ones."""

    def __init__(self, settings: T5Settings, *, bidirectional: bool):
        super().__init__()
        self.bidirectional, self.max_distance = bidirectional, settings.relative_attention_max_distance
        self.table = nn.Embedding(settings.relative_attention_num_buckets, settings.num_heads)
        nn.init.normal_(self.table.weight, std=settings.d_model**-0.5)

    def forward(self, distance: Tensor) -> Tensor:
        """Map distances (T, S) int64, a key's position less the query's, to the bias (1, H, T, S)."""
        return self.table(self.bucket(distance)).permute(2, 0, 1).unsqueeze(0)

    def bucket(self, distance: Tensor) -> Tensor:
        """Return the buckets (T, S) of distances; a causal bias has none for keys that lie ahead."""
        n, offset = self.table.num_embeddings, torch.zeros_like(distance)
        if self.bidirectional:
            n //= 2
            offset = (distance > 0) * n
            distance = distance.abs()
        else:
            distance = (-distance).clamp(min=0)
        exact = n // 2
        # In float32 whatever the model's dtype: in another, a distance on the edge would change its bucket.
        share = torch.log(distance.clamp(min=exact).float() / exact) / math.log(self.max_distance / exact)
        far = (exact + (share * (n - exact)).long()).clamp(max=n - 1)
        return offset + torch.where(distance < exact, distance, far)


def distances(positions: Tensor) -> Tensor:
    """Return the distances (T, T) between positions (T,), from the row's to the column's."""
    return positions - positions.unsqueeze(-1)


def shut_padding(bias: Tensor, mask: Tensor) -> Tensor:
    """Set a bias (1, H, T, S) to -inf where the mask (B, S) says that keys are padding: (B, H, T, S).

    A sample without any real token keeps all: over nothing, the softmax would be NaN. Its tokens have to be 0.
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
    """wo relu(wi x), or from version 1.1 on wo (gelu(wi_0 x) * wi_1 x)."""

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
    """Self-attention and feed-forward, each of normalised tokens and added to them."""

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        """Map tokens (B, T, W), with a bias that broadcasts to (B, H, T, T), to (B, T, W)."""
        normed = self.attention_norm(x)
        x = x + self.dropout(self.attention(normed, self.attention.keys_values(normed), bias))
        return x + self.dropout(self.feed_forward(self.feed_forward_norm(x)))


class DecoderLayer(_Layer):
    """Self-attention, attention to the memory and feed-forward, each of normalised tokens and added to them."""

    def __init__(self, settings: T5Settings):
        super().__init__(settings)
        self.cross_attention_norm, self.cross_attention = norm(settings), Attention(settings)

    def forward(self, x: Tensor, bias: Tensor, memory: KeyValues, shut: Tensor) -> Tensor:
        """Map tokens (B * K, T, W), K texts for each memory, with a bias that broadcasts to (B * K, H, T, T)."""
        normed = self.attention_norm(x)
        x = x + self.dropout(self.attention(normed, self.attention.keys_values(normed), bias))
        return self.read(x, memory, shut)

    def read(self, x: Tensor, memory: KeyValues, shut: Tensor) -> Tensor:
        """Return tokens (B * K, T, W) after what follows their attention to themselves."""
        rows, width = max(1, len(memory[0])), x.shape[-1]
        queries = self.cross_attention_norm(x).reshape(len(memory[0]), x.numel() // width // rows, width)  # K * T each
        x = x + self.dropout(self.cross_attention(queries, memory, shut).reshape(x.shape))
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
        bias = shut_padding(self.bias(distances(torch.arange(x.shape[1], device=x.device))), mask)
        for layer in self.layers:
            x = layer(x, bias)
        return self.dropout(self.norm(x))


class T5Decoder(nn.Module):
    """Layers of self-attention to what came before, and of attention to a memory."""

    def __init__(self, settings: T5Settings):
        super().__init__()
        self.bias = RelativeBias(settings, bidirectional=False)
        self.layers: Any = nn.ModuleList(DecoderLayer(settings) for _ in range(settings.num_decoder_layers))
        self.norm = norm(settings)
        self.dropout = Dropout(settings.dropout_rate)

    def remember(self, memory: Tensor, mask: Tensor) -> Memory:
        """Prepare a memory (B, S, W), with a mask (B, S) of its real tokens, for all the steps to come."""
        memory = zero_absent(memory, mask)
        shut = shut_padding(memory.new_zeros(1, 1, 1, mask.shape[1]), mask)
        return [layer.cross_attention.keys_values(memory) for layer in self.layers], shut

    def forward(self, x: Tensor, memory: Memory) -> Tensor:
        """Map embedded tokens (B * K, T, W), K texts for each memory; a token sees those before it, and itself."""
        distance = distances(torch.arange(x.shape[1], device=x.device))  # (T, T)
        bias = self.bias(distance).masked_fill(distance > 0, -torch.inf)
        x = self.dropout(x)
        for layer, keys_values in zip(self.layers, memory[0], strict=True):
            x = layer(x, bias, keys_values, memory[1])
        return self.dropout(self.norm(x))


class T5(nn.Module):
    """Token ids to the encoder's output, and on to the logits of the tokens that a decoder writes."""

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
        """Return the logits (B, T, V) of each of the targets (B, T), given those before it and a memory (B, S, W).

        The mask (B, S) is of the memory's real tokens. Targets below 0, which a loss leaves out, count as padding.
        """
        before = F.pad(targets[:, :-1], (1, 0), value=self.settings.decoder_start_token_id)
        x = self.embedding(before.masked_fill(before < 0, self.settings.pad_token_id))
        return self.logits(self.decoder(x, self.decoder.remember(memory, mask)))

    def logits(self, hidden: Tensor) -> Tensor:
        """Map the decoder's output (..., W) to logits (..., V)."""
        if self.lm_head is not None:
            return self.lm_head(hidden)
        return F.linear(hidden * self.settings.d_model**-0.5, self.embedding.weight)

    def forward(self, ids: Tensor, mask: Tensor, targets: Tensor) -> Tensor:
        """Return the logits (B, T, V) of each of the targets (B, T), given those before it and a text (B, S)."""
        return self.decode(targets, self.encode(ids, mask), mask)
