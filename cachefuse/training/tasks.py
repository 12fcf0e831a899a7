"""One training for several tasks: each task gets a loss that fits it."""

from collections.abc import Sequence
from dataclasses import replace

from cachefuse.errors import ConfigError
from cachefuse.fusion import FUSIONS
from cachefuse.metrics.tasks import TaskSlice
from cachefuse.printable import listed
from cachefuse.training.config import TrainConfig
from cachefuse.training.resolved import TASK_LOSS

END_TO_END = "end-to-end"  # a stage of the paper that cannot use a cache


def loss_of(task: TaskSlice, loss: str) -> str:
    """Return the loss of one task: ``loss`` if it fits the task, else the default of its kind.

    With several tasks, ce fits multi-class tasks, and the other losses fit multi-label tasks.
    """
    fits = not task.name or (loss == "ce") == (task.kind == "multiclass")
    return loss if fits else TASK_LOSS[task.kind]


def resolve_tasks(config: TrainConfig, tasks: Sequence[TaskSlice]) -> TrainConfig:
    """Return settings with a loss for several tasks: the given loss, else asl if a task is multi-label, else ce.

    Raises ConfigError for a loss that fits no task, and for settings that need a single task.
    """
    if not tasks[0].name:
        return config
    kinds = {task.kind for task in tasks}
    several = "bce" if config.is_solved else TASK_LOSS["multilabel"]
    loss = config.loss or (several if "multilabel" in kinds else TASK_LOSS["multiclass"])
    if all(loss_of(task, loss) != loss for task in tasks):
        names = listed(task.name for task in tasks)
        fit = "multi-class and need ce" if "multiclass" in kinds else "multi-label and need asl, bce or focal"
        raise ConfigError(f"loss {loss!r} fits none of the tasks {names}, which are {fit}")
    if config.sampler == "balanced":
        raise ConfigError("sampler 'balanced' needs a single task; use --class-weights balanced")
    if config.monitored_metric is not None:
        raise ConfigError(
            "with several tasks, the mean of their main metrics is monitored; leave out --monitor, use --monitor loss, "
            "or change the manifest's metrics"
        )
    return replace(config, loss=loss)


def check_stages(config: TrainConfig) -> None:
    """Raise ConfigError for stages that the fusion does not have, or that cannot use cached features."""
    if not config.stages:
        return
    stages = FUSIONS[config.fusion].stages
    if END_TO_END in config.stages:
        raise ConfigError(
            f"stage {END_TO_END!r} would train the encoders, but cached features need frozen encoders; "
            f"leave it out, or use fusion lit, which fine-tunes a text model, or cachefuse fine-tune"
        )
    if not stages:
        raise ConfigError(f"fusion {config.fusion!r} is trained in one stage; leave out --stages")
    if config.stages != stages[: len(config.stages)]:
        raise ConfigError(
            f"stages of fusion {config.fusion!r} are {','.join(stages)}, in this order. "
            f"Got {','.join(config.stages)} instead"
        )
    if config.scheme == "staged":
        raise ConfigError("scheme 'staged' already has one stage per head; leave out --stages")
