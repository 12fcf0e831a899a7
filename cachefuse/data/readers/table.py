"""Tables: csv, tsv, jsonl and parquet files with one row per sample."""

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from pydantic import Field, PrivateAttr, ValidationInfo, field_validator

from cachefuse.data.column import Column, Entry, Value
from cachefuse.data.images import FileImage
from cachefuse.data.readers.base import InsidePath, Reader, Samples, split_names, well_formed
from cachefuse.data.readers.csv_text import read_csv
from cachefuse.data.readers.lines import TEXT_ERRORS
from cachefuse.errors import DataError
from cachefuse.printable import listed

Cell = object  # a text; in parquet and jsonl also a number, a list or null
TableColumns = dict[str, list[Cell]]
_PLACE = re.compile(r"\{([^{}]*)\}")


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
        tables = {split: read_columns(root / file, self.header) for split, file in self.files.items()}
        labels = {"reader.labels": self.labels} if self.labels else {}
        labels |= {f"tasks.{name}.column": column for name, (column, _) in self._tasks.items()}
        for key, column in labels.items():
            if not any(column in columns for columns in tables.values()):
                _need(column, next(iter(tables.values())), next(iter(self.files.values())), key)
        samples = Samples(groups=[] if self.group else None, task_labels={name: [] for name in self._tasks})
        entries: dict[str, list[Entry]] = {modality: [] for modality in self.columns}
        for split, columns in tables.items():
            columns = self._add(samples, split, columns)
            for modality in entries:
                entries[modality] += self._entries(modality, columns, self.files[split], root)
        samples.modalities = {modality: _column(modality, column) for modality, column in entries.items()}
        return samples

    def _add(self, samples: Samples, split: str, columns: TableColumns) -> TableColumns:
        """Add a file's rows, and return its columns, with a column of splits."""
        file = self.files[split]
        n = len(next(iter(columns.values()), []))
        named = _strings(_need(self.split, columns, file, "reader.split")) if self.split else [""] * n
        splits = [name.strip() or split for name in named]
        if "split" not in columns:
            columns = {**columns, "split": list(splits)}
        first = len(samples.ids)
        samples.splits += splits
        samples.ids += (
            self._fill(self.id, columns, file, "reader.id") if self.id else [str(first + i) for i in range(n)]
        )
        samples.labels += self._labels(columns, self.labels, True, n)
        for task, (column, several) in self._tasks.items():
            samples.task_labels[task] += self._labels(columns, column, several, n)
        if samples.groups is not None and self.group:
            samples.groups += _strings(_need(self.group, columns, file, "reader.group"))
        return columns

    def _entries(self, modality: str, columns: TableColumns, file: str, root: Path) -> list[Entry]:
        """Return each row's entry of a modality: an image file, texts, or a raw value."""
        template = self.columns[modality]
        key = f"reader.{modality}" if modality in ("image", "text") else f"reader.modalities.{modality}"
        if modality == "image":
            paths = self._fill(template, columns, file, key)
            return [FileImage(root / path, root) if path.strip() else None for path in paths]
        values = columns.get(template) or self._fill(template, columns, file, key)
        return [_texts(value) if modality == "text" or _is_text(value) else Value(value) for value in values]

    @staticmethod
    def places(template: str) -> set[str]:
        """Return the columns in a column name or template."""
        return set(_PLACE.findall(template)) or {template}

    def _labels(self, columns: TableColumns, column: str | None, several: bool, n: int) -> list[tuple[str, ...] | None]:
        if column is None or column not in columns:
            return [None] * n
        return [self._split_labels(value, several) for value in columns[column]]

    def _split_labels(self, value: Cell, several: bool) -> tuple[str, ...] | None:
        if _is_null(value):
            return None
        if isinstance(value, list):
            return tuple(name.strip() for name in _strings(value))
        names = split_names(_string(value), self.separator if several else None)
        return tuple(names) if any(names) else ()

    def _fill(self, template: str, columns: TableColumns, file: str, key: str) -> list[str]:
        """Return a column's values, or a template's with each ``{column}`` replaced (and nothing else)."""
        if template in columns or not _PLACE.search(template):
            return _strings(_need(template, columns, file, key))
        pieces = _PLACE.split(template)  # literal, column, literal, column, ..., literal
        values = [_strings(_need(name, columns, file, key)) for name in pieces[1::2]]
        return [
            pieces[0] + "".join(value + literal for value, literal in zip(row, pieces[2::2], strict=True))
            for row in zip(*values, strict=True)
        ]


