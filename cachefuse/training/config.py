"""The settings of one training."""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from numbers import Real
from typing import TYPE_CHECKING, Any, Self

from cachefuse.errors import ConfigError
from cachefuse.feature_spec import FLAT, POOLED, TOKENS
from cachefuse.files import JsonObject
from cachefuse.fusion import FUSIONS
from cachefuse.fusion.declared import defaults_of, list_options, list_parts, list_stages
from cachefuse.fusion.options import DERIVED_OPTIONS, changed_options
from cachefuse.metrics import METRICS, lower_is_better
from cachefuse.nn import ACTIVATIONS, HEADS, LOSSES
from cachefuse.registry import Options
from cachefuse.settings import as_stored, check_settings, from_stored, setting, settings_of
from cachefuse.training import DECAY_ALL, DECAY_WEIGHTS, OPTIMIZERS, SCHEDULES

if TYPE_CHECKING:
    from cachefuse.fusion.base import Fusion

MAX_WIDTH = 10**6  # of a hidden layer
MAX_RATE = 1e6  # far above any useful rate, and far below a float32 overflow
EPOCHS, MIN_STEPS = 50, 500  # small data gets more epochs, to reach MIN_STEPS
DROPOUT, BATCH_SIZE = 0.8, 256  # for fusions without their own defaults
LOSS = "loss"  # to monitor, in place of a metric
LBFGS_EPOCHS = 20  # of up to 100 iterations each
HEAD_SETTINGS = ("head", "layers", "activation")
TOGETHER = "together"
# Settings of heads and gradients, without effect on a fusion that is solved directly.
FITTED = (
    *HEAD_SETTINGS, "views", "ablate", "scheme", "stages", "dropout", "modality_dropout", "loss", "loss_options",
    "class_weights", "sampler", "optimizer", "lr", "schedule", "weight_decay", "decay", "clip_norm", "ema", "epochs",
    "batch_size", "accumulate", "patience", "monitor",
)  # fmt: skip
MODEL, TRAINING, CHOOSING = "Model", "Training", "Choosing and measuring"  # groups of settings


def _unless_fusion(name: str, default: str) -> Callable[[], str]:
    """Return a function that gives a setting's default for the help, with the fusions that have another default."""
    return lambda: "; ".join(filter(None, (default, defaults_of(name))))


