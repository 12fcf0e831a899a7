"""Real-world csv text: read by the standard if possible, else with a parser for unescaped quotes."""

import csv
import io
import re

from cachefuse.errors import DataError

csv.field_size_limit(1 << 26)  # some plots exceed the module's 128 KiB


def read_csv(text: str, delimiter: str, origin: str, n_fields: int | None = None) -> list[list[str]]:
    """Return the records of csv text, each with ``n_fields`` fields, by default as many as the first one (the header).

    Quotes in quoted fields need not be doubled (``"a "stop" sign"``); they are kept.
    Raises DataError, naming the line, if no reading gives every record that number of fields.
    """
    rows = _read_standard(text, delimiter, n_fields)
    if rows is not None:
        return rows
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    if n_fields is None:
        first_line = text.lstrip("\n").partition("\n")[0]
        n_fields = len(next(csv.reader([first_line], delimiter=delimiter)))
    rows = _read_lines(text, n_fields) if delimiter == "\t" else None
    return rows if rows is not None else _read_unescaped(text, delimiter, origin, n_fields)


def _read_standard(text: str, delimiter: str, n_fields: int | None) -> list[list[str]] | None:
    try:
        rows = [row for row in csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True) if row]
    except csv.Error:
        return None
    return rows if all(len(row) == (n_fields or len(rows[0])) for row in rows) else None


def _read_lines(text: str, n_fields: int) -> list[list[str]] | None:
    """Split lines at tabs, which prose does not contain. If all rows have ``n_fields``, quotes inside are text."""
    rows = [line.split("\t") for line in text.split("\n") if line.strip(" ")]
    if any(len(row) != n_fields for row in rows):
        return None
    return [[_undouble(field[1:-1]) if re.fullmatch('".*"', field) else field for field in row] for row in rows]


def _read_unescaped(text: str, delimiter: str, origin: str, n_fields: int) -> list[list[str]]:
    """Parse records with a known number of fields. A quote ends a field only where a field can end.

    A last field without quotes is the rest of its line, delimiters included.
    """
    comma = re.escape(delimiter)
    # In prose a space follows the comma after a quote; between fields it does not.
    closing = re.compile(rf'"{comma}(?! )')
    before_last = rf'(?>"[^\n]*?{closing.pattern}|[^"{comma}\n]*{comma}){{{n_fields - 1}}}'
    closing_last = re.compile(rf'"[ \t]*(?:\Z|\n(?=[ \n]*(?:{before_last}|\Z)))')
    quoted_record = re.compile(rf'\n{before_last}"(?=[^\n])')
    rows: list[list[str]] = []
    position, limit = 0, -1
    while position < len(text):
        if not text[position : _end_of_line(text, position)].strip(" "):
            position = _end_of_line(text, position) + 1
            continue
        # A record ends before a line that must be a new record: then an unpaired opening quote is text.
        if limit < position:
            following = quoted_record.search(text, position)
            limit = following.start() if following else len(text)
        row: list[str] = []
        while len(row) < n_fields:
            last = len(row) == n_fields - 1
            quoted = text.startswith('"', position)
            closed = (closing_last if last else closing).search(text, position + 1, limit) if quoted else None
            if closed:
                row.append(_undouble(text[position + 1 : closed.start()]))
                position = closed.end()
                continue
            if quoted and limit == len(text):
                raise DataError(f"{origin} line {_line(text, position)}: a quoted field never ends")
            end = _end_of_line(text, position)
            if not last:
                end = text.find(delimiter, position, end)
                if end < 0:
                    n = len(row) + 1
                    raise DataError(f"{origin} line {_line(text, position)}: has {n} fields instead of {n_fields}")
            row.append(text[position:end])
            position = end + 1
        rows.append(row)
    return rows


def _undouble(value: str) -> str:
    """Undo the standard's doubling if every inner quote is doubled; otherwise quotes are text."""
    return value if '"' in value.replace('""', "") else value.replace('""', '"')


def _end_of_line(text: str, position: int) -> int:
    end = text.find("\n", position)
    return len(text) if end < 0 else end


def _line(text: str, position: int) -> int:
    return text.count("\n", 0, position) + 1
