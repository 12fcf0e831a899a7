"""Tables: csv, tsv, jsonl and parquet files with one row per sample."""

import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import BinaryIO

from pydantic import Field, PrivateAttr, ValidationInfo, field_validator

from cachefuse.data.column import BadText, Column, Entry, NotText, TextOrSource, TooLong, Value, checked_text
from cachefuse.data.images import FileImage
from cachefuse.data.inside import check_inside
from cachefuse.data.readers.base import InsidePath, Reader, Samples, split_names, well_formed
from cachefuse.data.readers.csv_text import read_csv
from cachefuse.data.readers.jsonl import read_jsonl
from cachefuse.data.readers.lines import guesses
from cachefuse.data.readers.parquet import read_parquet
from cachefuse.data.readers.table_columns import Cell, TableColumns
from cachefuse.errors import DataError
from cachefuse.files import open_regular
from cachefuse.limits import limits
from cachefuse.printable import listed

_PLACE = re.compile(r"\{([^{}]*)\}")
_BREAK = re.compile(r"[\r\n]")


class TableReader(Reader):
    """Reads one file per split, or one file with a column that names the split.

    id, image and text are each a column, or a template over columns: ``image = "photos/{ImageID}.jpg"``. ``modalities``
    names the columns of other modalities, ``{ report = "Report", vitals = "Vitals" }``. Their cells are texts, or in
    jsonl and parquet also lists of numbers and other values. A list of texts gives a sample several texts.
    A file without the labels column is unlabelled, and so is a row with a null label.
    """

    files: dict[str, InsidePath] = Field(min_length=1)  # split -> file
    id: str | None = None  # left out: the row's number
    image: str | None = None
    text: str | None = None
    modalities: dict[str, str] = Field(default={})  # other modality -> column or template
    labels: str | None = None
    separator: str | None = None  # between several labels of a row; left out: one label per row
    split: str | None = None  # a column that overrides the file's split unless it is empty
    group: str | None = None
    header: tuple[str, ...] | None = None  # column names, for files without a header
    _tasks: dict[str, tuple[str, bool]] = PrivateAttr(default_factory=dict)

    @field_validator("modalities")
    @classmethod
    def _named_once(cls, modalities: dict[str, str], info: ValidationInfo) -> dict[str, str]:
        repeated = [name for name in modalities if info.data.get(name) and name in ("image", "text")]
        if repeated:
            raise ValueError(f"{repeated[0]!r} is declared twice, here and as reader.{repeated[0]}")
        return modalities

    @property
    def columns(self) -> dict[str, str]:
        """The column or template of each modality."""
        named = {"image": self.image, "text": self.text, **self.modalities}
        return {modality: template for modality, template in named.items() if template}

    def for_tasks(self, columns: Mapping[str, tuple[str, bool]]) -> "TableReader":
        """Return a reader of the labels of several tasks: (column, whether a row has several labels) by task.

        A file may lack a task's column: then no row of it has that label.
        """
        reader = self.model_copy()
        reader._tasks = dict(columns)
        return reader

    def missing(self, root: Path) -> list[str]:
        return [file for file in self.files.values() if not (root / file).is_file()]

    def read(self, root: Path) -> Samples:
        wanted = self._wanted()
        tables = {
            split: read_columns(check_inside(root / file, root), self.header, wanted)
            for split, file in self.files.items()
        }
        labels = {"reader.labels": self.labels} if self.labels else {}
        labels |= {f"tasks.{name}.column": column for name, (column, _) in self._tasks.items()}
        for key, column in labels.items():
            if not any(column in columns for columns in tables.values()):
                _need(column, next(iter(tables.values())), next(iter(self.files.values())), key)
        samples = Samples(groups=[] if self.group else None, task_labels={name: [] for name in self._tasks})
        entries: dict[str, list[Entry]] = {modality: [] for modality in self.columns}
        for split, columns in tables.items():
            samples.notes += columns.notes
            columns = self._add(samples, split, columns)
            for modality in entries:
                entries[modality] += self._entries(modality, columns, self.files[split], root)
        samples.modalities = {modality: _column(modality, column) for modality, column in entries.items()}
        return samples

    def _wanted(self) -> set[str]:
        """Return the names of all columns that may be read."""
        templates = [self.id, *self.columns.values()]
        names = {self.labels, self.split, self.group, *(column for column, _ in self._tasks.values())}
        for template in filter(None, templates):
            names |= {template, *self.places(template)}
        return {name for name in names if name}

    def _add(self, samples: Samples, split: str, columns: TableColumns) -> TableColumns:
        """Add a file's rows, and return its columns, with a column of splits."""
        file, n = self.files[split], columns.n_rows
        named = _names(_need(self.split, columns, file, "reader.split"), file, "split") if self.split else [""] * n
        splits = [name.strip() or split for name in named]
        if "split" not in columns.names:
            columns = columns.with_column("split", list(splits))
        first = len(samples.ids)
        samples.splits += splits
        ids = self._fill(self.id, columns, file, "reader.id") if self.id else [str(first + i) for i in range(n)]
        samples.ids += _names(ids, file, "id")
        samples.labels += self._labels(columns, self.labels, True, file)
        for task, (column, several) in self._tasks.items():
            samples.task_labels[task] += self._labels(columns, column, several, file)
        names: dict[str, Sequence[Cell]] = {"id": ids, "split": named}
        if "\n" not in (self.separator or ""):
            tasks = [column for column, _ in self._tasks.values()]
            names |= {column: columns.get(column, []) for column in (self.labels, *tasks) if column}
        samples.notes += _notes_of_breaks(file, names)
        if samples.groups is not None and self.group:
            groups = _names(_need(self.group, columns, file, "reader.group"), file, "group")
            samples.groups += [group if group.strip() else "" for group in groups]
        return columns

    def _entries(self, modality: str, columns: TableColumns, file: str, root: Path) -> list[Entry]:
        """Return each row's entry of a modality: an image file, texts, or a raw value."""
        template = self.columns[modality]
        key = f"reader.{modality}" if modality in ("image", "text") else f"reader.modalities.{modality}"
        if modality == "image":
            paths = self._fill(template, columns, file, key)
            return [
                path if isinstance(path, BadText) else FileImage(root / path, root) if path.strip() else None
                for path in paths
            ]
        values: Sequence[Cell] = columns.get(template) or self._fill(template, columns, file, key)
        return [_texts(value) if modality == "text" or _is_text(value) else Value(value) for value in values]

    @staticmethod
    def places(template: str) -> set[str]:
        """Return the columns in a column name or template."""
        return set(_PLACE.findall(template)) or {template}

    def _labels(
        self, columns: TableColumns, column: str | None, several: bool, file: str
    ) -> list[tuple[str, ...] | None]:
        if column is None or column not in columns:
            return [None] * columns.n_rows
        for row, value in enumerate(columns[column], start=1):
            bad = next((item for item in _as_list(value) if isinstance(item, BadText | dict | tuple)), None)
            if bad is not None:
                raise DataError(f"{file} row {row}: {column} {_text(bad)}")
        return [self._split_labels(value, several) for value in columns[column]]

    def _split_labels(self, value: Cell, several: bool) -> tuple[str, ...] | None:
        if _is_null(value):
            return None
        if isinstance(value, list):
            return tuple(name.strip() for name in _strings(value))
        names = split_names(_string(value), self.separator if several else None)
        return tuple(names) if any(names) else ()

    def _fill(self, template: str, columns: TableColumns, file: str, key: str) -> list[str | BadText]:
        """Return a column's values, or a template's with each ``{column}`` replaced (and nothing else)."""
        if template in columns or not _PLACE.search(template):
            return [_text(value) for value in _need(template, columns, file, key)]
        pieces = _PLACE.split(template)  # literal, column, literal, column, ..., literal
        values = [[_text(value) for value in _need(name, columns, file, key)] for name in pieces[1::2]]
        return [_joined(pieces[0::2], row) for row in zip(*values, strict=True)]


