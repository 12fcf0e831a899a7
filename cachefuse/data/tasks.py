"""Several tasks on the same samples in a manifest: each has its own labels, classes and missing labels."""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator

from cachefuse.files import JsonObject
from cachefuse.metrics.tasks import TaskSlice
from cachefuse.printable import listed

NAME = re.compile(r"[a-z0-9][a-z0-9_-]{0,63}")  # no "=" and no ".": "color=red", "color.accuracy"


class LabelTask(BaseModel):
    """One of several tasks on the same samples, with its own labels, classes and missing labels.

    ``column`` has the labels; its default is the task's name. An empty cell of a multi-label column means that the
    sample has none of the labels; with ``min_labels`` it means that the labels are unknown.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    task: Literal["multilabel", "multiclass"]
    column: str = ""
    classes: tuple[str, ...] | None = None
    min_labels: int = Field(default=0, ge=0)

    @field_validator("classes")
    @classmethod
    def _classes_differ(cls, classes: tuple[str, ...] | None) -> tuple[str, ...] | None:
        return distinct(classes)

    @field_validator("min_labels")
    @classmethod
    def _min_labels_fit(cls, min_labels: int, info: ValidationInfo) -> int:
        if min_labels and info.data.get("task") == "multiclass":
            raise ValueError("is for multi-label tasks; a multi-class task has one label per row")
        return min_labels


def distinct(classes: tuple[str, ...] | None) -> tuple[str, ...] | None:
    """Return class names without surrounding spaces, as labels are read. Raises ValueError if two are equal."""
    if classes is None:
        return None
    names = Counter(name.strip() for name in classes)
    repeated = sorted(name for name, n in names.items() if n > 1)
    if repeated:
        raise ValueError(f"listed twice: {listed(repeated)}")
    if not names:
        raise ValueError("must name at least one class, or be left out")
    if "" in names:
        raise ValueError("a class must have a name")
    return tuple(names)


def check_tasks(tasks: Mapping[str, LabelTask], reader: JsonObject) -> None:
    """Raise ValueError if there are no tasks, a name is not valid, or the reader (its options) cannot read them."""
    if not tasks:
        raise ValueError('there must be at least one, such as [tasks.color] with task = "multiclass"')
    for name in tasks:
        if not NAME.fullmatch(name):
            raise ValueError(f"a task's name may have lower-case letters, digits, - and _. Got {name!r} instead")
    if reader and reader["kind"] != "table":
        raise ValueError(f"need the reader 'table', which reads several label columns. Got {reader['kind']!r} instead")
    if "labels" in reader:
        raise ValueError("have their own label columns; leave out the reader's labels")


def slices(tasks: Mapping[str, LabelTask], classes: Sequence[str]) -> tuple[TaskSlice, ...]:
    """Return the tasks with their columns among classes "color=red". Raises ValueError for classes of other tasks."""
    task_slices, start = [], 0
    for name, task in tasks.items():
        n = sum(label.startswith(f"{name}=") for label in classes[start:])
        task_slices.append(TaskSlice(name, task.task, slice(start, start + n), task.min_labels))
        if not n or not all(label.startswith(f"{name}=") for label in classes[start : start + n]):
            raise ValueError(f"classes such as {listed(classes[:3])} do not belong to its tasks")
        start += n
    if start < len(classes):
        raise ValueError(f"class {classes[start]!r} belongs to none of its tasks")
    return tuple(task_slices)
