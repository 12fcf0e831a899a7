"""Pairs of sentences in tab-separated files, each with a score or a class: STS benchmark, MRPC, QQP, your own."""

from collections import Counter
from pathlib import Path
from typing import Annotated

from pydantic import BeforeValidator, Field, field_validator

from cachefuse.data.column import Column, TextOrSource, TooLong
from cachefuse.data.inside import check_inside
from cachefuse.data.readers.base import InsidePath, Reader, Samples
from cachefuse.data.readers.lines import read_fields
from cachefuse.errors import DataError
from cachefuse.printable import listed

FEW_BROKEN, BROKEN_SHARE = 10, 0.01  # a file may have so many incomplete lines, whichever is more

Paths = Annotated[
    tuple[InsidePath, ...],
    BeforeValidator(lambda value: (value,) if isinstance(value, str) else value),
    Field(min_length=1),
]


class SentencePairsReader(Reader):
    """Reads one file per split: the first existing one of its names. A split may be missing if another exists.

    There is no quoting: a quote mark is text. Columns after those of the header are ignored. A sentence may be empty.
    A file without the label column is unlabelled, and so is a row with an empty label.
    """

    files: dict[str, Paths] = Field(min_length=1)  # split -> file, or several possible files
    header: tuple[str, ...] | None = None  # column names, for files without a header
    texts: tuple[str, str] = ("sentence1", "sentence2")
    label: str = "score"
    id: str | None = None  # left out: "<split>-<number of the row>"

    @field_validator("texts")
    @classmethod
    def _texts_differ(cls, texts: tuple[str, str]) -> tuple[str, str]:
        if texts[0] == texts[1]:
            raise ValueError(f"must name two columns. Got {texts[0]!r} twice")
        return texts

    def missing(self, root: Path) -> list[str]:
        return [] if self._existing(root) else [paths[0] for paths in self.files.values()]

    def read(self, root: Path) -> Samples:
        pairs: list[tuple[TextOrSource, ...]] = []
        samples = Samples(modalities={"text": Column.texts(pairs)})
        files = self._existing(root)
        absent = [f"{split} ({' or '.join(paths)})" for split, paths in self.files.items() if split not in files]
        if absent:
            samples.notes.append(f"some splits have no file: {listed(absent)}")
        tables = {split: (file, self._columns(root, file)) for split, file in files.items()}
        if tables and not any(self.label in columns for _, columns in tables.values()):
            file, columns = next(iter(tables.values()))
            raise _no_column(file, self.label, "label", columns)
        for split, (file, columns) in tables.items():
            self._add(samples, pairs, split, root / file, columns)
        return samples

    def _existing(self, root: Path) -> dict[str, str]:
        """Return the file of each split that has one."""
        existing = {split: [path for path in paths if (root / path).is_file()] for split, paths in self.files.items()}
        return {split: paths[0] for split, paths in existing.items() if paths}

    def _columns(self, root: Path, file: str) -> tuple[str, ...]:
        """Return a file's column names. Raises DataError if a needed column is missing, or occurs twice."""
        first = next(read_fields(check_inside(root / file, root), "\t"), None)
        if first is None:
            raise DataError(f"{file}: the file is empty")
        columns = self.header or tuple(str(name).strip() for name in first[1])
        for key, names in (("texts", self.texts), ("id", (self.id,) if self.id else ())):
            for name in names:
                if name not in columns:
                    raise _no_column(file, name, key, columns)
        counts = Counter(columns)
        repeated = [name for name in (*self.texts, self.label, self.id) if name and counts[name] > 1]
        if repeated:
            raise DataError(f"{file}: column {repeated[0]!r} occurs twice")
        return columns

    def _add(
        self, samples: Samples, pairs: list[tuple[TextOrSource, ...]], split: str, path: Path, columns: tuple[str, ...]
    ) -> None:
        """Add the rows of a file, without incomplete lines. Raises DataError if there are many of those."""
        index = {name: i for i, name in enumerate(columns)}
        broken: list[int] = []
        lines = read_fields(path, "\t")
        if not self.header:
            next(lines)
        n_lines = 0
        for n_lines, (number, fields) in enumerate(lines, start=1):
            values = [field.strip() if isinstance(field, str) else field for field in fields]
            if len(values) < len(columns):
                broken.append(number)
                continue
            label = values[index[self.label]] if self.label in index else ""
            sample = values[index[self.id]] if self.id else f"{split}-{n_lines}"
            if isinstance(label, TooLong) or isinstance(sample, TooLong):
                raise DataError(f"{path.name} line {number}: its id or {self.label} is too long for a name")
            samples.ids.append(sample)
            samples.splits.append(split)
            samples.labels.append((label,) if label else None)
            pairs.append((values[index[self.texts[0]]], values[index[self.texts[1]]]))
        if len(broken) > max(FEW_BROKEN, BROKEN_SHARE * n_lines) or 2 * len(broken) > n_lines:
            raise DataError(
                f"{path.name} line {broken[0]}: must have {len(columns)} columns, separated by tabs, but has "
                f"fewer, as have {len(broken):,} of {n_lines:,} lines"
            )
        if broken:
            samples.notes.append(f"skipped {len(broken):,} broken lines of {path.name}, such as line {broken[0]}")


def _no_column(file: str, name: str, key: str, columns: tuple[str, ...]) -> DataError:
    known = listed(columns[:20])
    return DataError(f"{file}: has no column {name!r}, which reader.{key} names; its columns are: {known}")
