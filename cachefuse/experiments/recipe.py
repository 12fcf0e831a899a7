"""Presets as data: what a paper states, and where; and what was chosen where it states nothing, and why."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from cachefuse.files import JsonObject
from cachefuse.registry import Options
from cachefuse.training.config import TrainConfig

CROSS_ENTROPY = "cross-entropy"  # stands for ce or bce, as the data's task is
MULTITASK = "multitask"


@dataclass(frozen=True)
class Stated:
    """A setting that a paper states, its value, and the section, table or figure.

    "fusion_options.depth" is the option depth of the fusion.
    """

    name: str
    value: Any
    source: str


@dataclass(frozen=True)
class Chosen:
    """A setting that a paper does not state, or not clearly; our value and the reason."""

    name: str
    value: Any
    reason: str


@dataclass(frozen=True)
class Recipe:
    """All settings of a paper's experiment: each is stated, chosen, varied, or idle.

    ``varies`` names the settings that the experiment tries, with the table or figure. ``idle`` settings have no effect
    or are the user's own, with the reason. ``for_tasks`` are stated for several tasks at once. ``features`` are stated
    of the data and of ``extract``; they are shown, not applied. ``notes`` are differences that no setting covers.
    """

    paper: str
    title: str
    stated: Sequence[Stated]
    chosen: Sequence[Chosen]
    idle: Mapping[str, str]
    varies: Mapping[str, str] = field(default_factory=dict)
    for_tasks: Sequence[Stated] = ()
    features: Sequence[Stated] = ()
    notes: Sequence[str] = ()

    def but(
        self,
        title: str,
        *stated: Stated,
        chosen: Sequence[Chosen] = (),
        idle: Options | None = None,
        varies: Mapping[str, str] | None = None,
    ) -> "Recipe":
        """Return this recipe with other settings; each replaces the one of its name."""
        new = {*(known.name for known in stated), *(known.name for known in chosen), *(idle or {})}
        return replace(
            self,
            title=title,
            stated=(*(known for known in self.stated if known.name not in new), *stated),
            chosen=(*(known for known in self.chosen if known.name not in new), *chosen),
            idle={**{name: reason for name, reason in self.idle.items() if name not in new}, **(idle or {})},
            varies=varies or {},
        )

    def values(self, task: str = "") -> dict[str, Any]:
        """Return the values by name, for a task; the options of a fusion are in one mapping."""
        values: dict[str, Any] = {}
        for_tasks = self.for_tasks if task == MULTITASK else ()
        settings: list[Stated | Chosen] = [*self.stated, *self.chosen, *for_tasks]
        for known in settings:
            name, _, option = known.name.partition(".")
            if option:
                values.setdefault(name, {})[option] = known.value
            else:
                values[name] = known.value
        return values

    def train_config(self, task: str, kinds: Collection[str], changes: Options | None = None) -> TrainConfig:
        """Return the settings of a training for a task; ``kinds`` are the kinds of its tasks, if it has several.

        ``changes`` replace settings. Options of the same fusion are added to those of the recipe, those of another
        fusion replace them. Another head has its own layers. A patience of all epochs stays one.
        """
        values = self.values(task)
        changes = with_layers(values.get("head", TrainConfig.head), changes or {})
        if "epochs" in changes and values.get("patience") == values.get("epochs"):
            values["patience"] = changes["epochs"]
        fusion = values.get("fusion", TrainConfig.fusion)
        if changes.get("fusion", fusion) == fusion:
            changes["fusion_options"] = {**values.get("fusion_options", {}), **changes.get("fusion_options", {})}
        else:
            values |= {"fusion_options": {}, "ablate": (), "stages": ()}
        return fit_task(TrainConfig(**{**values, "loss": None, **changes}), task, kinds, changes)


def with_layers(head: str, changes: Options) -> JsonObject:
    """Return changes to the settings of a head; another head has its own layers, if they do not say which."""
    other = changes.get("head", head) != head
    return {**({"layers": None} if other else {}), **changes}


def fit_task(config: TrainConfig, task: str, kinds: Collection[str], changes: Options) -> TrainConfig:
    """Return a paper's settings for a task, except those that are changed: its cross-entropy, and what is monitored."""
    if task == MULTITASK and config.monitored_metric is not None and "monitor" not in changes:
        config = replace(config, monitor=None)  # a metric is one task's: the mean of their main metrics is monitored
    return config if "loss" in changes else fit_loss(config, task, kinds)


def fit_loss(config: TrainConfig, task: str, kinds: Collection[str]) -> TrainConfig:
    """Return the settings with the cross-entropy of a task: ce for one label per row, bce for several.

    In a training of several tasks, bce leaves ce to those with one label per row.
    """
    one_label = config.is_generative or {*kinds} == {"multiclass"} or task == "multiclass"
    return replace(config, loss="ce" if one_label else "bce")
