"""Real-world csv text: read by the standard if possible, else with a parser for unescaped quotes.

A field over the limit of texts is never held whole: see ``TooLong``.
"""

import codecs
import csv
import io
import re
from collections.abc import Callable, Iterator
from itertools import chain
from typing import BinaryIO

from cachefuse.data.column import TooLong, checked_text
from cachefuse.data.readers.lines import TEXT_ERRORS, guesses
from cachefuse.errors import DataError
from cachefuse.limits import limits

Row = list[str | TooLong]
BLOCK = 1 << 20  # bytes read at a time
LONGEST_LINE = 1 << 25  # characters that the fast reader takes; the other one takes any
MOST_UNESCAPED = 1 << 28  # bytes of a file whose quotes are not the standard's: it is held whole


class _NotStandardError(Exception):
    """The text is not csv by the standard, or its records differ in length."""


class _LongLineError(Exception):
    """A line that the fast reader does not take."""


def read_csv(
    file: BinaryIO,
    delimiter: str,
    origin: str,
    n_fields: int | None = None,
    keep: Callable[[list[str]], list[int]] | None = None,
) -> list[Row]:
    """Return the records of a csv file, each with ``n_fields`` fields, by default as many as the first (the header).

    ``keep`` gets the first record, and returns the numbers of the fields to return of every record; all by default.
    Quotes in quoted fields need not be doubled (``"a "stop" sign"``); they are kept.
    Raises DataError, naming the line, if no reading gives every record that number of fields; naming the row, if a
    record repeats the header.
    """
    for read in (_read_fast, _read_standard):
        file.seek(0)
        guesses.n_bytes = 0
        try:
            return _rows(read(file, delimiter, origin), n_fields, keep, origin)
        except _LongLineError:
            continue
        except _NotStandardError:
            break
    data = _whole(file, origin)
    first_line = data.lstrip(b"\n").partition(b"\n")[0].decode("latin-1")
    n = n_fields or len(next(csv.reader([first_line], delimiter=delimiter)))
    rows = _read_lines(data, n) if delimiter == "\t" else None
    if rows is None:
        rows = _read_unescaped(data, delimiter.encode(), origin, n)
    return _rows(rows, n_fields, keep, origin)


def _rows(
    records: Iterator[Row] | list[Row], n_fields: int | None, keep: Callable[..., list[int]] | None, origin: str
) -> list[Row]:
    """Return the kept fields of all records. Raises _NotStandardError if a record has another number of fields."""
    rows: list[Row] = []
    header: Row | None = None
    most, kept, whole = limits().rows + 1, [0], True
    for record in records:
        if not rows:
            header = record if n_fields is None and len(record) > 1 else None
            n_fields = n_fields or len(record)
            if n_fields > limits().columns:
                raise DataError(f"{origin}: has {n_fields:,} columns, over the limit of {limits().columns:,}")
            kept = keep(list(map(str, record))) if keep else list(range(n_fields))
            whole = len(kept) == n_fields
        if len(record) != n_fields:
            raise _NotStandardError
        if rows and record == header:
            raise DataError(f"{origin} row {len(rows)}: repeats the header; delete it")
        rows.append(record if whole else [record[i] for i in kept])
        if len(rows) > most:
            raise DataError(f"{origin}: has over {limits().rows:,} rows, the limit")
    return rows


def _read_fast(file: BinaryIO, delimiter: str, origin: str) -> Iterator[Row]:
    """Yield the records by the standard. Raises _LongLineError for a file with a long line or field."""
    before = csv.field_size_limit(limits().text_bytes)
    lines = chain.from_iterable(io.StringIO(block, newline="") for block in _line_blocks(_blocks(file)))
    try:
        yield from filter(None, csv.reader(lines, delimiter=delimiter, strict=True))
    except csv.Error as error:
        raise (_LongLineError if "field limit" in str(error) else _NotStandardError) from None
    finally:
        csv.field_size_limit(before)


def _blocks(file: BinaryIO) -> Iterator[str]:
    """Yield the text of a file."""
    decoder = codecs.getincrementaldecoder("utf-8-sig")(TEXT_ERRORS)
    while data := file.read(BLOCK):
        yield decoder.decode(data)
    yield decoder.decode(b"", final=True)


def _line_blocks(blocks: Iterator[str]) -> Iterator[str]:
    """Yield the same text in blocks that end where a line ends. Raises _LongLineError for a line without an end."""
    rest: list[str] = []
    n_rest = 0
    for text in blocks:
        cut = max(text.rfind("\n"), text.rfind("\r", 0, -1)) + 1
        if cut:
            yield "".join([*rest, text[:cut]])
            rest, n_rest = [], 0
        rest.append(text[cut:])
        n_rest += len(text) - cut
        if n_rest > LONGEST_LINE:
            raise _LongLineError
    yield "".join(rest)


class _Field:
    """A field as it is read, piece by piece; past the limit only its size is kept."""

    def __init__(self) -> None:
        self._pieces: list[str] = []
        self._n_bytes = 0

    def add(self, piece: str) -> None:
        self._n_bytes += len(piece) if piece.isascii() else len(piece.encode("utf-8", "replace"))
        if self._n_bytes > limits().text_bytes:
            self._pieces.clear()
        else:
            self._pieces.append(piece)

    def take(self) -> str | TooLong:
        """Return the field, and begin the next one."""
        value = "".join(self._pieces) if self._n_bytes <= limits().text_bytes else TooLong(self._n_bytes)
        self._pieces, self._n_bytes = [], 0
        return value


def _read_standard(file: BinaryIO, delimiter: str, origin: str) -> Iterator[Row]:
    """Yield the records by the standard, with the rules of csv.reader, of a file with fields of any length."""
    end_of_plain = re.compile(f"[{delimiter}\r\n]")
    field, row = _Field(), Row()
    state = "start"  # of a field; then plain, quoted, or quote: a quote within quotes
    for text in _blocks(file):
        at = 0
        while at < len(text):
            if state == "quoted":
                end = text.find('"', at)
                field.add(text[at : end if end >= 0 else len(text)])
                at, state = (end + 1, "quote") if end >= 0 else (len(text), state)
                continue
            if state == "start" and text[at] == '"':
                at, state = at + 1, "quoted"
                continue
            if state == "quote" and text[at] == '"':
                field.add('"')
                at, state = at + 1, "quoted"
                continue
            found = end_of_plain.search(text, at)
            end = found.start() if found else len(text)
            if state == "quote" and end > at:
                raise _NotStandardError
            field.add(text[at:end])
            is_blank = not row and state == "start" and end == at  # so far, of a line
            at, state = end + 1, "start" if found else "plain"
            if not found or (is_blank and found[0] != delimiter):
                continue
            row.append(field.take())
            if len(row) > limits().columns:
                raise DataError(f"{origin}: has over {limits().columns:,} columns, the limit")
            if found[0] != delimiter:
                yield row
                row = []
    if state == "quoted":
        raise _NotStandardError
    if row or state != "start":
        yield [*row, field.take()]


def _whole(file: BinaryIO, origin: str) -> bytes:
    """Return the bytes of a file, with the line ends of Unix. Raises DataError for a large one."""
    file.seek(0)
    guesses.n_bytes = 0
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


def _read_unescaped(data: bytes, delimiter: bytes, origin: str, n_fields: int) -> list[Row]:
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
