"""How several tasks share the settings of one training: each takes the loss that fits it."""

from collections.abc import Sequence
from dataclasses import replace

from cachefuse.errors import ConfigError
from cachefuse.fusion import FUSIONS
from cachefuse.metrics.tasks import TaskSlice
from cachefuse.training.config import TrainConfig
from cachefuse.training.resolved import TASK_LOSS

END_TO_END = "end-to-end"  # the stage of the paper that no cache allows


def loss_of(task: TaskSlice, loss: str) -> str:
    """Return the loss of a task in a training by ``loss``: that one if it fits, and else the usual one of its kind.

    Among several tasks, ce fits those that are multi-class, and the others those that are multi-label.
    """
    fits = not task.name or (loss == "ce") == (task.kind == "multiclass")
    return loss if fits else TASK_LOSS[task.kind]


def resolve_tasks(config: TrainConfig, tasks: Sequence[TaskSlice]) -> TrainConfig:
    """Return settings with the loss of several tasks, asl if any is multi-label and else ce, unless it is given.

    Raises ConfigError for a loss that fits none of them, and for settings that are for one task.
    """
    if not tasks[0].name:
        return config
    kinds = {task.kind for task in tasks}
    loss = config.loss or TASK_LOSS["multilabel" if "multilabel" in kinds else "multiclass"]
    if all(loss_of(task, loss) != loss for task in tasks):
        names = ", ".join(task.name for task in tasks)
        fit = "multi-class and take ce" if "multiclass" in kinds else "multi-label and take asl, bce or focal"
        raise ConfigError(f"loss {loss!r} fits none of the tasks {names}: they are {fit}")
    if config.sampler == "balanced":
        raise ConfigError("sampler 'balanced' draws rows by the classes of one task; take --class-weights balanced")
    if config.monitor is not None:
        raise ConfigError(
            "of several tasks the mean of their main metrics is monitored; list another first in the manifest's metrics"
        )
    return replace(config, loss=loss)


def check_stages(config: TrainConfig) -> None:
    """Raise ConfigError for stages of training that the fusion, or a cache of features, does not have."""
    if not config.stages:
        return
    stages = FUSIONS[config.fusion].stages
    if END_TO_END in config.stages:
        raise ConfigError(
            f"stage {END_TO_END!r} would train the encoders, which are frozen here: features are read from the cache. "
            f"Fusion lit tunes a text model, and cachefuse fine-tune the encoder of an alignment"
        )
    if not stages:
        raise ConfigError(f"fusion {config.fusion!r} is trained in one stage; leave out --stages")
    if config.stages != stages[: len(config.stages)]:
        raise ConfigError(
            f"stages of fusion {config.fusion!r} are {','.join(stages)}, in this order. "
            f"Got {','.join(config.stages)} instead"
        )
    if config.scheme == "staged":
        raise ConfigError("scheme 'staged' has stages of its own, a head each; leave out --stages")
