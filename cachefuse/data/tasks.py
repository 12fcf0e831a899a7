"""Several tasks on the same samples, as a manifest declares them: labels, classes and missing labels of each."""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator

from cachefuse.files import JsonObject
from cachefuse.metrics.tasks import TaskSlice

NAME = re.compile(r"[a-z0-9][a-z0-9_-]{0,63}")  # neither "=" nor "." is in it: "color=red", "color.accuracy"


class LabelTask(BaseModel):
    """One of several tasks on the same samples, each with labels, classes and missing labels of its own.

    ``column`` is that of the labels, by default the task's name. Without ``min_labels`` an empty cell of a multi-label
    column says that the sample has none of the labels, with it that they are not known.
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
            raise ValueError("is for multi-label tasks; a multi-class one has one label a row")
        return min_labels


def distinct(classes: tuple[str, ...] | None) -> tuple[str, ...] | None:
    """Return names of classes without the spaces around them, as labels are read. Raises ValueError if two are one."""
    if classes is None:
        return None
    names = Counter(name.strip() for name in classes)
    repeated = sorted(name for name, n in names.items() if n > 1)
    if repeated:
        raise ValueError(f"listed twice: {', '.join(repeated)}")
    if not names:
        raise ValueError("must name at least one class, or be left out")
    if "" in names:
        raise ValueError("a class must have a name")
    return tuple(names)


def check_tasks(tasks: Mapping[str, LabelTask], reader: JsonObject) -> None:
    """Raise ValueError for tasks that are none, badly named, or not of this reader (its options, or nothing)."""
    if not tasks:
        raise ValueError('there must be at least one, such as [tasks.color] with task = "multiclass"')
    for name in tasks:
        if not NAME.fullmatch(name):
            raise ValueError(f"a task's name must be of lower-case letters, digits, - and _. Got {name!r} instead")
    if reader and reader["kind"] != "table":
        raise ValueError(f"are read from the columns of a table, and reader {reader['kind']!r} gives one label")
    if "labels" in reader:
        raise ValueError("name a column of labels each; leave out the reader's labels")


def slices(tasks: Mapping[str, LabelTask], classes: Sequence[str]) -> tuple[TaskSlice, ...]:
    """Return the tasks with their columns among classes "color=red". Raises ValueError if those are of other tasks."""
    found, start = [], 0
    for name, task in tasks.items():
        n = sum(own.startswith(f"{name}=") for own in classes[start:])
        found.append(TaskSlice(name, task.task, slice(start, start + n), task.min_labels))
        if not n or not all(own.startswith(f"{name}=") for own in classes[start : start + n]):
            raise ValueError(f"classes such as {', '.join(classes[:3])} are not those of its tasks")
        start += n
    if start < len(classes):
        raise ValueError(f"class {classes[start]!r} is of none of its tasks")
    return tuple(found)
