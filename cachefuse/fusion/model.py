"""The whole trained model: features as they are stored, standardised, fused to logits."""

from collections.abc import Callable, Mapping
from typing import Any, cast

from torch import Tensor, nn

from cachefuse.errors import ConfigError
from cachefuse.feature_spec import IDS
from cachefuse.fusion.base import Fusion, Model
from cachefuse.fusion.late import UnimodalHead
from cachefuse.nn.heads import Standardize
from cachefuse.nn.losses import Loss
from cachefuse.nn.named import NamedModules
from cachefuse.store.rows import FeatureRows
from cachefuse.store.tokens import Tokens


class FusionModel(Model):
    """From stored features of any float dtype, and what is present of them, to logits (B, C), as a ``Fusion`` does.

    ``specs`` are those of the features in use, by name. Call ``fit_statistics`` before training: the statistics are
    part of the state dict, so a saved model takes features as they are stored. Token ids are no numbers to standardise.
    Absent rows count as the training mean. ``standardize`` is given where another model's statistics are to be shared.
    """

    def __init__(self, fusion: Fusion | UnimodalHead, standardize: nn.ModuleDict | None = None):
        super().__init__()
        self.specs = fusion.specs
        if standardize is None:
            numbers = {name: spec for name, spec in self.specs.items() if spec.view != IDS}
            standardize = NamedModules({name: Standardize(spec.width) for name, spec in numbers.items()})
        self.standardize = standardize
        self.fusion: Any = fusion
        self.weighs = fusion.weighs

    @property
    def n_parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.parameters())

    @property
    def size_mb(self) -> float:
        """The size in MB (10^6 bytes), statistics included."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.state_dict().values()) / 1e6

    def forward(self, features: dict[str, Tensor], present: dict[str, Tensor]) -> Tensor:
        return self.fusion(self.standardized(features), present)

    def objective(self, features: dict[str, Tensor], present: dict[str, Tensor], targets: Tensor, loss: Loss) -> Tensor:
        return self.fusion.objective(self.standardized(features), present, targets, loss)

    def modality_weights(self, features: dict[str, Tensor], present: dict[str, Tensor]) -> Tensor:
        """Return how much each modality counts in each row, (B, M), of K tasks (B, K, M), if the fusion weighs them."""
        return self.fusion.weights(self.standardized(features), present)

    def standardized(self, features: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return features as the fusion takes them."""
        found = self.standardize
        return {name: found[name](features[name]) if name in found else features[name] for name in self.specs}

    def fit_statistics(
        self,
        features: Mapping[str, FeatureRows | Tokens],
        present: dict[str, Tensor],
        rows: Tensor,
        feature_rows: Callable[[str, Tensor], Tensor] = lambda name, rows: rows,
    ) -> None:
        """Take the mean and standard deviation of each of the features over the rows (n,) int64 where it is present.

        ``feature_rows`` says which rows of the features of a name those are. Statistics of tokens are over an even
        spread of the rows, where they are many. Raises ConfigError if a modality is present in none of the rows, or a
        value is not finite.
        """
        for name, spec in self.specs.items():
            here = rows[present[name][rows]]
            if not len(here):
                raise ConfigError(f"no training row has a usable {spec.modality}; take a fusion that does without it")
            if name in self.standardize:
                cast(Standardize, self.standardize[name]).fit(features[name], feature_rows(name, here))
