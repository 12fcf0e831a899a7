"""The settings of an alignment; every field is an option of `cachefuse align`."""

from dataclasses import asdict, dataclass, fields

from cachefuse.alignment import METHODS, OPERATIONS
from cachefuse.errors import ConfigError
from cachefuse.files import JsonObject
from cachefuse.nn import ATTENTION_HEADS, TARGETS
from cachefuse.registry import lookup
from cachefuse.training import OPTIMIZERS, SCHEDULES

VIEWS = ("pooled", "tokens")
MONITORS = ("r1", "loss")
MAX_WIDTH = 1 << 14
TUNING_RATE = 3e-4  # lower than a head's: a tuned encoder is to stay where it is, roughly


@dataclass(frozen=True)
class AlignConfig:
    """How to align two encoders. Raises ConfigError or UnknownNameError for what is out of range or unknown.

    ``batch_size`` pairs are compared with one another at each step, ``chunk_size`` of them pass the encoder at a time
    (0: all). ``monitor`` is what ``patience`` and the choice of the best epoch go by: the mean recall at 1 of both
    directions, or the loss.
    """

    method: str = "dfe"
    op: str = "add"
    targets: str = "hard"
    view: str = "pooled"
    width: int = 512
    dropout: float = 0.5
    optimizer: str = "adamw"
    lr: float = 1e-3
    weight_decay: float = 0.1
    schedule: str = "cosine"
    epochs: int = 100
    batch_size: int = 512
    chunk_size: int = 0
    ema: float = 0.99
    patience: int = 25
    monitor: str = "r1"
    seed: int = 0

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            kinds = (int, float) if field.type is float or field.type == "float" else (type(field.default),)
            if not isinstance(value, kinds) or isinstance(value, bool):
                raise ConfigError(
                    f"{_option(field.name)} must be a {type(field.default).__name__}. Got {value!r} instead"
                )
        for table, name, kind in (
            (METHODS, self.method, "method"),
            (OPERATIONS, self.op, "operation"),
            (OPTIMIZERS, self.optimizer, "optimizer"),
            (SCHEDULES, self.schedule, "schedule"),
        ):
            lookup(table, name, kind)
        for name, choices in (("targets", TARGETS), ("view", VIEWS), ("monitor", MONITORS)):
            if getattr(self, name) not in choices:
                raise ConfigError(f"{name} must be one of {', '.join(choices)}. Got {getattr(self, name)!r} instead")
        if self.optimizer == "lbfgs":
            raise ConfigError("optimizer 'lbfgs' is for linear heads; take adamw, adam or sgd")
        if not ATTENTION_HEADS <= self.width <= MAX_WIDTH or self.width % ATTENTION_HEADS:
            raise ConfigError(
                f"width must be a multiple of {ATTENTION_HEADS}, at most {MAX_WIDTH}. Got {self.width} instead"
            )
        for name, low, high in (("dropout", 0, 1), ("ema", 0, 1)):
            if not low <= getattr(self, name) < high:
                raise ConfigError(
                    f"{name} must be at least {low} and below {high}. Got {getattr(self, name):g} instead"
                )
        if not 0 < self.lr < float("inf") or not 0 <= self.weight_decay < float("inf"):
            raise ConfigError(
                f"lr must be above 0 and weight-decay not below. Got {self.lr}, {self.weight_decay} instead"
            )
        for name, least in (("epochs", 1), ("batch_size", 2), ("chunk_size", 0), ("patience", 0), ("seed", 0)):
            if getattr(self, name) < least:
                raise ConfigError(f"{_option(name)} must be at least {least}. Got {getattr(self, name)} instead")

    @property
    def label(self) -> str:
        """What tables call it: the method and, of a DFE, its operation."""
        return f"{self.method}-{self.op}" if self.method == "dfe" else self.method

    def to_dict(self) -> JsonObject:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: JsonObject) -> "AlignConfig":
        """Build from a run's file. Raises ConfigError for keys that are not settings."""
        unknown = sorted(set(values) - {field.name for field in fields(cls)})
        if unknown:
            raise ConfigError(f"unknown settings: {', '.join(unknown)}")
        return cls(**values)


def _option(name: str) -> str:
    return name.replace("_", "-")