def _joined(literals: Sequence[str], values: tuple[str | BadText, ...]) -> str | BadText:
    """Return literals with values between them, or the first value that is no text."""
    texts = [value for value in values if isinstance(value, str)]
    if len(texts) < len(values):
        return next(value for value in values if isinstance(value, BadText))
    return literals[0] + "".join(text + literal for text, literal in zip(texts, literals[1:], strict=True))


def read_columns(
    path: Path, header: tuple[str, ...] | None = None, wanted: Collection[str] | None = None
) -> TableColumns:
    """Read a csv, tsv, jsonl or parquet file as columns: all, or the ``wanted`` ones that it has.

    Raises DataError, naming the place, if it is not readable.
    """
    guesses.n_bytes = 0
    columns = _read_columns(path, header, wanted)
    if guesses.n_bytes:
        columns.notes.append(f"{path.name} has {guesses.n_bytes:,} bytes that are not UTF-8; they are read as cp1252")
    return columns


def _read_columns(path: Path, header: tuple[str, ...] | None, wanted: Collection[str] | None) -> TableColumns:
    suffix = path.suffix.lower()
    if suffix in (".parquet", ".pq"):
        with open_regular(path, limits().file_bytes):
            pass  # a regular file: the library opens its path
        return read_parquet(path, wanted)
    if suffix not in (".csv", ".tsv", ".txt", ".jsonl", ".ndjson"):
        raise DataError(f"{path.name}: unknown kind of table {suffix!r}; choose from: .csv, .tsv, .jsonl, .parquet")
    with open_regular(path, limits().file_bytes) as file:
        if suffix in (".jsonl", ".ndjson"):
            return read_jsonl(file, path.name, wanted)
        return _read_delimited(file, path.name, "," if suffix == ".csv" else "\t", header, wanted)


