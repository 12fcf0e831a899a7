"""The interface of readers: options are fields, `read` returns the samples, `missing` the missing files."""

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict

from cachefuse.data.column import Column


def _inside(path: str) -> str:
    if PurePath(path).is_absolute() or ".." in PurePath(path).parts:
        raise ValueError(f"must be a path inside the data folder. Got {path!r} instead")
    return path


InsidePath = Annotated[str, AfterValidator(_inside)]  # manifests are untrusted: no other folders


@dataclass
class Samples:
    """Samples as read, before splits and targets: parallel lists, one entry per sample, in file order.

    modalities: one column per modality of the dataset, such as "image" and "text".
    labels: a sample's class names (one for multi-class) or people's raw answers to its question; None if unlabelled.
        A name may be empty: it is no class, but an answer of a person who said nothing.
    task_labels: with several tasks, each task's labels by name; then all ``labels`` are None.
    groups: no hash split or fold separates rows of one group (several images of one product); "" is a row of its own.
    kinds: a text per sample by name, such as the type of its question; figures are also measured by these.
    notes: facts on this copy of the data for the user, one sentence each.
    """

    ids: list[str] = field(default_factory=list)
    splits: list[str] = field(default_factory=list)
    labels: list[tuple[str, ...] | None] = field(default_factory=list)
    task_labels: dict[str, list[tuple[str, ...] | None]] = field(default_factory=dict)
    modalities: dict[str, Column] = field(default_factory=dict)
    groups: list[str] | None = None
    classes: tuple[str, ...] | None = None
    kinds: dict[str, list[str]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def split_names(text: str, separator: str | None) -> list[str]:
    """Return the names in a text, without the blanks around them. Between two separators a name may be empty.

    Separators that are blanks count as one where they follow each other.
    """
    names = [name.strip() for name in text.split(separator)] if separator else [text.strip()]
    return list(filter(None, names)) if not (separator or "").strip() else names


def well_formed(text: str) -> str:
    """Return text that can be encoded: half a surrogate pair, possible in JSON, becomes a question mark."""
    return text.encode("utf-8", "replace").decode("utf-8")


class Reader(BaseModel, ABC):
    """Options are fields; unknown keys are errors. A reader never writes into the data folder."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    @abstractmethod
    def missing(self, root: Path) -> list[str]:
        """Return the files and folders that this reader needs but that are not under ``root``."""

    @abstractmethod
    def read(self, root: Path) -> Samples:
        """Read every sample under ``root``. Raises DataError, naming the file, if its content is not as declared."""
