"""The settings of one training, checked once."""

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, Self

from cachefuse.errors import ConfigError
from cachefuse.feature_spec import FLAT, POOLED, TOKENS
from cachefuse.files import JsonObject
from cachefuse.fusion import FUSIONS
from cachefuse.fusion.declared import defaults_of, list_options, list_parts, list_stages
from cachefuse.fusion.options import FOUND, changed_options
from cachefuse.metrics import METRICS, lower_is_better
from cachefuse.nn import ACTIVATIONS, HEADS, LOSSES
from cachefuse.registry import Options
from cachefuse.settings import as_stored, check_settings, from_stored, setting
from cachefuse.training import OPTIMIZERS, SCHEDULES

if TYPE_CHECKING:
    from cachefuse.fusion.base import Fusion

MAX_WIDTH = 10**6  # of a hidden layer
MAX_RATE = 1e6  # far beyond what trains, and far from where float32 overflows
EPOCHS, MIN_STEPS = 50, 500  # small data take more epochs, to make as many steps
DROPOUT, BATCH_SIZE = 0.8, 256  # of fusions that have no defaults of their own
LBFGS_EPOCHS = 20  # of up to 20 iterations each
HEAD_SETTINGS = ("head", "layers", "activation")
MODEL, TRAINING, CHOOSING = "Model", "Training", "Choosing and measuring"  # groups of settings


def _unless_fusion(name: str, usual: str) -> Callable[[], str]:
    """Return what says a setting's default, which some fusions have of their own."""
    return lambda: "; ".join(filter(None, (usual, defaults_of(name))))


