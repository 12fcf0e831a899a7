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
from cachefuse.printable import listed


class TIRG(nn.Module):
    """Adjust a query g by a modifier f, (B, W) each: w_g sigmoid(gate([g; f])) g + w_r residual([g; f]), (B, W).

    gate: BatchNorm, ReLU, Linear (2W to W); residual: BatchNorm, ReLU, Linear (2W to 2W), ReLU, Linear (2W to W). The
    weights w_g and w_r are learnt (section 3.3). They start at 1 and 10, as in the code of TIRG's authors.
    """

    def __init__(self, width: int):
        super().__init__()
        double = 2 * width
        self.gate = nn.Sequential(BatchNorm(double), nn.ReLU(), nn.Linear(double, width))
        self.residual = nn.Sequential(
            BatchNorm(double), nn.ReLU(), nn.Linear(double, double), nn.ReLU(), nn.Linear(double, width)
        )
        self.gate_weight = nn.Parameter(torch.tensor(1.0))
        self.residual_weight = nn.Parameter(torch.tensor(10.0))

    def forward(self, query: Tensor, modifier: Tensor) -> Tensor:
        joint = torch.cat([query, modifier], dim=-1)  # (B, 2W)
        gated = self.gate_weight * self.gate(joint).sigmoid() * query
        return gated + self.residual_weight * self.residual(joint)


class BatchNorm(nn.BatchNorm1d):
    """Batch normalisation that uses the running statistics for a batch of one row, which has no deviation."""

    def forward(self, x: Tensor) -> Tensor:
        if self.training and len(x) == 1:
            return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)
        return super().forward(x)


class TIRGFusion(Fusion):
    """Two modalities' pooled features -> a linear map each to the common width -> TIRG -> head -> logits.

    ``query`` names the modality to adjust; the other modality is the modifier. An absent modality is 0.
    """

    name = "tirg"

    def __init__(
        self,
        specs: Mapping[str, FeatureSpec],
        classes: int,
        head: HeadBuilder,
        *,
        query: Annotated[str, "the modality that the other one adjusts"] = "image",
        width: Annotated[int, "the common width of both modalities"] = 512,
    ):
        super().__init__(specs, classes, head)
        if len(self.specs) != 2 or query not in self.specs:
            raise ConfigError(
                f"fusion 'tirg' needs the query {query!r} and one other modality. Got {listed(self.specs)}"
            )
        if width < 1:
            raise ConfigError(f"width must be at least 1. Got {width} instead")
        self.query, self.modifier = query, next(m for m in self.specs if m != query)
        self.project = NamedModules({m: nn.Linear(spec.width, width) for m, spec in self.specs.items()})
        self.tirg = TIRG(width)
        self.head = head(width, classes)

    def forward(self, features: dict[str, Tensor], present: dict[str, Tensor]) -> Tensor:
        x = {m: project(zero_absent(features[m], present[m])) for m, project in self.project.items()}
        x = {m: zero_absent(projected, present[m]) for m, projected in x.items()}  # absent rows hold the map's bias
        return self.head(self.tirg(x[self.query], x[self.modifier]))
