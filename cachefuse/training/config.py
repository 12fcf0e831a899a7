"""The settings of one training, checked once."""

from dataclasses import asdict, dataclass, fields
from typing import Any

from cachefuse.errors import ConfigError
from cachefuse.fusion import FUSIONS
from cachefuse.registry import ACTIVATIONS, HEADS, LOSSES, OPTIMIZERS, lookup

MAX_RATE = 1e6  # far beyond what trains, and far from where float32 overflows
TASK_LOSS = {"multilabel": "bce", "multiclass": "ce"}


@dataclass(frozen=True)
class TrainConfig:
    """How a head is trained. ``layers`` are hidden widths, or None for the head's own; ``batch_size`` 0 means all rows.

    ``loss`` None takes the task's: bce for multi-label, ce for multi-class. ``patience`` is the epochs without a better
    validation score after which training stops, 0 for never; the best epoch's weights are kept while it is on.
    """

    fusion: str = "sum"
    head: str = "mlp"
    loss: str | None = None
    layers: tuple[int, ...] | None = None
    activation: str = "gelu"
    dropout: float = 0.5
    optimizer: str = "adam"
    lr: float = 1e-3
    weight_decay: float = 0.0
    epochs: int = 100
    batch_size: int = 256
    patience: int = 15
    seed: int = 0

    def __post_init__(self) -> None:
        lookup(FUSIONS, self.fusion, "fusion")
        lookup(HEADS, self.head, "head")
        lookup(ACTIVATIONS, self.activation, "activation")
        lookup(OPTIMIZERS, self.optimizer, "optimizer")
        if self.loss is not None:
            lookup(LOSSES, self.loss, "loss")
        if not 0 < self.lr <= MAX_RATE:
            raise ConfigError(f"lr must be above 0 and at most {MAX_RATE:g}. Got {self.lr} instead")
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"dropout must be at least 0 and below 1. Got {self.dropout} instead")
        if not 0 <= self.weight_decay <= MAX_RATE:
            raise ConfigError(f"weight-decay must be between 0 and {MAX_RATE:g}. Got {self.weight_decay} instead")
        if self.epochs < 1:
            raise ConfigError(f"epochs must be at least 1. Got {self.epochs} instead")
        if self.batch_size < 0:
            raise ConfigError(f"batch-size must be at least 1, or all. Got {self.batch_size} instead")
        if self.patience < 0:
            raise ConfigError(f"patience must be at least 0. Got {self.patience} instead")
        if not 0 <= self.seed < 2**63:
            raise ConfigError(f"seed must be between 0 and 2^63 - 1. Got {self.seed} instead")

    def resolve_loss(self, task: str) -> str:
        """Return the loss for a task. Raises ConfigError if it can't be trained with the one that was asked for."""
        if task not in TASK_LOSS:
            raise ConfigError(f"a {task} dataset has no labels, so there is no head to train on it")
        if self.loss == "ce" and task == "multilabel":
            raise ConfigError("loss 'ce' is for one label a row; a multi-label task takes asl, bce or focal")
        return self.loss or TASK_LOSS[task]

    def head_options(self) -> dict[str, Any]:
        """Return the keyword arguments of the head; a linear head has no hidden layers to speak of."""
        layers = self.layers if self.layers is not None else lookup(HEADS, self.head, "head").default_layers
        return {"layers": layers, "activation": self.activation, "dropout": self.dropout}

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "TrainConfig":
        """Build from a run's file. Raises ConfigError for keys that are not settings."""
        unknown = sorted(set(values) - {field.name for field in fields(cls)})
        if unknown:
            raise ConfigError(f"unknown settings: {', '.join(unknown)}")
        layers = values.get("layers")
        return cls(**{**values, "layers": None if layers is None else tuple(layers)})
