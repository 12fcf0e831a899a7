"""Gated late fusion: the "dynamic fusion" of "Multimodal multilabel classification with CLIP", section 5."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from cachefuse.feature_spec import FeatureSpec
from cachefuse.fusion.base import Fusion, HeadBuilder, join, joint_head, joint_width
from cachefuse.fusion.late import UnimodalHead
from cachefuse.nn.masking import zero_absent
from cachefuse.nn.named import NamedModules


class GatedFusion(Fusion):
    """w_1 head_1(x_1) + ... + w_M head_M(x_M) -> logits, with weights that depend on the row.

    w = softmax(W [x_1; ...; x_M] + b) over the present modalities: the weights add up to 1. W starts at 0: training
    begins with the plain mean.
    """

    name = "gated"
    linear = True
    weighs = True

    def __init__(self, specs: Mapping[str, FeatureSpec], classes: int, head: HeadBuilder):
        super().__init__(specs, classes, head)
        self.heads = NamedModules({m: joint_head({m: spec}, classes, head) for m, spec in self.specs.items()})
        self.gate = nn.Linear(joint_width(self.specs), len(self.specs))
        nn.init.zeros_(self.gate.weight)
        nn.init.zeros_(self.gate.bias)

    def unimodal_heads(self) -> dict[str, nn.Module]:
        return {m: UnimodalHead(head, {m: self.specs[m]}) for m, head in self.heads.items()}

    def weights(self, features: dict[str, Tensor], present: dict[str, Tensor]) -> Tensor:
        """Return the weight of each modality in each row, (B, M) in the order of ``specs``; 0 where absent."""
        available = torch.stack([present[m] for m in self.specs], dim=-1)  # (B, M)
        scores = self.gate(join(features, present, self.specs)).masked_fill(~available, torch.finfo(torch.float32).min)
        return zero_absent(scores.softmax(dim=-1), available.any(dim=-1))

    def forward(self, features: dict[str, Tensor], present: dict[str, Tensor]) -> Tensor:
        x = {m: zero_absent(features[m], present[m]) for m in self.specs}
        logits = torch.stack([head(x[m]) for m, head in self.heads.items()], dim=-2)  # (B, M, C)
        return (self.weights(features, present).unsqueeze(-1) * logits).sum(-2)
