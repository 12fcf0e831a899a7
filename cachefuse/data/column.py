"""One modality of a dataset: the sources of each sample, and which samples share a source."""

import json
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Protocol

import numpy as np

from cachefuse.data.digests import hash_parts
from cachefuse.errors import BadSampleError, DataError
from cachefuse.limits import limits


class Source(Protocol):
    """Where one image, or another input of a tower, comes from. It is hashable, and loaded in a worker thread."""

    @property
    def name(self) -> str:
        """The file (and row), for messages."""

    def load(self) -> Any:
        """Return the tower's input, such as an RGB image. Raises BadSampleError if it is unusable."""

    def fingerprint(self) -> str:
        """A sign of changed content that needs no reading: a file's name, size and time of change."""

    def digest(self) -> str:
        """A hash of the content, or of the reason why it is unreadable. Raises OSError if the machine failed."""


NAME_LENGTH = 60  # maximum, for a value without a file

TextOrSource = str | Source  # a text is its own content
Entry = TextOrSource | tuple[TextOrSource, ...] | None


def as_text(source: TextOrSource) -> str:
    """Return what shows a source to a reader: a text itself, or the name of another."""
    return source if isinstance(source, str) else source.name or str(source)


@dataclass(frozen=True, eq=False, slots=True)
class Value:
    """A source in memory: an array, or a value made of numbers, texts, lists and dictionaries."""

    content: Any

    @property
    def name(self) -> str:
        return " ".join(repr(self.content)[:NAME_LENGTH].split())

    def load(self) -> Any:
        return self.content

    def fingerprint(self) -> str:
        return self.digest()

    def digest(self) -> str:
        if isinstance(self.content, np.ndarray):
            array = self.content
            return hash_parts("array", array.dtype.str, str(array.shape), array.tobytes())
        return hash_parts("value", json.dumps(self.content, sort_keys=True))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Value) and self.digest() == other.digest()

    def __hash__(self) -> int:
        return hash(self.digest())


class BadText(ABC):
    """What stands for an unusable text, or another value in a table. It is a bad sample; the reason is its ``str``."""

    __slots__ = ()

    @property
    def name(self) -> str:
        return ""

    def load(self) -> Any:
        raise BadSampleError(str(self))

    def fingerprint(self) -> str:
        return self.digest()

    @abstractmethod
    def digest(self) -> str: ...


@dataclass(frozen=True, slots=True)
class TooLong(BadText):
    """A text over the limit, or another value in a table. Its content is not kept."""

    n_bytes: int

    def digest(self) -> str:
        return hash_parts("too long", str(self.n_bytes))

    def __str__(self) -> str:
        return f"has {self.n_bytes:,} bytes, over the limit of {limits().text_bytes:,} (--max-text-bytes)"


@dataclass(frozen=True, slots=True)
class NotText(BadText):
    """An object of JSON where a text belongs."""

    def digest(self) -> str:
        return hash_parts("not a text")

    def __str__(self) -> str:
        return "is an object, not a text"


def checked_text(text: str) -> str | TooLong:
    """Return a text, or what stands for it if it is over the limit."""
    most = limits().text_bytes
    if 4 * len(text) <= most:  # a character has at most 4 bytes
        return text
    n_bytes = len(text) if text.isascii() else len(text.encode("utf-8", "replace"))
    return text if n_bytes <= most else TooLong(n_bytes)


@dataclass(frozen=True)
class Column:
    """One modality of N samples. An entry is a source, a tuple of several sources (captions), or None or () for none.

    is_text: whether the sources are texts.
    shared: whether samples with equal sources (many questions about one image) share one row of features.
    """

    sources: Sequence[Entry]
    is_text: bool = False
    shared: bool = False

    @classmethod
    def texts(cls, texts: Sequence[str | tuple[TextOrSource, ...]]) -> "Column":
        """Return a column of texts: one text or a tuple of texts per sample, () for none."""
        return cls(texts, is_text=True)

    @classmethod
    def values(cls, values: Iterable[Any]) -> "Column":
        """Return a column with one value per sample, such as a list of numbers; None for no value."""
        return cls([None if value is None else Value(value) for value in values])

    def __len__(self) -> int:
        return len(self.sources)

    def __getitem__(self, row: int) -> tuple[TextOrSource, ...]:
        """Return the sources of one sample."""
        entry = self.sources[row]
        if isinstance(entry, tuple):
            return entry
        return () if entry is None else (entry,)

    @property
    def present(self) -> np.ndarray:
        """(N,) bool: which samples have a source."""
        return np.array([len(self[row]) > 0 for row in range(len(self))], bool)

    @cached_property
    def offsets(self) -> np.ndarray | None:
        """(N + 1,) offsets into ``feature_sources`` if any sample has several sources, else None."""
        counts = [len(self[row]) for row in range(len(self))]
        if max(counts, default=0) <= 1:
            return None
        return np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)

    @cached_property
    def rows(self) -> np.ndarray | None:
        """(N,) the number of each sample's source if samples share sources, else None. Equal sources have one number.

        They are numbered in order of first use, so that new samples change no number. All samples without a source
        have the same number.
        """
        if not self.shared:
            return None
        if self.offsets is not None:
            raise DataError("samples that share sources must have one source each, but some have several")
        numbers: dict[tuple[TextOrSource, ...], int] = {}
        return np.array([numbers.setdefault(self[row], len(numbers)) for row in range(len(self))], np.int64)

    def feature_sources(self) -> list[TextOrSource | None]:
        """Return one source per row of features: each shared source once, and all of several sources in turn.

        A sample without a source has its own row, with None, unless samples have several sources.
        """
        if self.rows is not None:
            return [next(iter(sources), None) for sources in dict.fromkeys(self[row] for row in range(len(self)))]
        if self.offsets is not None:
            return [source for row in range(len(self)) for source in self[row]]
        return [next(iter(self[row]), None) for row in range(len(self))]

    def owners(self) -> np.ndarray:
        """Return the (first) sample of each row of features, (n_rows,)."""
        if self.rows is not None:
            return np.unique(self.rows, return_index=True)[1]
        samples = np.arange(len(self))
        return samples if self.offsets is None else np.repeat(samples, np.diff(self.offsets))

    def check(self) -> None:
        """Raise DataError if the first source is neither a text nor a ``Source``."""
        first = next((source for row in range(len(self)) for source in self[row]), "")
        if not isinstance(first, str) and not hasattr(first, "digest"):
            raise DataError(
                f"a source must be a text or have load() and digest(). Got {type(first).__name__} instead; "
                f"wrap plain values with Column.values"
            )

    def take(self, rows: Sequence[int]) -> "Column":
        """Return the column of the given samples."""
        return replace(self, sources=[self.sources[row] for row in rows])
