"""Csv text whose quotes are not the standard's: the number of fields tells where a field ends."""

import codecs
import csv
import io
import re
from typing import BinaryIO

from cachefuse.data.column import TooLong, checked_text
from cachefuse.data.readers.lines import TEXT_ERRORS, guesses
from cachefuse.errors import DataError
from cachefuse.limits import limits

Row = list[str | TooLong]
MOST_UNESCAPED = 1 << 28  # bytes of a file, which is held whole


def read_unescaped(file: BinaryIO, delimiter: str, origin: str, n_fields: int | None) -> list[Row]:
    """Return the records of a file, each with ``n_fields`` fields, by default as many as its first line.

    Raises DataError, naming the line, for a record with another number of fields.
    """
    data = _whole(file, origin)
    first_line = data.lstrip(b"\n").partition(b"\n")[0].decode("latin-1")
    n_fields = n_fields or len(next(csv.reader([first_line], delimiter=delimiter)))
    rows = _read_lines(data, n_fields) if delimiter == "\t" else None
    if rows is None:
        guesses.n_bytes = 0
        rows = _read_records(data, delimiter.encode(), origin, n_fields)
    return rows


def _whole(file: BinaryIO, origin: str) -> bytes:
    """Return the bytes of a file, with the line ends of Unix. Raises DataError for a large one."""
    data = file.read(MOST_UNESCAPED + 1)
    if len(data) > MOST_UNESCAPED:
        raise DataError(
            f"{origin}: has quotes or rows that are not those of a csv file, and over {MOST_UNESCAPED:,} bytes; "
            f"double the quotes within fields, or write it as parquet"
        )
    data = data.removeprefix(codecs.BOM_UTF8)
    return data.replace(b"\r\n", b"\n").replace(b"\r", b"\n") if b"\r" in data else data


def _read_lines(data: bytes, n_fields: int) -> list[Row] | None:
    """Split lines at tabs, which prose does not contain. If all rows have ``n_fields``, quotes inside are text."""
    rows: list[Row] = []
    for line in re.finditer(rb"[^\n]+", data):
        if not line[0].strip(b" "):
            continue
        if line[0].count(b"\t") != n_fields - 1:
            return None
        rows.append([_field(field) for field in line[0].split(b"\t")])
    return rows


def _field(field: bytes) -> str | TooLong:
    return _undouble(field[1:-1]) if len(field) > 1 and field[:1] == field[-1:] == b'"' else _text(field)


def _read_records(data: bytes, delimiter: bytes, origin: str, n_fields: int) -> list[Row]:
    """Parse records with a known number of fields. A quote ends a field only where a field can end.

    A last field with quotes that are not the standard's may hold delimiters: it is the rest of its line.
    """
    comma = re.escape(delimiter)
    # In prose a space follows the comma after a quote; between fields it does not.
    closing = rb'"' + comma + rb"(?! )"
    before_last = rb'(?>"[^\n]*?' + closing + rb'|[^"' + comma + rb"\n]*" + comma + rb"){%d}" % (n_fields - 1)
    closing_field = _Search(re.compile(closing), data)
    closing_last = _Search(re.compile(rb'"[ \t]*(?:\Z|\n(?=[ \n]*(?:' + before_last + rb"|\Z)))"), data)
    quoted_record = _Search(re.compile(rb"\n" + before_last + rb'"(?=[^\n])'), data)
    rows: list[Row] = []
    position, limit = 0, -1
    while position < len(data):
        end = _end_of_line(data, position)
        if not data[position:end].strip(b" "):
            position = end + 1
            continue
        # A record ends before a line that must be a new record: then an unpaired opening quote is text.
        if limit < position:
            following = quoted_record.after(position)
            limit = following.start() if following else len(data)
        row = Row()
        while len(row) < n_fields:
            last = len(row) == n_fields - 1
            quoted = data.startswith(b'"', position)
            closed = (closing_last if last else closing_field).after(position + 1) if quoted else None
            if closed and closed.start() < limit:
                if last:
                    _check_surplus(data, position, closed.end(), delimiter, origin, n_fields)
                row.append(_undouble(data[position + 1 : closed.start()]))
                position = closed.end()
                continue
            if quoted and limit == len(data):
                raise DataError(f"{origin} line {_line(data, position)}: a quoted field never ends")
            end = _end_of_line(data, position)
            if not last:
                end = data.find(delimiter, position, end)
                if end < 0:
                    n = len(row) + 1
                    raise DataError(f"{origin} line {_line(data, position)}: has {n} fields instead of {n_fields}")
            if last:
                _check_surplus(data, position, end, delimiter, origin, n_fields)
            row.append(_text(data[position:end]))
            position = end + 1
        rows.append(row)
    return rows


def _check_surplus(data: bytes, start: int, end: int, delimiter: bytes, origin: str, n_fields: int) -> None:
    """Raise DataError if the last field of a record is several ones by the standard."""
    field = data[start:end]
    if delimiter not in field:
        return
    text = io.StringIO(field.decode("latin-1"), newline="")
    try:
        surplus = len(next(csv.reader(text, delimiter=delimiter.decode(), strict=True))) - 1
    except csv.Error:  # its quotes are not the standard's, and explain the delimiters
        return
    if surplus:
        raise DataError(
            f"{origin} line {_line(data, start)}: has {n_fields + surplus} fields instead of {n_fields}; put quotes "
            f"around a field that holds {delimiter.decode()!r}"
        )


class _Search:
    """Searches of one pattern from ever later positions. Each part of the data is searched once."""

    def __init__(self, pattern: re.Pattern[bytes], data: bytes) -> None:
        self._pattern, self._data = pattern, data
        self._from, self._found = -1, pattern.match(b"")

    def after(self, position: int) -> re.Match[bytes] | None:
        """Return the first match that begins at the position or later."""
        known = 0 <= self._from <= position and (self._found is None or self._found.start() >= position)
        if not known:
            self._found = self._pattern.search(self._data, position)
        self._from = position
        return self._found


def _text(field: bytes) -> str | TooLong:
    """Return a field as text. Long ones are not decoded."""
    return checked_text(_decode(field)) if len(field) <= 3 * limits().text_bytes else TooLong(len(field))


def _decode(data: bytes) -> str:
    return data.decode("utf-8", errors=TEXT_ERRORS)


def _undouble(value: bytes) -> str | TooLong:
    """Undo the standard's doubling if every inner quote is doubled; otherwise quotes are text."""
    return _text(value if b'"' in value.replace(b'""', b"") else value.replace(b'""', b'"'))


def _end_of_line(data: bytes, position: int) -> int:
    end = data.find(b"\n", position)
    return len(data) if end < 0 else end


def _line(data: bytes, position: int) -> int:
    return data.count(b"\n", 0, position) + 1
