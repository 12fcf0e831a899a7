"""CMA-CLIP, section 2: attention over the sequence of all modalities' tokens, then between the modalities.

This works on cached features: the paper's warm-up stage also trains with frozen encoders. A modality's class token is
its pooled feature. Each feature has its own linear map to the common width, and the biases tell the modalities apart.
The encoders have already added positions to the tokens.
"""

from collections.abc import Iterable, Mapping
from typing import Annotated, ClassVar

import torch
from torch import Tensor, nn

from cachefuse.errors import ConfigError
from cachefuse.feature_spec import POOLED, TOKENS, FeatureSpec, feature_name, modalities_of
from cachefuse.fusion.base import Fusion, HeadBuilder
from cachefuse.nn.masking import zero_absent
from cachefuse.nn.named import NamedModules
from cachefuse.nn.pooling import PoolSpec, build_pools
from cachefuse.nn.transformer import TransformerBlock
from cachefuse.registry import Options

MODALITY_ATTENTION, SEQUENCE_ATTENTION = "modality-attention", "sequence-attention"
WARM_UP, TUNING = "warm-up", "tuning"


class CMAFusion(Fusion):
    """[c_1; ...; c_M; tokens_1; ...; tokens_M] -> transformer -> sum of lambda_m c'_m -> head -> logits.

    lambda = softmax(w . c'_m) over the present modalities, with one vector w for all. w starts at 0: equal weights.
    Without modality attention, weights are always equal. Without sequence attention, c'_m is the normalised c_m, and no
    tokens are read. ``pool`` ("image=mean:16") pools a modality's tokens first; the paper uses all tokens. A modality's
    lambda can reflect other modalities: its class token attends to their tokens too.
    """

    name = "cma"
    mixed_precision = True
    parts = (MODALITY_ATTENTION, SEQUENCE_ATTENTION)
    stages = (WARM_UP, TUNING)
    per_task = True
    weighs = True
    no_weight_decay = ("relevance",)
    defaults: ClassVar = {"dropout": 0.2, "lr": 3e-4, "weight_decay": 1e-4, "epochs": 15, "batch_size": 64}

    @classmethod
    def views(cls, modality: str, options: Options) -> tuple[str, ...]:
        return (POOLED,) if SEQUENCE_ATTENTION in options.get("ablate", ()) else (POOLED, TOKENS)

    def __init__(
        self,
        specs: Mapping[str, FeatureSpec],
        classes: int,
        head: HeadBuilder,
        *,
        depth: Annotated[int, "transformer blocks"] = 2,
        width: Annotated[int, "width of the tokens in the transformer"] = 256,
        heads: Annotated[int, "attention heads of each block"] = 4,
        dropout: Annotated[float, "dropout in the blocks"] = 0.1,
        pool: Annotated[PoolSpec, "how to pool a modality's tokens first: image=mean:16"] = "",
        ablate: tuple[str, ...] = (),
        tasks: Mapping[str, int] | None = None,
    ):
        super().__init__(specs, classes, head, {"ablate": ablate})
        if width < 1:
            raise ConfigError(f"width must be at least 1. Got {width} instead")
        if depth < 1:
            raise ConfigError(f"depth must be at least 1. Got {depth}; --ablate {SEQUENCE_ATTENTION} has no blocks")
        self.embed = NamedModules({name: nn.Linear(spec.width, width) for name, spec in self.specs.items()})
        depth = 0 if SEQUENCE_ATTENTION in ablate else depth
        sequences = {spec.modality: spec for spec in self.specs.values() if spec.view == TOKENS}
        self.pool = build_pools(pool, sequences) if depth else NamedModules()
        self.blocks = nn.ModuleList(TransformerBlock(width, heads, dropout) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.tasks = dict(tasks or {})
        shape = (len(self.tasks), width) if self.tasks else (width,)
        self.relevance = None if MODALITY_ATTENTION in ablate else nn.Parameter(torch.zeros(shape))
        if self.tasks:
            self.heads = nn.ModuleList(head(width, n) for n in self.tasks.values())
        else:
            self.head = head(width, classes)

    def trained_in(self, stage: str) -> Iterable[nn.Parameter]:
        heads = (self.heads if self.tasks else self.head).parameters()
        return (
            self.parameters() if stage == WARM_UP else [*heads, *([] if self.relevance is None else [self.relevance])]
        )

    def forward(self, features: dict[str, Tensor], present: dict[str, Tensor]) -> Tensor:
        summaries, available = self.summaries(features, present)
        weights = self._lambda(summaries, available)
        if not self.tasks:
            return self.head((weights.unsqueeze(-1) * summaries).sum(1))
        fused = (weights.unsqueeze(-1) * summaries.unsqueeze(1)).sum(2)  # (B, K, W)
        return torch.cat([head(x) for head, x in zip(self.heads, fused.unbind(1), strict=True)], dim=1)

    def weights(self, features: dict[str, Tensor], present: dict[str, Tensor]) -> Tensor:
        """Return lambda, the weight of each modality in each row, (B, M) in alphabetical order; 0 where absent.

        With K tasks it is (B, K, M), in the order of the tasks.
        """
        return self._lambda(*self.summaries(features, present))

    def summaries(self, features: dict[str, Tensor], present: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Return each modality's class token after the transformer (B, M, W), and which are present (B, M)."""
        names = modalities_of(self.specs.values())
        available = torch.stack([present[m] for m in names], dim=1)  # (B, M)
        features, present = dict(features), dict(present)
        for m, pool in self.pool.items():
            name = feature_name(m, TOKENS)
            features[name], present[name] = pool(features[name], present[name])
        embedded = {name: embed(zero_absent(features[name], present[name])) for name, embed in self.embed.items()}
        x = torch.stack([embedded[m] for m in names], dim=1)  # (B, M, W)
        if self.blocks:
            sequences = [feature_name(m, TOKENS) for m in names]
            x = torch.cat([x, *(embedded[name] for name in sequences)], dim=1)  # (B, M + T, W)
            mask = torch.cat([available, *(present[name] for name in sequences)], dim=1)
            mask[:, 0] |= ~available.any(1)  # an empty row attends to a zero class token: softmax over nothing is NaN
            attended = None if mask.device.type == "cpu" and mask.all() else mask
            for i, block in enumerate(self.blocks, 1):
                x = block(x, attended, len(names) if i == len(self.blocks) else None)
        return self.norm(x), available

    def _lambda(self, summaries: Tensor, available: Tensor) -> Tensor:
        scores = torch.zeros_like(summaries[..., 0]) if self.relevance is None else summaries @ self.relevance.t()
        if self.tasks:
            scores = scores.mT if scores.ndim == 3 else scores.unsqueeze(1).expand(-1, len(self.tasks), -1)
            available = available.unsqueeze(1)  # for scores (B, K, M)
        scores = scores.masked_fill(~available, torch.finfo(scores.dtype).min)
        return zero_absent(scores.softmax(dim=-1), available.any(-1))
