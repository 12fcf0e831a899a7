"""What every reader shares: its options are its fields, `read` gives the samples, `missing` the files it lacks."""

import os
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict

from cachefuse.data.column import Column
from cachefuse.errors import DataError


def _inside(path: str) -> str:
    if PurePath(path).is_absolute() or ".." in PurePath(path).parts:
        raise ValueError(f"must be a path inside the data folder. Got {path!r} instead")
    return path


InsidePath = Annotated[str, AfterValidator(_inside)]  # a manifest may come from anyone: it can't name files elsewhere


@dataclass
class Samples:
    """Samples as read, before splits and label spaces: parallel lists, one entry a sample, in file order.

    modalities: a column for each modality that the dataset has, such as "image" and "text".
    labels: an entry is None where the sample is unlabelled, else its class names (one for multi-class), or the answers
        that people gave to its question, as they wrote them.
    task_labels: of a dataset of several tasks, the labels of each by its name; ``labels`` are then all None.
    groups: rows of one group never fall into two splits of a hash split (several images of one product).
    notes: what a user should know about this copy of the data, one sentence each.
    """

    ids: list[str] = field(default_factory=list)
    splits: list[str] = field(default_factory=list)
    labels: list[tuple[str, ...] | None] = field(default_factory=list)
    task_labels: dict[str, list[tuple[str, ...] | None]] = field(default_factory=dict)
    modalities: dict[str, Column] = field(default_factory=dict)
    groups: list[str] | None = None
    classes: tuple[str, ...] | None = None
    notes: list[str] = field(default_factory=list)


def well_formed(text: str) -> str:
    """Return text as it can be encoded: JSON may hold half of a surrogate pair, which becomes a question mark."""
    return text.encode("utf-8", "replace").decode("utf-8")


def is_inside(path: Path, root: Path) -> bool:
    """Return whether a path lies below the root with all links followed; those of an archive may lead anywhere."""
    return Path(os.path.realpath(path)).is_relative_to(os.path.realpath(root))


def check_inside(path: Path, root: Path) -> Path:
    """Return the path. Raises DataError if a link on it leaves the root."""
    if not is_inside(path, root):
        raise DataError(f"{path}: lies outside the data folder {root}")
    return path


class Reader(BaseModel, ABC):
    """Options as fields, unknown keys refused. Reading is pure: it never writes into the data folder."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    @abstractmethod
    def missing(self, root: Path) -> list[str]:
        """Files and folders that this reader needs and that are not under ``root``; empty if all are there."""

    @abstractmethod
    def read(self, root: Path) -> Samples:
        """Read every sample under ``root``. Raises DataError, naming the file, where it is not as declared."""
