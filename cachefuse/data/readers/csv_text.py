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

from cachefuse.data.column import TooLong
from cachefuse.data.readers.csv_quotes import Row, read_unescaped
from cachefuse.data.readers.lines import TEXT_ERRORS, guesses
from cachefuse.errors import DataError
from cachefuse.limits import limits

BLOCK = 1 << 20  # bytes read at a time
LONGEST_LINE = 1 << 25  # characters that the fast reader takes; the other one takes any


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
    file.seek(0)
    guesses.n_bytes = 0
    return _rows(read_unescaped(file, delimiter, origin, n_fields), n_fields, keep, origin)


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
