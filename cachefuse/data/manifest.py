"""A manifest describes a dataset in one TOML file, which is typed and validated. Errors name the file and the key."""

import math
import tomllib
from collections.abc import Iterator, Sequence
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator

from cachefuse.data.readers import READERS
from cachefuse.data.readers.base import Reader
from cachefuse.data.readers.table import TableReader
from cachefuse.data.tasks import LabelTask, check_tasks, distinct, slices
from cachefuse.errors import ManifestError, PluginError, UnknownNameError
from cachefuse.files import JsonObject, read_bounded
from cachefuse.metrics import MEAN, METRICS, main_metric
from cachefuse.metrics.tasks import TaskSlice
from cachefuse.registry import lookup

Task = Literal["multilabel", "multiclass", "retrieval", "similarity", "paraphrase", "vqa", "multitask"]
MULTITASK, VQA = "multitask", "vqa"
PAIRS = ("similarity", "paraphrase")  # tasks whose samples are pairs of sentences

DEFAULT_METRICS: dict[str, tuple[str, ...]] = {
    "multilabel": ("micro_f1", "macro_f1", "samples_f1", "macro_ap"),
    "multiclass": ("accuracy", "macro_f1", "macro_ap"),
    "retrieval": (),
    "similarity": (),
    "paraphrase": (),
    "vqa": ("vqa_accuracy",),
    "multitask": (),  # its tasks have their own
}
USUAL_ANSWERS = 3129  # classes of most models of VQA v2
MAX_BYTES = 1 << 20


class Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class HashSplit(Strict):
    """A rule that moves rows to a new split by a stable hash of their id (or group): the same on every machine."""

    source: str = Field(alias="from")
    fraction: float = Field(gt=0, lt=1)


class SubmissionFormat(Strict):
    """A competition's file: its two column names, and the separator of several labels in a row."""

    id: str = "id"
    labels: str = "labels"
    separator: str = " "


class Manifest(Strict):
    """A dataset: how to read it, its task, its splits, and the format of a submission."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9_.-]{0,63}$")
    task: Task
    title: str = ""
    reader: JsonObject
    # None: the classes of the labelled rows. For paraphrase: first the class of pairs that differ, then of paraphrases.
    classes: tuple[str, ...] | None = Field(default=None, validate_default=True)
    # The lowest and the highest score of similarity.
    scale: tuple[float, float] | None = Field(default=None, validate_default=True)
    # For visual question answering without ``classes``: how many of the most frequent answers are classes.
    answers: int | None = Field(default=None, ge=1, validate_default=True)
    # For multitask: its tasks by name.
    tasks: dict[str, LabelTask] = Field(default={}, validate_default=True)
    min_labels: int = Field(default=0, ge=0)
    splits: dict[str, HashSplit] = {}
    metrics: tuple[str, ...] = ()
    submission: SubmissionFormat = SubmissionFormat()
    rows: dict[str, int] = {}  # published counts by split, before any hash split
    other_rows: tuple[dict[str, int], ...] = ()  # counts of other published splits
    licence: str = ""
    get: str = ""  # how to get the data
    layout: str = ""  # the folder layout expected

    @field_validator("classes")
    @classmethod
    def _classes_differ(cls, classes: tuple[str, ...] | None, info: ValidationInfo) -> tuple[str, ...] | None:
        if info.data.get("task") == "paraphrase" and len(classes or ()) != 2:
            raise ValueError(
                "must name the two classes of a paraphrase task: first for pairs that differ, then for paraphrases"
            )
        if classes is not None and info.data.get("task") == MULTITASK:
            raise ValueError("must be in the tasks of a multitask dataset, such as [tasks.color]")
        return distinct(classes)

    @field_validator("scale")
    @classmethod
    def _scale_fits(cls, scale: tuple[float, float] | None, info: ValidationInfo) -> tuple[float, float] | None:
        task = info.data.get("task")
        if task == "similarity" and scale is None:
            raise ValueError("a similarity task needs the lowest and the highest score, such as [0.0, 5.0]")
        if scale is None:
            return None
        if task not in (None, "similarity"):
            raise ValueError(f"is only for the task similarity. Got the task {task} instead")
        if not (all(map(math.isfinite, scale)) and scale[0] < scale[1]):
            raise ValueError(f"must be a lower and a higher number. Got {list(scale)} instead")
        return scale

    @field_validator("answers")
    @classmethod
    def _answers_fit(cls, answers: int | None, info: ValidationInfo) -> int | None:
        task = info.data.get("task")
        if task == VQA:
            return answers or USUAL_ANSWERS
        if answers is not None and task is not None:
            raise ValueError(f"is only for the task vqa. Got the task {task} instead")
        return answers

    @field_validator("tasks")
    @classmethod
    def _tasks_fit(cls, tasks: dict[str, LabelTask], info: ValidationInfo) -> dict[str, LabelTask]:
        task, reader = info.data.get("task"), info.data.get("reader") or {}
        if task != MULTITASK:
            if tasks and task is not None:
                raise ValueError(f"are only for the task {MULTITASK}. Got the task {task} instead")
            return tasks
        check_tasks(tasks, reader)
        return tasks

    @field_validator("min_labels")
    @classmethod
    def _min_labels_fit(cls, min_labels: int, info: ValidationInfo) -> int:
        if min_labels and info.data.get("task") == MULTITASK:
            raise ValueError("must be in the multi-label tasks of a multitask dataset, such as [tasks.tags]")
        return min_labels

    @field_validator("submission")
    @classmethod
    def _columns_differ(cls, submission: SubmissionFormat, info: ValidationInfo) -> SubmissionFormat:
        if submission.id in (info.data.get("tasks") or {}):
            raise ValueError(f"the id column has the name of task {submission.id!r}; set another id")
        return submission

    @field_validator("reader")
    @classmethod
    def _reader_opens(cls, reader: JsonObject) -> JsonObject:
        if not isinstance(reader.get("kind"), str):
            raise ValueError(f"needs a kind; choose from: {', '.join(sorted(READERS))}")
        _open_reader(reader)
        return reader

    @field_validator("metrics")
    @classmethod
    def _metrics_exist(cls, metrics: tuple[str, ...]) -> tuple[str, ...]:
        for name in metrics:
            try:
                METRICS.check(name)
            except UnknownNameError as error:
                raise ValueError(str(error)) from None  # the validation adds the key
        return metrics

    def open_reader(self) -> Reader:
        """Return the reader with this manifest's options."""
        reader = _open_reader(self.reader)
        if not isinstance(reader, TableReader) or not self.tasks:
            return reader
        return reader.for_tasks(
            {name: (task.column or name, task.task == "multilabel") for name, task in self.tasks.items()}
        )

    @property
    def reported_metrics(self) -> tuple[str, ...]:
        """The metrics to report: ``metrics`` or the task's defaults; for several tasks their mean, then each task's."""
        if not self.tasks:
            return self.metrics or DEFAULT_METRICS[self.task]
        defaults = {name: (*DEFAULT_METRICS[task.task], "recall_at_p90") for name, task in self.tasks.items()}
        return (MEAN, *(f"{name}.{metric}" for name in self.tasks for metric in self.metrics or defaults[name]))

    @property
    def main_metric(self) -> str:
        """The metric by which models are compared: the first for which higher is better."""
        return main_metric(self.reported_metrics)

    def task_slices(self, classes: Sequence[str]) -> tuple[TaskSlice, ...]:
        """Return the tasks with their columns among these classes; with several tasks, a class is "color=red".

        Raises ManifestError if the classes belong to other tasks.
        """
        if not self.tasks:
            return (TaskSlice("", self.task, slice(0, len(classes)), self.min_labels),)
        try:
            return slices(self.tasks, classes)
        except ValueError as error:
            raise ManifestError(f"{self.name}: {error}") from error