@dataclass(frozen=True)
class TrainConfig:
    """How a head is trained, and on which view of the features.

    ``layers`` are hidden widths, or None for the head's own; ``batch_size`` 0 means all rows, which pass the model in
    ``accumulate`` parts. ``fusion_options`` are the fusion's keyword arguments, ``ablate`` names parts of it to leave
    out. ``loss_options`` are the loss's keyword arguments; those of asl are gamma_negative 3, gamma_positive 0 and clip
    0 unless told. ``resolve`` makes a ``ResolvedConfig`` of it, with a value for each None:
    the task's ``loss`` (asl for multi-label, ce for multi-class, bce for answers to questions), what the fusion has
    defaults of its own for, the optimizer's ``lr``, ``dropout`` 0.8, ``batch_size`` 256, ``weight_decay`` 0 (0.003 for
    L-BFGS), ``schedule`` cosine (constant for L-BFGS), ``epochs`` 50 or as many as make 500 steps (L-BFGS: 20).

    ``stages`` are those that the fusion's weights are trained in, one after the other, as "warm-up" and then "tuning".
    ``shuffle`` {modality: share} gives so many of the rows another row's, to see how a fusion bears what is irrelevant.

    ``patience`` is the epochs without a better validation score after which training stops, 0 for never; the best
    epoch's weights are kept while it is on. ``monitor`` is the metric of that score, None for the first of the
    dataset's that is higher for a better model. ``ema`` is the decay of averaged weights, which are then the ones kept;
    0 for none.

    ``thresholds`` are one for all classes ("global"), one a class, or 0.5 ("none"), chosen for ``threshold_metric`` on
    rows held out; "auto" chooses one where there are such rows. ``folds`` K trains K models, each measured on the part
    of train and val that it has not seen; 0 takes the dataset's val. ``members`` models that differ in their seed are
    averaged. ``refit`` trains them once more on all of train and val, when epochs and thresholds are chosen.
    """

    # fmt: off
    views: str = setting(
        POOLED, "pooled, or tokens, which head gmlp gates along.",
        panel=MODEL, choices=(POOLED, TOKENS), old="view",
    )
    fusion: str = setting("sum", "{choices}.", panel=MODEL, choices=FUSIONS)
    fusion_options: Mapping[str, Any] = setting(dict, list_options, panel=MODEL)
    ablate: tuple[str, ...] = setting(
        (), lambda: f"Leave a part out. {list_parts()}", panel=MODEL, metavar="PART", old="without"
    )
    scheme: str = setting(
        "joint", "joint, or staged: each head alone, then what joins them.", panel=MODEL, choices=("joint", "staged")
    )
    stages: tuple[str, ...] = setting(
        (), lambda: f"Stages to train in, one after the other. {list_stages()}", panel=MODEL, shown="one"
    )
    head: str = setting("mlp", "{choices}.", panel=MODEL, choices=HEADS)
    layers: tuple[int, ...] | None = setting(
        None, "Hidden widths: 2048,512.", panel=MODEL, least=1, most=MAX_WIDTH, shown="512"
    )
    activation: str = setting("relu", "{choices}.", panel=MODEL, choices=ACTIVATIONS)
    dropout: float | None = setting(
        None, "In the head's hidden layers.", panel=MODEL, metavar="P", least=0, below=1,
        shown=_unless_fusion("dropout", f"{DROPOUT}"),
    )
    modality_dropout: float = setting(
        0.0, "Train without each modality in so many of the rows.", panel=MODEL, metavar="P", least=0, below=1
    )
    shuffle: Mapping[str, float] = setting(
        dict, "Give a share of the rows another's: what if it is irrelevant?",
        panel=TRAINING, metavar="MODALITY=X", least=0, most=1,
    )
    loss: str | None = setting(None, "{choices}.", panel=TRAINING, choices=LOSSES, shown="asl, multi-class: ce")
    loss_options: Mapping[str, float | str] = setting(
        dict, "asl: gamma_negative 3, gamma_positive 0, clip 0; focal: gamma 3; ce: smoothing 0; all: reduction mean.",
        panel=TRAINING,
    )
    class_weights: str = setting(
        "none", "none, balanced, or effective (number of rows).",
        panel=TRAINING, choices=("none", "balanced", "effective"),
    )
    sampler: str = setting(
        "shuffle", "shuffle, or balanced: rows of rare classes more often.",
        panel=TRAINING, choices=("shuffle", "balanced"),
    )
    optimizer: str = setting("adam", "{choices}.", panel=TRAINING, choices=OPTIMIZERS)
    lr: float | None = setting(
        None, "Learning rate.", panel=TRAINING, above=0, most=MAX_RATE,
        shown=_unless_fusion("lr", "1e-3, sgd: 0.05, lbfgs: 1"),
    )
    schedule: str | None = setting(
        None, "{choices}.", panel=TRAINING, choices=SCHEDULES, shown="cosine; lbfgs: constant"
    )
    weight_decay: float | None = setting(
        None, "L2 penalty; apart from the gradient in adamw.", panel=TRAINING, least=0, most=MAX_RATE,
        shown=_unless_fusion("weight_decay", "0; lbfgs: 0.003"),
    )
    clip_norm: float = setting(
        0.0, "Clip the gradient's norm; 0: never.", panel=TRAINING, least=0, most=MAX_RATE
    )
    ema: float = setting(
        0.0, "Decay of averaged weights, such as 0.999; 0: none.", panel=TRAINING, metavar="D", least=0, below=1
    )
    epochs: int | None = setting(
        None, "At most.", panel=TRAINING, least=1, most=10**9,
        shown=_unless_fusion("epochs", f"{EPOCHS}, or {MIN_STEPS} steps; lbfgs: {LBFGS_EPOCHS}"),
    )
    batch_size: int | None = setting(
        None, "Rows a step, or all.", panel=TRAINING, words={"all": 0}, least=0, most=10**12,
        shown=_unless_fusion("batch_size", f"{BATCH_SIZE}"),
    )
    accumulate: int = setting(
        1, "Pass a step's rows in N parts, where they take too much memory.", panel=TRAINING, least=1, most=10**6
    )
    patience: int = setting(
        0, "Stop after N epochs without a better validation score; 0: never.", panel=TRAINING, least=0, most=10**9
    )
    monitor: str | None = setting(
        None, "What that score is.", panel=TRAINING, metavar="METRIC", choices=METRICS, shown="the dataset's first"
    )
    thresholds: str = setting(
        "auto", "global, class (one a class), none (0.5), or auto: global where rows are held out.",
        panel=CHOOSING, metavar="KIND", choices=("none", "global", "class", "auto"),
    )
    threshold_metric: str | None = setting(
        None, "Choose them for micro_f1, macro_f1 or samples_f1.",
        panel=CHOOSING, metavar="METRIC", choices="cachefuse.metrics.thresholds:THRESHOLD_METRICS",
        shown="the dataset's first such",
    )
    folds: int = setting(
        0, "Train K models on train and val, each measured on what it has not seen.",
        panel=CHOOSING, metavar="K", least=0, most=1000,
    )
    members: int = setting(
        1, "Average S models that differ in their seed.", panel=CHOOSING, metavar="S", least=1, most=1000
    )
    refit: bool = setting(False, "Then train on all of train and val.", panel=CHOOSING)
    seed: int = setting(
        0, "Same seed, machine, libraries and threads: same result.", panel=CHOOSING, least=0, most=2**63 - 1
    )
    # fmt: on

    def __post_init__(self) -> None:
        check_settings(self)
        self._check_together()

    def _check_together(self) -> None:
        for name in self.ablate:
            if name not in self._fusion.parts:
                parts = ", ".join(self._fusion.parts) or "none"
                raise ConfigError(f"fusion {self.fusion!r} has no {name!r} to leave out; its parts are: {parts}")
        if self.accumulate > 1 and self.loss_options.get("reduction") == "sum":
            raise ConfigError("accumulate adds up the parts of a mean; leave out loss option reduction=sum")
        if self.folds == 1:
            raise ConfigError("folds must be 0 for none, or at least 2. Got 1 instead")
        if self.monitor is not None and lower_is_better(self.monitor):
            raise ConfigError(
                f"monitor must be a metric that is higher for a better model. Got {self.monitor!r} instead"
            )
        if self.optimizer == "lbfgs" and self.head != "linear":
            raise ConfigError(f"optimizer 'lbfgs' is for --head linear. Got head {self.head!r}; take adam or adamw")
        for name, value in self.loss_options.items():
            if name == "reduction" and value not in ("mean", "sum"):
                raise ConfigError(f"loss option reduction must be mean or sum to train by. Got {value!r} instead")
            number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
            if name != "reduction" and not number:
                raise ConfigError(f"loss option {name} must be a number. Got {value!r} instead")
        if self.optimizer == "lbfgs" and not self._fusion.linear:
            raise ConfigError(f"optimizer 'lbfgs' is for linear models. Got fusion {self.fusion!r}; take adam or adamw")
        if self.optimizer == "lbfgs" and (self.schedule not in (None, "constant") or self.sampler != "shuffle"):
            raise ConfigError(
                "optimizer 'lbfgs' takes all rows in each step, at a constant rate; leave out --schedule and --sampler"
            )

    def reads(self, modality: str) -> tuple[str, ...]:
        """Return the views that are read of a modality."""
        views = self._fusion.views(modality, self.own_options())
        return (FLAT,) if self.views == TOKENS and views == (POOLED,) else views

    @property
    def is_linear(self) -> bool:
        """Whether the model's weights are all in linear layers over pooled features, its head's hidden ones aside."""
        return bool(self._fusion.linear) and self.views == POOLED

    @property
    def mixed_precision(self) -> bool:
        """Whether the model is trained in bfloat16 on CUDA."""
        return bool(self._fusion.mixed_precision)

    def own_options(self) -> JsonObject:
        """Return the keyword arguments of the fusion."""
        return {**self.fusion_options, **({"ablate": self.ablate} if self.ablate else {})}

    @property
    def _fusion(self) -> "type[Fusion]":
        return FUSIONS[self.fusion]

    @property
    def is_generative(self) -> bool:
        """Whether the fusion writes the classes' names, and has no head."""
        return bool(self._fusion.is_generative(self.fusion_options))

    def changed_options(self) -> Options:
        """Return the fusion's options that are not its own; what was found in files or classes is left out."""
        return changed_options(self._fusion, self.fusion_options)

    def shown(self) -> JsonObject:
        """Return the settings as they are read: without what was found in files, or plays no part."""
        options = {name: value for name, value in self.fusion_options.items() if name not in FOUND}
        idle = HEAD_SETTINGS if self.is_generative else ()
        return {k: v for k, v in {**asdict(self), "fusion_options": options}.items() if k not in idle}

    @property
    def head_name(self) -> str:
        """What makes the logits: a head, or a decoder."""
        return "decoder" if self.is_generative else self.head

    def with_seed(self, seed: int) -> Self:
        return replace(self, seed=seed)

    def to_dict(self) -> JsonObject:
        """Return the settings by their names in files."""
        return as_stored(type(self), asdict(self))

    @classmethod
    def from_dict(cls, values: Options) -> "TrainConfig":
        """Build from a run's file. Raises ConfigError for keys that are not settings."""
        return cls(**from_stored(cls, values))
