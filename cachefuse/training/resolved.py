"""Resolved settings of a training: given values, else the fusion's defaults, else the general defaults."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, Self

from cachefuse.encoders.base import Origin
from cachefuse.errors import ConfigError
from cachefuse.files import JsonObject
from cachefuse.fusion import FUSIONS
from cachefuse.fusion.options import typed_options
from cachefuse.nn import HEADS
from cachefuse.registry import Options
from cachefuse.settings import with_older
from cachefuse.training import DECAY_WEIGHTS
from cachefuse.training.config import BATCH_SIZE, DROPOUT, EPOCHS, FITTED, LBFGS_EPOCHS, MIN_STEPS, TrainConfig

TASK_LOSS = {"multiclass": "ce", "multilabel": "asl", "multitask": "asl", "vqa": "bce"}
# Best in cross-validation ("Defaults" in README.md): ASL with less weight on easy negatives, and without a clip.
LOSS_OPTIONS: dict[str, dict[str, float | str]] = {"asl": {"gamma_negative": 3.0, "gamma_positive": 0.0, "clip": 0.0}}
LEARNING_RATES = {"adam": 1e-3, "adamw": 1e-3, "lbfgs": 1.0, "sgd": 0.05}
LEARNING_RATE = 1e-3  # for optimizers from other packages
WEIGHT_DECAYS = {"lbfgs": 3e-3}  # 0 for the others; L-BFGS converges fully and overfits without it


@dataclass(frozen=True)
class ResolvedConfig(TrainConfig):
    """Settings without None for a default; made by ``resolve`` from given settings."""

    dropout: float = field(kw_only=True)
    loss: str = field(kw_only=True)
    lr: float = field(kw_only=True)
    schedule: str = field(kw_only=True)
    weight_decay: float = field(kw_only=True)
    epochs: int = field(kw_only=True)
    batch_size: int = field(kw_only=True)

    @property
    def effective_batch_size(self) -> int:
        """The batch size; 0 for all rows, as always with L-BFGS."""
        return 0 if self.optimizer == "lbfgs" else self.batch_size

    def head_options(self) -> JsonObject:
        """Return the keyword arguments of the head."""
        layers = self.layers if self.layers is not None else HEADS[self.head].default_layers
        return {"layers": layers, "activation": self.activation, "dropout": self.dropout}

    def with_sizes(self, fusion: Any) -> Self:
        """Return the settings with the sizes of a fusion that was solved directly."""
        if not self.is_solved:
            return self
        return replace(self, fusion_options={**self.fusion_options, **fusion.sizes()})

    def differences(self, task: str) -> JsonObject:
        """Return the settings that differ from the defaults of this fusion, head, loss and optimizer.

        The result contains a fusion, head, loss or optimizer that is not the task's default, and epochs that were
        raised for few rows.
        """
        chosen = TrainConfig(fusion=self.fusion, head=self.head, loss=self.loss, optimizer=self.optimizer)
        common = {name: getattr(TrainConfig, name) for name in ("fusion", "head", "optimizer")}
        default = replace(resolve(chosen, task, 10**9), **common, loss=TASK_LOSS[task], fusion_options={})
        changed = replace(self, fusion_options=self.changed_options())
        named = ((known.name, getattr(changed, known.name)) for known in fields(self))
        unused = FITTED if self.is_solved else ()
        return {name: value for name, value in named if name not in unused and value != getattr(default, name)}

    @classmethod
    def from_run(cls, values: Options, task: str) -> "ResolvedConfig":
        """Build from the values in a run's file, for a task.

        Raises ConfigError for unknown keys, and as ``resolve_loss`` does.
        """
        return _filled(TrainConfig.from_dict(with_older(TrainConfig, values)), task, 10**9)


def resolve(
    config: TrainConfig,
    task: str,
    n_rows: int,
    origins: Mapping[str, Origin] | None = None,
    classes: Sequence[str] = (),
) -> ResolvedConfig:
    """Return the settings with every None resolved, for a task, its classes and ``n_rows`` training rows.

    ``origins`` are the encoders of the features, by modality. Raises ConfigError as ``resolve_loss`` does, and for
    options that the fusion does not have.
    """
    if config.is_solved and (unused := config.given(name for name in FITTED if name != "loss")):
        raise ConfigError(
            f"fusion {config.fusion!r} is solved directly: {unused[0]} has no effect; leave it out, or choose "
            f"another fusion"
        )
    fusion, filled = FUSIONS[config.fusion], _filled(config, task, n_rows)
    return replace(
        filled,
        fusion_options=fusion.resolve_options(typed_options(fusion, config.fusion_options), origins or {}, classes),
        loss_options={**LOSS_OPTIONS.get(filled.loss, {}), **config.loss_options},
    )


def _filled(config: TrainConfig, task: str, n_rows: int) -> ResolvedConfig:
    """Return the settings with None replaced by the fusion's defaults, else by the general defaults."""
    fusion_defaults, lbfgs = FUSIONS[config.fusion].defaults, config.optimizer == "lbfgs"

    def value_of(name: str, default: Any) -> Any:
        given = getattr(config, name)
        return fusion_defaults.get(name, default) if given is None else given

    rate = LEARNING_RATES.get(config.optimizer, LEARNING_RATE)
    is_adam = config.optimizer in ("adam", "adamw")  # a fusion's default rate is only for these
    batch_size = value_of("batch_size", BATCH_SIZE)
    steps = -(-n_rows // ((0 if lbfgs else batch_size) or n_rows))
    values = {known.name: getattr(config, known.name) for known in fields(config)}
    weight_decay = value_of("weight_decay", WEIGHT_DECAYS.get(config.optimizer, 0.0))
    return ResolvedConfig(
        **{
            **values,
            "dropout": value_of("dropout", DROPOUT),
            "loss": resolve_loss(config, task),
            "lr": value_of("lr", rate) if is_adam or config.lr is not None else rate,
            "schedule": config.schedule or ("constant" if lbfgs else "cosine"),
            "weight_decay": weight_decay,
            "decay": config.decay if weight_decay else DECAY_WEIGHTS,  # without effect
            "epochs": value_of("epochs", LBFGS_EPOCHS if lbfgs else max(EPOCHS, -(-MIN_STEPS // steps))),
            "batch_size": batch_size,
        }
    )


def resolve_loss(config: TrainConfig, task: str) -> str:
    """Return the loss for a task. Raises ConfigError if the given loss does not fit the task."""
    if task not in TASK_LOSS:
        raise ConfigError(why_no_head(task))
    if config.is_generative:
        _check_writing(config, task)
        return "ce"
    if config.is_solved:
        return _check_closed(config, task)
    if config.loss == "ce" and task == "multilabel":
        raise ConfigError("loss 'ce' is for one label per row; for a multi-label task use asl, bce or focal")
    return config.loss or TASK_LOSS[task]


def _check_writing(config: TrainConfig, task: str) -> None:
    if task not in ("multiclass", "vqa"):
        raise ConfigError(f"answers=text writes one answer per row, so it does not fit a {task} task")
    if config.loss not in (None, "ce"):
        raise ConfigError(f"answers=text is trained with loss ce. Got {config.loss!r} instead")
    if config.class_weights != "none" or config.loss_options:
        raise ConfigError("answers=text has no class weights and no loss options; leave them out")


def _check_closed(config: TrainConfig, task: str) -> str:
    """Return the loss by which scores of such a fusion are probabilities."""
    if task == "vqa":
        raise ConfigError(f"fusion {config.fusion!r} does not fit questions with answers; choose another fusion")
    loss = "ce" if task == "multiclass" else "bce"
    if config.loss not in (None, loss) and (task != "multitask" or config.loss != "ce"):
        raise ConfigError(
            f"fusion {config.fusion!r} is solved directly, without loss {config.loss!r}; leave it out, or choose "
            f"another fusion"
        )
    return config.loss or loss


def why_no_head(task: str) -> str:
    """Return the message for a task without a loss: the reason why it has no head, and the command to use instead."""
    if task == "retrieval":
        return f"a {task} dataset has no labels, so no head can be trained on it; use cachefuse align"
    return f"a {task} dataset has pairs of sentences, so no head can be trained on it; use cachefuse similarity"