def _open_reader(reader: JsonObject) -> Reader:
    options = {key: value for key, value in reader.items() if key != "kind"}
    try:
        return READERS[reader["kind"]](**options)
    except (UnknownNameError, PluginError) as error:
        raise ValueError(str(error)) from None  # the validation adds the key


def parse_manifest(text: str, origin: str) -> Manifest:
    """Parse a manifest's TOML. Raises ManifestError, naming ``origin`` and each wrong key."""
    try:
        content = tomllib.loads(text)
    except (ValueError, RecursionError) as error:
        raise ManifestError(f"{origin}: not valid TOML: {error}") from error
    try:
        return Manifest.model_validate(content)
    except ValidationError as error:
        raise ManifestError(f"{origin}: {_problems(error)}") from error


def _problems(error: ValidationError) -> str:
    lines = []
    for problem in error.errors():
        key = ".".join(str(name) for name in problem["loc"]) or "manifest"
        message = problem["msg"].removeprefix("Value error, ")
        if problem["type"] == "extra_forbidden":
            message = "unknown key"
        lines.append(f"{key}: {message[:1].lower()}{message[1:]}")
    return "; ".join(lines)


def builtin_manifests() -> Iterator[Manifest]:
    """Yield the manifests that ship with cachefuse, by name."""
    for path in sorted(_builtin_folder().iterdir(), key=lambda path: path.name):
        if path.name.endswith(".toml"):
            yield parse_manifest(path.read_text(encoding="utf-8"), path.name)


def load_manifest(name: str) -> tuple[Manifest, Path | None]:
    """Return the manifest of a built-in dataset or a TOML file, and the file's folder (None for a built-in one).

    Raises UnknownNameError if there is no such dataset, ManifestError if the file is not valid.
    """
    if name.endswith(".toml") or "/" in name:
        path = Path(name)
        if not path.exists():
            raise ManifestError(f"{name}: no such manifest file")
        try:
            text = read_bounded(path, MAX_BYTES).decode("utf-8-sig")
        except OSError as error:
            raise ManifestError(f"{name}: {error.strerror}") from error
        except UnicodeDecodeError as error:
            raise ManifestError(f"{name}: not UTF-8 text: {error}") from error
        return parse_manifest(text, name), path.absolute().parent
    folder = _builtin_folder()
    names = {path.name.removesuffix(".toml"): path for path in folder.iterdir() if path.name.endswith(".toml")}
    path = lookup(names, name, "dataset")
    return parse_manifest(path.read_text(encoding="utf-8"), path.name), None


def _builtin_folder() -> Traversable:
    """Return the manifests' folder, of an installed package or of a checkout on the path."""
    try:
        return resources.files("cachefuse.data_manifests")
    except ModuleNotFoundError:
        return Path(__file__).parents[2] / "data_manifests"
