"""Late fusions of pooled features, from "Multimodal multilabel classification with CLIP" (MMC), section 3.2.

An absent modality adds nothing to a row. Its features are set to 0: inputs are standardised, so 0 is their mean in
training. If the modality has its own head, that head's logits are left out of the sum.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from cachefuse.feature_spec import FeatureSpec
from cachefuse.fusion.base import Fusion, HeadBuilder, Model, join, joint_head
from cachefuse.nn.masking import zero_absent
from cachefuse.nn.named import NamedModules


class ConcatFusion(Fusion):
    """[x_1; ...; x_M] -> head -> logits."""

    name = "concat"
    linear = True

    def __init__(self, specs: Mapping[str, FeatureSpec], classes: int, head: HeadBuilder):
        super().__init__(specs, classes, head)
        self.head = joint_head(self.specs, classes, head)

    def forward(self, features: dict[str, Tensor], present: dict[str, Tensor]) -> Tensor:
        return self.head(join(features, present, self.specs))


class ImageOnly(ConcatFusion):
    """x_image -> head -> logits: the baseline that reads no text."""

    name = "image"
    modalities = ("image",)


class TextOnly(ConcatFusion):
    """x_text -> head -> logits: the baseline that reads no image."""

    name = "text"
    modalities = ("text",)


class UnimodalHead(Model):
    """One head of a fusion alone: [x_1; ...; x_n] of its modalities -> head -> logits."""

    def __init__(self, head: nn.Module, specs: Mapping[str, FeatureSpec]):
        super().__init__()
        self.head = head
        self.specs = specs

    def forward(self, features: dict[str, Tensor], present: dict[str, Tensor]) -> Tensor:
        return self.head(join(features, present, self.specs))


class SumFusion(Fusion):
    """head_1(x_1) + ... + head_M(x_M) -> meta-classifier -> logits.

    The meta-classifier is a Linear (C to C). It starts as the identity: training begins with the plain sum.
    """

    name = "sum"
    linear = True

    def __init__(self, specs: Mapping[str, FeatureSpec], classes: int, head: HeadBuilder):
        super().__init__(specs, classes, head)
        self.heads = NamedModules({m: joint_head({m: spec}, classes, head) for m, spec in self.specs.items()})
        self.meta = nn.Linear(classes, classes)
        nn.init.eye_(self.meta.weight)
        nn.init.zeros_(self.meta.bias)

    def forward(self, features: dict[str, Tensor], present: dict[str, Tensor]) -> Tensor:
        x = {m: zero_absent(features[m], present[m]) for m in self.specs}
        return self.meta(self.total(x, present))

    def unimodal_heads(self) -> dict[str, nn.Module]:
        return {m: UnimodalHead(head, {m: self.specs[m]}) for m, head in self.heads.items()}

    def total(self, x: dict[str, Tensor], present: dict[str, Tensor]) -> Tensor:
        """Add up the logits (B, C) of the heads, each in the rows where its modality is present."""
        return torch.stack([zero_absent(head(x[m]), present[m]) for m, head in self.heads.items()]).sum(0)


class MixedFusion(SumFusion):
    """head_cat([x_1; ...; x_M]) + head_1(x_1) + ... + head_M(x_M) -> meta-classifier -> logits."""

    name = "mixed"

    def __init__(self, specs: Mapping[str, FeatureSpec], classes: int, head: HeadBuilder):
        super().__init__(specs, classes, head)
        self.concat = joint_head(self.specs, classes, head)

    def unimodal_heads(self) -> dict[str, nn.Module]:
        return {**super().unimodal_heads(), "concat": UnimodalHead(self.concat, self.specs)}

    def total(self, x: dict[str, Tensor], present: dict[str, Tensor]) -> Tensor:
        return self.concat(join(x, present, self.specs)) + super().total(x, present)