def read_columns(path: Path, header: tuple[str, ...] | None = None) -> TableColumns:
    """Read a csv, tsv, jsonl or parquet file as columns. Raises DataError, naming the place, if it is not readable."""
    suffix = path.suffix.lower()
    if suffix in (".csv", ".tsv", ".txt"):
        delimiter = "," if suffix == ".csv" else "\t"
        return _read_delimited(path, delimiter, header)
    if suffix in (".jsonl", ".ndjson"):
        return _read_jsonl(path)
    if suffix in (".parquet", ".pq"):
        return _read_parquet(path)
    raise DataError(f"{path.name}: unknown kind of table {suffix!r}; choose from: .csv, .tsv, .jsonl, .parquet")


def _read_delimited(path: Path, delimiter: str, header: tuple[str, ...] | None) -> TableColumns:
    text = _decode(path)
    rows = read_csv(text, delimiter, path.name, len(header) if header else None)
    if not rows:
        raise DataError(f"{path.name}: the file is empty")
    names = [name.strip() for name in header or rows.pop(0)]
    repeated = {name for name in names if names.count(name) > 1}
    if repeated:
        raise DataError(f"{path.name}: column {sorted(repeated)[0]!r} occurs twice")
    values = list(zip(*rows, strict=True)) or [()] * len(names)
    return {name: list(column) for name, column in zip(names, values, strict=True)}


def _decode(path: Path) -> str:
    data = path.read_bytes()
    if b"\0" in data[: 1 << 16]:
        raise DataError(f"{path.name}: is not a text file")
    return data.decode("utf-8-sig", errors=TEXT_ERRORS)


def _read_jsonl(path: Path) -> TableColumns:
    columns: TableColumns = {}
    n = 0
    with path.open(encoding="utf-8-sig", errors=TEXT_ERRORS) as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise DataError(f"{path.name} line {number}: not valid JSON: {error}") from error
            if not isinstance(row, dict):
                raise DataError(f"{path.name} line {number}: must be a JSON object. Got {type(row).__name__} instead")
            for name in row:
                if name not in columns:
                    columns[name] = [None] * n
            for name, column in columns.items():
                column.append(row.get(name))
            n += 1
    if not n:
        raise DataError(f"{path.name}: the file is empty")
    return columns


def _read_parquet(path: Path) -> TableColumns:
    import pyarrow
    import pyarrow.parquet

    try:
        columns: TableColumns = pyarrow.parquet.read_table(path).to_pydict()
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path.name}: not a readable parquet file: {error}") from error
    return columns


def _need(name: str, columns: TableColumns, file: str, key: str) -> list[Cell]:
    if name not in columns:
        known = listed(column for column in columns)
        raise DataError(f"{file}: has no column {name!r}, which {key} names; its columns are: {known}")
    return columns[name]


def _strings(values: Iterable[Cell]) -> list[str]:
    return [_string(value) for value in values]


def _column(modality: str, entries: list[Entry]) -> Column:
    """Return a column. It is a text column if all its entries are texts."""
    is_text = modality == "text" or all(isinstance(entry, tuple) for entry in entries)
    return Column(entries, is_text=is_text and modality != "image")


def _texts(value: Cell) -> tuple[str, ...]:
    """Return the texts of a cell that are not blank."""
    return tuple(text for text in _strings(_as_list(value)) if text.strip())


def _is_text(value: Cell) -> bool:
    """Whether a cell is empty, a text, or a list of texts."""
    return _is_null(value) or all(isinstance(item, str) for item in _as_list(value))


def _as_list(value: Cell) -> list[Cell]:
    return value if isinstance(value, list) else [value]


def _is_null(value: Cell) -> bool:
    return value is None or value != value  # an empty cell of a numeric parquet column is NaN


def _string(value: Cell) -> str:
    if _is_null(value):
        return ""
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return well_formed(str(value))
