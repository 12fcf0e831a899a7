"""The whole trained model: features as they are stored, standardised, fused to logits."""

from collections.abc import Mapping
from typing import Any, cast

from torch import Tensor, nn

from cachefuse.cache.rows import Columns
from cachefuse.errors import ConfigError
from cachefuse.fusion.base import Fusion
from cachefuse.fusion.late import HeadAlone
from cachefuse.heads import Standardize


class FusionModel(nn.Module):
    """From stored features {modality: (B, D_m)} of any float dtype and present {modality: (B,) bool} to logits (B, C).

    ``widths`` are the D_m of the modalities in use. Call ``fit_statistics`` before training: the statistics are part of
    the state dict, so a saved model takes features as they are stored. Absent rows count as the training mean.
    ``standardize`` is given where another model's statistics are to be shared.
    """

    def __init__(self, fusion: Fusion | HeadAlone, standardize: nn.ModuleDict | None = None):
        super().__init__()
        self.widths = fusion.widths
        if standardize is None:
            standardize = nn.ModuleDict({m: Standardize(width) for m, width in self.widths.items()})
        self.standardize = standardize
        self.fusion: Any = fusion

    @property
    def n_parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.parameters())

    @property
    def size_mb(self) -> float:
        """The size in MB (10^6 bytes), statistics included."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.state_dict().values()) / 1e6

    def forward(self, features: dict[str, Tensor], present: dict[str, Tensor]) -> Tensor:
        return self.fusion({m: self.standardize[m](features[m]) for m in self.widths}, present)

    def fit_statistics(self, features: Mapping[str, Columns], present: dict[str, Tensor], rows: Tensor) -> None:
        """Take each modality's mean and standard deviation over the rows (n,) int64 where it is present.

        Raises ConfigError if a modality is present in none of them, or a value is not finite.
        """
        for modality, standardize in self.standardize.items():
            here = rows[present[modality][rows]]
            if not len(here):
                raise ConfigError(f"no training row has a usable {modality}; take a fusion that does without it")
            cast(Standardize, standardize).fit(features[modality], here)
