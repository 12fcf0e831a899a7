"""The whole trained model: features as they are stored, standardised, fused to logits."""

from collections.abc import Mapping
from typing import cast

from torch import Tensor, nn

from cachefuse.cache.rows import Columns
from cachefuse.errors import ConfigError
from cachefuse.fusion.base import Fusion
from cachefuse.heads import Standardize


class FusionModel(nn.Module):
    """From stored features {modality: (B, D_m)} of any float dtype and present {modality: (B,) bool} to logits (B, C).

    ``widths`` are the D_m of the modalities in use. Call ``fit_statistics`` before training: the statistics are part of
    the state dict, so a saved model takes features as they are stored. Absent rows count as the training mean.
    """

    def __init__(self, fusion: Fusion):
        super().__init__()
        self.widths = fusion.widths
        self.standardize = nn.ModuleDict({m: Standardize(width) for m, width in fusion.widths.items()})
        self.fusion = fusion

    def forward(self, features: dict[str, Tensor], present: dict[str, Tensor]) -> Tensor:
        return self.fusion({m: standardize(features[m]) for m, standardize in self.standardize.items()}, present)

    def fit_statistics(self, features: Mapping[str, Columns], present: dict[str, Tensor], rows: Tensor) -> None:
        """Take each modality's mean and standard deviation over the rows (n,) int64 where it is present.

        Raises ConfigError if a modality is present in none of them, or a value is not finite.
        """
        for modality, standardize in self.standardize.items():
            here = rows[present[modality][rows]]
            if not len(here):
                raise ConfigError(f"no training row has a usable {modality}; take a fusion that does without it")
            cast(Standardize, standardize).fit(features[modality], here)
