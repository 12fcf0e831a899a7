"""The settings of an alignment; every field is an option of `cachefuse align`."""

from dataclasses import asdict, dataclass

from cachefuse.alignment import METHODS, OPERATIONS
from cachefuse.errors import ConfigError
from cachefuse.feature_spec import POOLED, TOKENS
from cachefuse.files import JsonObject
from cachefuse.nn import ATTENTION_HEADS, TARGETS
from cachefuse.settings import as_stored, check_settings, from_stored, setting
from cachefuse.training import DECAY_ALL, DECAY_WEIGHTS, OPTIMIZERS, SCHEDULES

MAX_WIDTH = 1 << 14
MAX_RATE = 1e38  # near the largest float32
TUNING_RATE = 3e-4  # lower than a head's, so that fine-tuning changes the encoder little
MODEL, TRAINING = "Model", "Training"  # groups of settings
UNFIT = {"lbfgs": "is for linear heads; use adamw, adam or sgd"}


@dataclass(frozen=True)
class AlignConfig:
    """How to align two encoders. Raises ConfigError for a value out of range, UnknownNameError for an unknown name.

    Each step compares ``batch_size`` pairs with one another. The encoder embeds ``chunk_size`` of them at a time (0:
    all). ``monitor`` decides ``patience`` and the best epoch: the mean recall at 1 of both directions, or the loss.
    """

    method: str = setting(
        "dfe", "dfe, the Deep Fusion Encoder, or projection: only one per side.", panel=MODEL, choices=METHODS
    )
    op: str = setting("add", "How dfe combines features and context: {choices}.", panel=MODEL, choices=OPERATIONS)
    targets: str = setting(
        "hard",
        "hard: every other pair is a negative; soft: similar pairs are weaker negatives; printed: soft, with equation "
        "5's temperature as printed.",
        panel=TRAINING,
        choices=TARGETS,
    )
    views: str = setting(POOLED, "pooled, or tokens.", panel=MODEL, choices=(POOLED, TOKENS), old="view")
    width: int = setting(512, "Width of the common space.", panel=MODEL, least=ATTENTION_HEADS, most=MAX_WIDTH)
    dropout: float = setting(
        0.5, "In projections and the transformer block.", panel=MODEL, metavar="P", least=0, below=1
    )
    optimizer: str = setting("adamw", "{choices}.", panel=TRAINING, choices=OPTIMIZERS, unfit=UNFIT)
    lr: float = setting(1e-3, "Learning rate.", panel=TRAINING, above=0, most=MAX_RATE)
    weight_decay: float = setting(
        0.1, "L2 penalty; decoupled from the gradient in adamw.", panel=TRAINING, least=0, most=MAX_RATE
    )
    decay: str = setting(
        DECAY_WEIGHTS, "What weight decay applies to: weights of layers, or all parameters, with biases and norms.",
        panel=TRAINING, choices=(DECAY_WEIGHTS, DECAY_ALL), before=DECAY_ALL,
    )  # fmt: skip
    schedule: str = setting("cosine", "{choices}.", panel=TRAINING, choices=SCHEDULES)
    epochs: int = setting(100, "Maximum number of epochs.", panel=TRAINING, least=1)
    batch_size: int = setting(512, "Pairs compared with one another in a step.", panel=TRAINING, least=2)
    chunk_size: int = setting(
        0, "Pairs in memory at a time; the gradient is the same. 0: the batch.", panel=TRAINING, least=0
    )
    ema: float = setting(0.99, "Decay of averaged weights; 0: none.", panel=TRAINING, metavar="D", least=0, below=1)
    patience: int = setting(25, "Stop after N epochs without a better score on val; 0: never.", panel=TRAINING, least=0)
    monitor: str = setting(
        "r1",
        "The score on val: r1 (mean recall at 1 of both directions) or loss.",
        panel=TRAINING,
        choices=("r1", "loss"),
    )
    seed: int = setting(
        0, "Same seed, machine, libraries and threads: same result.", panel=TRAINING, least=0, most=2**63 - 1
    )

    def __post_init__(self) -> None:
        check_settings(self)
        if self.width % ATTENTION_HEADS:
            raise ConfigError(f"width must be a multiple of {ATTENTION_HEADS}. Got {self.width} instead")

    @property
    def label(self) -> str:
        """The name in tables: the method and, for a DFE, its operation."""
        return f"{self.method}-{self.op}" if self.method == "dfe" else self.method

    def to_dict(self) -> JsonObject:
        """Return the settings by their names in files."""
        return as_stored(AlignConfig, asdict(self))

    @classmethod
    def from_dict(cls, values: JsonObject) -> "AlignConfig":
        """Build from a run's file. Raises ConfigError for keys that are not settings."""
        return cls(**from_stored(cls, values))
