"""What every reader shares: its options are its fields, `read` gives the samples, `missing` the files it lacks."""

import os
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from typing import Annotated, Protocol

from PIL import Image
from pydantic import AfterValidator, BaseModel, ConfigDict

from cachefuse.errors import DataError


def _inside(path: str) -> str:
    if PurePath(path).is_absolute() or ".." in PurePath(path).parts:
        raise ValueError(f"must be a path inside the data folder. Got {path!r} instead")
    return path


InsidePath = Annotated[str, AfterValidator(_inside)]  # a manifest may come from anyone: it can't name files elsewhere


class ImageSource(Protocol):
    """Where one image comes from, hashable; opened in a worker thread when it is encoded."""

    @property
    def name(self) -> str:
        """The file (and row) as a user would look for it."""

    def load(self) -> Image.Image:
        """Return the image as RGB. Raises BadSampleError with the reason if it can't be used."""

    def fingerprint(self) -> str:
        """What tells without reading that the content may have changed: a file's name, size and time of change."""

    def digest(self) -> str:
        """A hash of the content, or of why it can't be read, wherever it lies. Raises OSError if the machine failed."""


@dataclass
class Samples:
    """Samples as read, before splits and label spaces: parallel lists, one entry a sample, in file order.

    images: None if the dataset has no images at all; an entry is None where one sample has none.
    texts: None if the dataset has no texts; an entry is a tuple of one or several texts (captions) of the sample.
    labels: an entry is None where the sample is unlabelled, else its class names (one for multi-class), or the answers
        that people gave to its question, as they wrote them.
    task_labels: of a dataset of several tasks, the labels of each by its name; ``labels`` are then all None.
    groups: rows of one group never fall into two splits of a hash split (several images of one product).
    shares_images: whether samples with equal images (many questions about one) have the features of one image.
    notes: what a user should know about this copy of the data, one sentence each.
    """

    ids: list[str] = field(default_factory=list)
    splits: list[str] = field(default_factory=list)
    labels: list[tuple[str, ...] | None] = field(default_factory=list)
    task_labels: dict[str, list[tuple[str, ...] | None]] = field(default_factory=dict)
    images: list[ImageSource | None] | None = None
    texts: list[tuple[str, ...]] | None = None
    groups: list[str] | None = None
    classes: tuple[str, ...] | None = None
    shares_images: bool = False
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
