"""The whole trained model: features as they are stored, standardised, fused to logits."""

from torch import Tensor, nn

from cachefuse.fusion.base import Fusion
from cachefuse.heads import Standardize


class FusionModel(nn.Module):
    """From stored features {modality: (B, D_m)} of any float dtype and present {modality: (B,) bool} to logits (B, C).

    ``standardize`` holds one ``Standardize`` for each modality that the fusion uses; fit them before training. Their
    statistics are part of the state dict, so a saved model takes raw features. Absent rows count as the training mean.
    """

    def __init__(self, fusion: Fusion):
        super().__init__()
        self.standardize = nn.ModuleDict({m: Standardize(width) for m, width in fusion.widths.items()})
        self.fusion = fusion

    def forward(self, features: dict[str, Tensor], present: dict[str, Tensor]) -> Tensor:
        return self.fusion({m: standardize(features[m]) for m, standardize in self.standardize.items()}, present)