@dataclass(frozen=True)
class TrainConfig:
    """The settings of a training: features, model, loss, optimization, validation.

    ``layers`` are hidden widths, None for the head's default. ``batch_size`` 0 means all rows; each batch is split into
    ``accumulate`` pieces. ``fusion_options`` are the fusion's keyword arguments; ``ablate`` names parts of the fusion
    to leave out. ``loss_options`` are the loss's keyword arguments; for asl the defaults are gamma_negative 3,
    gamma_positive 0 and clip 0.

    ``resolve`` returns a ``ResolvedConfig``. It replaces None by the fusion's default if it has one. Otherwise ``loss``
    is the task's (asl for multi-label, ce for multi-class, bce for answers to questions), ``lr`` the optimizer's,
    ``dropout`` 0.8, ``batch_size`` 256, ``weight_decay`` 0 (L-BFGS: 0.003), ``schedule`` cosine (L-BFGS: constant), and
    ``epochs`` 50, or more to reach 500 steps (L-BFGS: 20).

    ``stages`` of the fusion are trained one after the other, such as "warm-up" and then "tuning". ``shuffle``
    {modality: share} gives a share of the rows the modality of other rows, to test a fusion with irrelevant inputs.

    Training stops after ``patience`` epochs without a better validation score, and the best epoch's weights are kept; 0
    means never. ``monitor`` is the metric of that score, by default the dataset's first for which higher is better, or
    "loss": a lower validation loss is better.
    ``ema`` is the decay of averaged weights, which are then validated and kept; 0 means none.

    ``thresholds`` are one for all classes ("global"), one per class ("class") or 0.5 ("none"). They are chosen for
    ``threshold_metric`` on rows held out; "auto" means "global" if rows are held out. Before that, ``calibrate`` turns
    scores into probabilities, as ``fit_calibration`` learns it on the same rows. ``folds`` K trains K models, each
    measured on its fold of train and val; 0 holds out the dataset's val. ``duplicates`` "together" keeps rows with the
    same content, or nearly the same features, in one fold. ``members`` models with different seeds are averaged.
    ``refit`` trains them again at the end on all of train and val, with the chosen epochs and thresholds.
    """

    # fmt: off
    views: str = setting(
        POOLED, "pooled, or tokens (for head gmlp).",
        panel=MODEL, choices=(POOLED, TOKENS), old="view",
    )
    standardize: str = setting(
        "features", "features: to mean 0, deviation 1; rows: each to length 1; none: as stored.",
        panel=MODEL, choices=("none", "rows", "features"),
    )
    fusion: str = setting("sum", "{choices}.", panel=MODEL, choices=FUSIONS)
    fusion_options: Mapping[str, Any] = setting(dict, list_options, panel=MODEL)
    ablate: tuple[str, ...] = setting(
        (), lambda: f"Leave a part out. {list_parts()}", panel=MODEL, metavar="PART", old="without"
    )
    scheme: str = setting(
        "joint",
        "joint, or staged: each head alone, then the layers that join them.",
        panel=MODEL,
        choices=("joint", "staged"),
    )
    stages: tuple[str, ...] = setting(
        (), lambda: f"Stages to train in, one after the other. {list_stages()}", panel=MODEL, shown="one", repeats=True
    )
    head: str = setting("mlp", "{choices}.", panel=MODEL, choices=HEADS)
    layers: tuple[int, ...] | None = setting(
        None, "Hidden widths: 2048,512.", panel=MODEL, least=1, most=MAX_WIDTH, shown="512"
    )
    activation: str = setting("relu", "{choices}.", panel=MODEL, choices=ACTIVATIONS)
    dropout: float | None = setting(
        None, "Dropout in the head's hidden layers.", panel=MODEL, metavar="P", least=0, below=1,
        shown=_unless_fusion("dropout", f"{DROPOUT}"),
    )
    modality_dropout: float = setting(
        0.0, "Drop each modality of a row with this probability.", panel=MODEL, metavar="P", least=0, below=1
    )
    shuffle: Mapping[str, float] = setting(
        dict, "Replace a modality in a share of the rows by another row's, as an irrelevant input.",
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
        "shuffle", "shuffle, or balanced: draw rows of rare classes more often.",
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
        None, "L2 penalty; decoupled from the gradient in adamw.", panel=TRAINING, least=0, most=MAX_RATE,
        shown=_unless_fusion("weight_decay", "0; lbfgs: 0.003"),
    )
    decay: str = setting(
        DECAY_WEIGHTS, "What weight decay applies to: weights of layers, or all parameters, with biases and norms.",
        panel=TRAINING, choices=(DECAY_WEIGHTS, DECAY_ALL), before=DECAY_ALL,
    )
    clip_norm: float = setting(
        0.0, "Clip the gradient's norm; 0: never.", panel=TRAINING, least=0, most=MAX_RATE
    )
    ema: float = setting(
        0.0, "Decay of averaged weights (EMA), such as 0.999; 0: none.", panel=TRAINING, metavar="D", least=0, below=1
    )
    epochs: int | None = setting(
        None, "Maximum number of epochs.", panel=TRAINING, least=1, most=10**9,
        shown=_unless_fusion("epochs", f"{EPOCHS}, or {MIN_STEPS} steps; lbfgs: {LBFGS_EPOCHS}"),
    )
    batch_size: int | None = setting(
        None, "Rows per step, or all.", panel=TRAINING, words={"all": 0}, least=0, most=10**12,
        shown=_unless_fusion("batch_size", f"{BATCH_SIZE}"),
    )
    accumulate: int = setting(1, "Split each step's rows into N, to save memory.", panel=TRAINING, least=1, most=10**6)
    patience: int = setting(
        0, "Stop after N epochs without a better validation score; 0: never.", panel=TRAINING, least=0, most=10**9
    )
    monitor: str | None = setting(
        None,
        "The metric of the validation score, or loss: a lower validation loss is better.",
        panel=TRAINING,
        metavar="METRIC",
        shown="the dataset's first",
    )
    thresholds: str = setting(
        "auto", "global, class (one per class), none (0.5), or auto: global if rows are held out.",
        panel=CHOOSING, metavar="KIND", choices=("none", "global", "class", "auto"),
    )
    threshold_metric: str | None = setting(
        None, "Choose thresholds for micro_f1, macro_f1 or samples_f1.",
        panel=CHOOSING, metavar="METRIC", choices="cachefuse.metrics.thresholds:THRESHOLD_METRICS",
        shown="the dataset's first of them",
    )
    calibrate: str = setting(
        "none", "Make scores probabilities, learnt on rows held out: temperature, isotonic, or none.",
        panel=CHOOSING, metavar="KIND", choices=("none", "temperature", "isotonic"),
    )
    folds: int = setting(
        0, "Train K models on train and val, each measured on its held-out fold.",
        panel=CHOOSING, metavar="K", least=0, most=1000,
    )
    duplicates: str = setting(
        "anywhere", "In folds: anywhere, or together: copies and near copies of a row are in the same fold.",
        panel=CHOOSING, choices=("anywhere", TOGETHER),
    )
    members: int = setting(1, "Average S models with different seeds.", panel=CHOOSING, metavar="S", least=1, most=1000)
    refit: bool = setting(False, "Train again on all of train and val at the end.", panel=CHOOSING)
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
                raise ConfigError(f"fusion {self.fusion!r} has no part {name!r}; its parts are: {parts}")
        if self.accumulate > 1 and self.loss_options.get("reduction") == "sum":
            raise ConfigError("accumulate needs a mean loss; leave out loss option reduction=sum")
        if self.folds == 1:
            raise ConfigError("folds must be 0 for none, or at least 2. Got 1 instead")
        if self.duplicates == TOGETHER and not self.folds:
            raise ConfigError("duplicates 'together' is for folds; add --folds 5")
        if self.monitored_metric is not None:
            METRICS.check(self.monitored_metric)
        if self.monitor is not None and lower_is_better(self.monitor):
            raise ConfigError(f"monitor must be a metric for which higher is better. Got {self.monitor!r} instead")
        if self.monitor == LOSS and not self.patience:
            raise ConfigError("monitor 'loss' chooses the best epoch, which needs --patience N; add it")
        if self.optimizer == "lbfgs" and self.head != "linear":
            raise ConfigError(f"optimizer 'lbfgs' needs --head linear. Got head {self.head!r}; use adam or adamw")
        for name, value in self.loss_options.items():
            if name == "reduction" and value not in ("mean", "sum"):
                raise ConfigError(f"loss option reduction must be mean or sum. Got {value!r} instead")
            number = isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)
            if name != "reduction" and not number:
                raise ConfigError(f"loss option {name} must be a number. Got {value!r} instead")
        if self.optimizer == "lbfgs" and not self._fusion.linear:
            raise ConfigError(f"optimizer 'lbfgs' needs a linear model. Got fusion {self.fusion!r}; use adam or adamw")
        if self.optimizer == "lbfgs" and (self.schedule not in (None, "constant") or self.sampler != "shuffle"):
            raise ConfigError(
                "optimizer 'lbfgs' uses all rows in each step, at a constant rate; leave out --schedule and --sampler"
            )

    def reads(self, modality: str) -> tuple[str, ...]:
        """Return the views of a modality that the fusion reads."""
        views = self._fusion.views(modality, self.own_options())
        return (FLAT,) if self.views == TOKENS and views == (POOLED,) else views

    @property
    def chooses_epoch_on_val(self) -> bool:
        """Whether the rows that are reported also choose the epoch; with folds, other rows do."""
        return bool(self.patience and not self.folds)

    @property
    def monitored_metric(self) -> str | None:
        """The metric of the validation score; None for the dataset's main metric, also if the loss is monitored."""
        return None if self.monitor == LOSS else self.monitor

    @property
    def is_linear(self) -> bool:
        """Whether the model has only linear layers over pooled features, apart from hidden layers of its head."""
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
        """Whether the fusion writes the classes' names as text, without a head."""
        return bool(self._fusion.is_generative(self.fusion_options))

    def changed_options(self) -> Options:
        """Return the fusion's options that differ from its defaults, without those read from files or classes."""
        return changed_options(self._fusion, self.fusion_options)

    def shown(self) -> JsonObject:
        """Return the settings to show, without options read from files and settings without effect."""
        options = {name: value for name, value in self.fusion_options.items() if name not in DERIVED_OPTIONS}
        unused = FITTED if self.is_solved else HEAD_SETTINGS if self.is_generative else ()
        return {k: v for k, v in {**asdict(self), "fusion_options": options}.items() if k not in unused}

    def given(self, names: Iterable[str]) -> list[str]:
        """Return those of the named settings that differ from their defaults."""
        known = settings_of(type(self))
        return [name for name in names if getattr(self, name) != known[name].default]

    @property
    def n_trainings(self) -> int:
        """The number of models that are trained."""
        return self.members * (max(1, self.folds) + self.refit)

    @property
    def is_solved(self) -> bool:
        """Whether the fusion's weights are solved directly: settings of heads and gradients have no effect."""
        return bool(self._fusion.solved)

    @property
    def head_name(self) -> str:
        """The head's name; "decoder" for a generative fusion, the solver's for one that is solved directly."""
        return str(self._fusion.solver) if self.is_solved else "decoder" if self.is_generative else self.head

    def with_seed(self, seed: int) -> Self:
        return replace(self, seed=seed)

    def to_dict(self) -> JsonObject:
        """Return the settings by their names in files."""
        return as_stored(type(self), asdict(self))

    @classmethod
    def from_dict(cls, values: Options) -> "TrainConfig":
        """Build from the values in a run's file. Raises ConfigError for unknown keys."""
        return cls(**from_stored(cls, values))
