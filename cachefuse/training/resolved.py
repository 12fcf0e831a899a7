"""Settings of a training with none left open: as they were given, or else the fusion's own, or those of all others."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

from cachefuse.encoders.base import Origin
from cachefuse.errors import ConfigError
from cachefuse.files import JsonObject
from cachefuse.fusion import FUSIONS
from cachefuse.fusion.options import typed_options
from cachefuse.nn import HEADS
from cachefuse.registry import Options
from cachefuse.training.config import BATCH_SIZE, DROPOUT, EPOCHS, LBFGS_EPOCHS, MIN_STEPS, TrainConfig

TASK_LOSS = {"multiclass": "ce", "multilabel": "asl", "multitask": "asl", "vqa": "bce"}
# What won by cross-validation ("Defaults" in README.md): an ASL that spares easy negatives and cuts nothing.
LOSS_OPTIONS: dict[str, dict[str, float | str]] = {"asl": {"gamma_negative": 3.0, "gamma_positive": 0.0, "clip": 0.0}}
LEARNING_RATES = {"adam": 1e-3, "adamw": 1e-3, "lbfgs": 1.0, "sgd": 0.05}
LEARNING_RATE = 1e-3  # of optimizers of other packages
WEIGHT_DECAYS = {"lbfgs": 3e-3}  # of others 0: without it, so thorough an optimizer overfits


@dataclass(frozen=True)
class ResolvedConfig(TrainConfig):
    """Settings of which none is left open; ``resolve`` makes them of those that are given."""

    dropout: float = field(kw_only=True)
    loss: str = field(kw_only=True)
    lr: float = field(kw_only=True)
    schedule: str = field(kw_only=True)
    weight_decay: float = field(kw_only=True)
    epochs: int = field(kw_only=True)
    batch_size: int = field(kw_only=True)

    @property
    def effective_batch_size(self) -> int:
        """The batch size; 0 for all rows, which L-BFGS always takes."""
        return 0 if self.optimizer == "lbfgs" else self.batch_size

    def head_options(self) -> JsonObject:
        """Return the keyword arguments of the head; a linear head has no hidden layers to speak of."""
        layers = self.layers if self.layers is not None else HEADS[self.head].default_layers
        return {"layers": layers, "activation": self.activation, "dropout": self.dropout}

    def differences(self, task: str) -> JsonObject:
        """Return the settings that differ from those of a training with this head, loss and optimizer.

        Those three count by themselves, and the epochs that few rows take are among them.
        """
        mine = TrainConfig(fusion=self.fusion, head=self.head, loss=self.loss, optimizer=self.optimizer)
        common = {name: getattr(TrainConfig, name) for name in ("fusion", "head", "optimizer")}
        plain = replace(resolve(mine, task, 10**9), **common, loss=TASK_LOSS[task], fusion_options={})
        own = replace(self, fusion_options=self.changed_options())
        named = ((one.name, getattr(own, one.name)) for one in fields(self))
        return {name: value for name, value in named if value != getattr(plain, name)}

    @classmethod
    def from_run(cls, values: Options, task: str) -> "ResolvedConfig":
        """Build from the file of a run for a task.

        Raises ConfigError for keys that are not settings, and as ``resolve_loss`` does.
        """
        return _filled(TrainConfig.from_dict(values), task, 10**9)


def resolve(
    config: TrainConfig,
    task: str,
    n_rows: int,
    origins: Mapping[str, Origin] | None = None,
    classes: Sequence[str] = (),
) -> ResolvedConfig:
    """Return settings with none left open, for a task, its classes and so many rows to train on.

    ``origins`` says where features, by modality, are from. Raises ConfigError as ``resolve_loss`` does, and for options
    that the fusion does not have.
    """
    fusion, filled = FUSIONS[config.fusion], _filled(config, task, n_rows)
    return replace(
        filled,
        fusion_options=fusion.resolve_options(typed_options(fusion, config.fusion_options), origins or {}, classes),
        loss_options={**LOSS_OPTIONS.get(filled.loss, {}), **config.loss_options},
    )


def _filled(config: TrainConfig, task: str, n_rows: int) -> ResolvedConfig:
    """Return settings in which what is None is the fusion's own, or else that of all others."""
    own, lbfgs = FUSIONS[config.fusion].defaults, config.optimizer == "lbfgs"

    def of(name: str, usual: Any) -> Any:
        given = getattr(config, name)
        return own.get(name, usual) if given is None else given

    rate = LEARNING_RATES.get(config.optimizer, LEARNING_RATE)
    fusions_rate = config.optimizer in ("adam", "adamw")  # which a fusion's own rate is for
    batch_size = of("batch_size", BATCH_SIZE)
    steps = -(-n_rows // ((0 if lbfgs else batch_size) or n_rows))
    values = {one.name: getattr(config, one.name) for one in fields(config)}
    return ResolvedConfig(
        **{
            **values,
            "dropout": of("dropout", DROPOUT),
            "loss": resolve_loss(config, task),
            "lr": of("lr", rate) if fusions_rate or config.lr is not None else rate,
            "schedule": config.schedule or ("constant" if lbfgs else "cosine"),
            "weight_decay": of("weight_decay", WEIGHT_DECAYS.get(config.optimizer, 0.0)),
            "epochs": of("epochs", LBFGS_EPOCHS if lbfgs else max(EPOCHS, -(-MIN_STEPS // steps))),
            "batch_size": batch_size,
        }
    )


def resolve_loss(config: TrainConfig, task: str) -> str:
    """Return the loss for a task. Raises ConfigError if it can't be trained with the one that was asked for."""
    if task not in TASK_LOSS:
        raise ConfigError(why_no_head(task))
    if config.is_generative:
        _check_writing(config, task)
        return "ce"
    if config.loss == "ce" and task == "multilabel":
        raise ConfigError("loss 'ce' is for one label a row; a multi-label task takes asl, bce or focal")
    return config.loss or TASK_LOSS[task]


def _check_writing(config: TrainConfig, task: str) -> None:
    if task not in ("multiclass", "vqa"):
        raise ConfigError(f"answers=text writes one answer a row, which a {task} task does not have")
    if config.loss not in (None, "ce"):
        raise ConfigError(f"answers=text learns by the probability of what is written: loss ce. Got {config.loss!r}")
    if config.class_weights != "none" or config.loss_options:
        raise ConfigError("answers=text takes no class weights or loss options; leave them out")


def why_no_head(task: str) -> str:
    """Return why there is no head to train on a dataset, and what to do instead, for a task that has no loss."""
    if task == "retrieval":
        return f"a {task} dataset has no labels, so there is no head to train on it"
    return f"a {task} dataset is about pairs of sentences: measure them with cachefuse similarity"
