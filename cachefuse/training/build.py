"""What the training of one model and of many at once have in common."""

from collections.abc import Mapping, Sequence
from functools import partial

from cachefuse.device import seed_everything
from cachefuse.fusion import FUSIONS
from cachefuse.fusion.model import FusionModel
from cachefuse.metrics.tasks import TaskSlice
from cachefuse.nn import HEADS
from cachefuse.nn.losses import Loss, build_loss, class_weights, per_task
from cachefuse.training.config import LOSS_OPTIONS, TrainConfig
from cachefuse.training.data import TrainingData, TrainingSet
from cachefuse.training.tasks import loss_of


def untrained_model(data: TrainingData, config: TrainConfig) -> FusionModel:
    """Build the model that the settings describe, from their seed, on the problem's device."""
    seed_everything(config.seed)
    model = build_model(config, data.widths, len(data.classes), data.tasks)
    model.fusion.initialize()
    return model.to(data.device)


def training_loss(data: TrainingData, config: TrainConfig, training_set: TrainingSet, **options: str) -> Loss:
    """Return the settings' loss, with the class weights that they ask for, and other ``options`` than theirs.

    Of several tasks it is the mean of each one's own, as ``loss_of`` says; the settings' options are for their loss.
    """
    given = config.resolve_loss(data.task)
    reduction = {name: value for name, value in config.loss_options.items() if name == "reduction"}

    def of_task(task: TaskSlice) -> Loss:
        name, weights = loss_of(task, given), None
        own = config.loss_options if name == given else {**LOSS_OPTIONS.get(name, {}), **reduction}
        if config.class_weights != "none":
            targets = training_set.targets
            targets = targets[task.labelled(targets), task.columns]
            kind = "multiclass" if name == "ce" else task.kind  # a softmax weighs rows, and not each of their labels
            weights = class_weights(targets, config.class_weights, kind)
        return build_loss(name, {**own, **options}, weights)

    if not data.tasks[0].name:
        return of_task(data.tasks[0])
    return per_task([(task.columns, of_task(task)) for task in data.tasks])


def build_model(
    config: TrainConfig, widths: Mapping[str, int], n_classes: int, tasks: Sequence[TaskSlice] = ()
) -> FusionModel:
    """Build the untrained model that the settings describe, for features of the given widths by name.

    Its logits are those of ``n_classes``; a fusion that has parts for each of several ``tasks`` is told of them.
    """
    head = partial(HEADS[config.head], **config.head_options())
    fusion, options = FUSIONS[config.fusion], config.own_options()
    named = {task.name: task.n_classes for task in tasks if task.name}
    if named and fusion.per_task:
        options["tasks"] = named
    return FusionModel(fusion(dict(widths), n_classes, head, **options))
