"""Text Image Residual Gating (arXiv 1812.07119), in the form of "Leveraging efficient training and feature fusion"."""

from collections.abc import Mapping
from typing import Annotated

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cachefuse.errors import ConfigError
from cachefuse.feature_spec import FeatureSpec
from cachefuse.fusion.base import Fusion, HeadBuilder
from cachefuse.nn.masking import zero_absent
from cachefuse.nn.named import NamedModules


class TIRG(nn.Module):
    """Adjust a query g by a modifier f, (B, W) each: w_g sigmoid(gate([g; f])) g + w_r residual([g; f]), (B, W).

    gate: BatchNorm, ReLU, Linear (2W to W); residual: BatchNorm, ReLU, Linear (2W to 2W), ReLU, Linear (2W to W). The
    weights w_g and w_r are learnt, from 1 and 10 on (section 3.3; the starts are those of the authors of TIRG).
    """

    def __init__(self, width: int):
        super().__init__()
        both = 2 * width
        self.gate = nn.Sequential(BatchNorm(both), nn.ReLU(), nn.Linear(both, width))
        self.residual = nn.Sequential(
            BatchNorm(both), nn.ReLU(), nn.Linear(both, both), nn.ReLU(), nn.Linear(both, width)
        )
        self.gate_weight = nn.Parameter(torch.tensor(1.0))
        self.residual_weight = nn.Parameter(torch.tensor(10.0))

    def forward(self, query: Tensor, modifier: Tensor) -> Tensor:
        both = torch.cat([query, modifier], dim=-1)
        gated = self.gate_weight * self.gate(both).sigmoid() * query
        return gated + self.residual_weight * self.residual(both)


class BatchNorm(nn.BatchNorm1d):
    """Batch normalisation which takes a batch of one row, that has no deviation, by the running statistics."""

    def forward(self, x: Tensor) -> Tensor:
        if self.training and len(x) == 1:
            return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)
        return super().forward(x)


class TIRGFusion(Fusion):
    """Two modalities' pooled features, each by a map to the common width -> TIRG -> head -> logits.

    ``query`` names the modality that is adjusted; the other one is the modifier. An absent one counts as 0.
    """

    name = "tirg"

    def __init__(
        self,
        specs: Mapping[str, FeatureSpec],
        classes: int,
        head: HeadBuilder,
        *,
        query: Annotated[str, "the modality that the other one adjusts"] = "image",
        width: Annotated[int, "that both are mapped to"] = 512,
    ):
        super().__init__(specs, classes, head)
        if len(self.specs) != 2 or query not in self.specs:
            raise ConfigError(
                f"fusion 'tirg' adjusts a query, {query!r} here, by one other modality. Got {', '.join(self.specs)}"
            )
        if width < 1:
            raise ConfigError(f"width must be at least 1. Got {width} instead")
        self.query, self.modifier = query, next(m for m in self.specs if m != query)
        self.project = NamedModules({m: nn.Linear(spec.width, width) for m, spec in self.specs.items()})
        self.tirg = TIRG(width)
        self.head = head(width, classes)

    def forward(self, features: dict[str, Tensor], present: dict[str, Tensor]) -> Tensor:
        x = {m: project(zero_absent(features[m], present[m])) for m, project in self.project.items()}
        x = {m: zero_absent(own, present[m]) for m, own in x.items()}  # a map's bias is nothing that is there
        return self.head(self.tirg(x[self.query], x[self.modifier]))
