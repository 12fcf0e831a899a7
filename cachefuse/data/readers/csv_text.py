"""Reading csv text as it is found: by the standard where it holds, else with a parser for unescaped quotes."""

import csv
import io
import re

from cachefuse.errors import DataError

csv.field_size_limit(1 << 26)  # long plots are longer than the module's 128 KiB


def read_csv(text: str, delimiter: str, origin: str) -> list[list[str]]:
    """Return the records of csv text, header included, each as long as the first.

    Text with quotes inside quoted fields that are not doubled (``"a "stop" sign"``) is read too, and keeps them.
    Raises DataError, naming the line, if neither reading gives every record the header's number of fields.
    """
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    rows = _read_standard(text, delimiter)
    return rows if rows is not None else _read_unescaped(text, delimiter, origin)


def _read_standard(text: str, delimiter: str) -> list[list[str]] | None:
    try:
        rows = [row for row in csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True) if row]
    except csv.Error:
        return None
    return rows if all(len(row) == len(rows[0]) for row in rows) else None


def _read_unescaped(text: str, delimiter: str, origin: str) -> list[list[str]]:
    """Parse records of a known number of fields, where a quote ends a field only if a field can end there."""
    first_line = text[: text.find("\n")] if "\n" in text else text
    n_fields = len(next(csv.reader([first_line], delimiter=delimiter), []))
    field = rf'(?:"[^"\n]*"|[^"{re.escape(delimiter)}\n]*)'
    record_start = re.compile(rf"(?:{field}{re.escape(delimiter)}){{{n_fields - 1}}}|\s*\Z")
    rows, position = [], 0
    while position < len(text):
        if text[position] == "\n":
            position += 1
            continue
        row = []
        for column in range(n_fields):
            last = column == n_fields - 1
            if text.startswith('"', position):
                end = _closing_quote(text, position + 1, delimiter, record_start if last else None)
                if end < 0:
                    raise DataError(f"{origin} line {_line(text, position)}: a quoted field never ends")
                row.append(_undouble(text[position + 1 : end]))
                position = end + 2
            else:
                end = text.find("\n", position)
                end = len(text) if end < 0 else end
                if not last:
                    end = text.find(delimiter, position, end)
                    if end < 0:
                        raise DataError(
                            f"{origin} line {_line(text, position)}: has {column + 1} fields instead of {n_fields}"
                        )
                row.append(text[position:end])
                position = end + 1
        rows.append(row)
    return rows


def _closing_quote(text: str, start: int, delimiter: str, record_start: re.Pattern[str] | None) -> int:
    """Return where a quoted field that began before ``start`` ends; ``record_start`` is given for a last field.

    In prose a comma after a quote is followed by a space, between fields it is not.
    """
    quote = text.find('"', start)
    while quote >= 0:
        after = text[quote + 1 : quote + 2]
        if record_start is None:
            if after == delimiter and text[quote + 2 : quote + 3] not in (" ", "\t"):
                return quote
        elif after == "" or (after == "\n" and record_start.match(text, quote + 2)):
            return quote
        quote = text.find('"', quote + 1)
    return -1


def _undouble(value: str) -> str:
    """Undo the standard's doubling where every inner quote is doubled; elsewhere quotes are text."""
    return value if '"' in value.replace('""', "") else value.replace('""', '"')


def _line(text: str, position: int) -> int:
    return text.count("\n", 0, position) + 1