def _read_delimited(
    file: BinaryIO, name: str, delimiter: str, header: tuple[str, ...] | None, wanted: Collection[str] | None
) -> TableColumns:
    if b"\0" in file.read(1 << 16):
        raise DataError(f"{name}: is not a text file")
    names: list[str] = []
    kept: list[int] = []

    def keep(first: list[str]) -> list[int]:
        names[:] = [column.strip() for column in header or first]
        repeated = next((column for column, n in Counter(names).items() if n > 1), None)
        if repeated is not None:
            raise DataError(f"{name}: column {repeated!r} occurs twice")
        kept[:] = [i for i, column in enumerate(names) if wanted is None or column in wanted]
        return kept

    rows = read_csv(file, delimiter, name, len(header) if header else None, keep)
    if not rows:
        raise DataError(f"{name}: the file is empty")
    if not header:
        del rows[0]
    columns: dict[str, list[Cell]] = {names[i]: [row[k] for row in rows] for k, i in enumerate(kept)}
    return TableColumns(columns, names, len(rows))


def _need(name: str, columns: TableColumns, file: str, key: str) -> list[Cell]:
    if name not in columns:
        known = listed(columns.names)
        raise DataError(f"{file}: has no column {name!r}, which {key} names; its columns are: {known}")
    return columns[name]


def _strings(values: Iterable[Cell]) -> list[str]:
    return [_string(value) for value in values]


def _names(values: Iterable[Cell], file: str, key: str) -> list[str]:
    """Return cells that are ids or other names. Raises DataError, naming the row, for one that is no usable text."""
    names = []
    for row, name in enumerate(map(_text, values), start=1):
        if isinstance(name, BadText):
            raise DataError(f"{file} row {row}: {key} {name}")
        names.append(name)
    return names


def _notes_of_breaks(file: str, columns: Mapping[str, Sequence[Cell]]) -> list[str]:
    """Return a note for each column of names that has one over several lines, and so may have swallowed rows."""
    notes = []
    for key, values in columns.items():
        cells = enumerate(values, start=1)
        row = next((row for row, value in cells if isinstance(value, str) and _BREAK.search(value.strip())), None)
        if row is not None:
            notes.append(f"{file} row {row}: {key} holds a line break; a closing quote may be missing")
    return notes


def _column(modality: str, entries: list[Entry]) -> Column:
    """Return a column. It is a text column if all its entries are texts."""
    is_text = modality == "text" or all(isinstance(entry, tuple) for entry in entries)
    return Column(entries, is_text=is_text and modality != "image")


def _texts(value: Cell) -> tuple[TextOrSource, ...]:
    """Return the texts of a cell that are not blank."""
    texts = [text if isinstance(text, BadText) else checked_text(text) for text in map(_text, _as_list(value))]
    return tuple(text for text in texts if isinstance(text, BadText) or text.strip())


def _is_text(value: Cell) -> bool:
    """Whether a cell is empty, a text, or a list of texts."""
    return _is_null(value) or all(isinstance(item, str | TooLong) for item in _as_list(value))


def _as_list(value: Cell) -> list[Cell]:
    return value if isinstance(value, list) else [value]


def _is_null(value: Cell) -> bool:
    return value is None or value != value  # an empty cell of a numeric parquet column is NaN


def _text(value: Cell) -> str | BadText:
    """Return a cell as text, or what stands for it. A list becomes one text; an object, and a map of parquet, none."""
    if isinstance(value, BadText):
        return value
    return NotText() if isinstance(value, dict | tuple) else _string(value)


def _string(value: Cell) -> str:
    if _is_null(value):
        return ""
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return well_formed(str(value))
