"""The whole trained model: it scales stored features and fuses them to logits."""

from collections.abc import Callable, Mapping
from typing import Any, cast

from torch import Tensor, nn

from cachefuse.errors import ConfigError
from cachefuse.feature_spec import NUMBERED
from cachefuse.fusion.base import Fusion, Model
from cachefuse.fusion.late import UnimodalHead
from cachefuse.nn.losses import Loss
from cachefuse.nn.named import NamedModules
from cachefuse.nn.scaling import SCALINGS
from cachefuse.store.rows import FeatureRows
from cachefuse.store.tokens import Tokens


class FusionModel(Model):
    """Map stored features of any float dtype, with presence masks, to logits (B, C), as a ``Fusion`` does.

    ``specs`` holds the features in use, by name. ``standardize`` is one of ``SCALINGS``, or another model's scalings
    to share. Call ``fit_statistics`` before training. The state dict contains the statistics, so a saved model reads
    stored features. Token ids and n-grams are not scaled. With statistics, absent rows get the training mean.
    """

    def __init__(self, fusion: Fusion | UnimodalHead, standardize: str | nn.ModuleDict = "features"):
        super().__init__()
        self.specs = fusion.specs
        if isinstance(standardize, str):
            numbers = {name: spec for name, spec in self.specs.items() if spec.view not in NUMBERED}
            scaling = SCALINGS[standardize]
            standardize = NamedModules({name: scaling(spec.width) for name, spec in numbers.items()})
        self.standardize = standardize
        self.fusion: Any = fusion
        self.weighs = fusion.weighs

    @property
    def n_parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.parameters())

    @property
    def size_mb(self) -> float:
        """The size in MB (10^6 bytes), with the statistics."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.state_dict().values()) / 1e6

    def forward(self, features: dict[str, Tensor], present: dict[str, Tensor]) -> Tensor:
        return self.fusion(self.standardized(features), present)

    def objective(self, features: dict[str, Tensor], present: dict[str, Tensor], targets: Tensor, loss: Loss) -> Tensor:
        return self.fusion.objective(self.standardized(features), present, targets, loss)

    def modality_weights(self, features: dict[str, Tensor], present: dict[str, Tensor]) -> Tensor:
        """Return the weight of each modality in each row, (B, M), or (B, K, M) for K tasks: see ``weighs``."""
        return self.fusion.weights(self.standardized(features), present)

    def standardized(self, features: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the fusion's inputs: scaled features, and token ids and n-grams unchanged."""
        scalers = self.standardize
        return {name: scalers[name](features[name]) if name in scalers else features[name] for name in self.specs}

    def fit_statistics(
        self,
        features: Mapping[str, FeatureRows | Tokens],
        present: dict[str, Tensor],
        rows: Tensor,
        feature_rows: Callable[[str, Tensor], Tensor] = lambda name, rows: rows,
    ) -> None:
        """Compute the mean and standard deviation of each feature over the rows (n,) int64 that have it.

        ``feature_rows(name, rows)`` maps rows to rows of the named feature. Statistics of many tokens use an even
        sample of the rows. Raises ConfigError if no row has a modality, or a value is not finite.
        """
        for name, spec in self.specs.items():
            present_rows = rows[present[name][rows]]
            if not len(present_rows):
                raise ConfigError(f"no training row has a usable {spec.modality}; choose a fusion without it")
            if name in self.standardize:
                cast(Any, self.standardize[name]).fit(features[name], feature_rows(name, present_rows))
