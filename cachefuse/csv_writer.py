"""Csv files: exact ones for machines, and tables for people, which a spreadsheet opens without running anything."""

import csv
import math
from collections.abc import Iterable, Sequence
from types import SimpleNamespace

from cachefuse.printable import printable

# A spreadsheet takes a cell that begins so as a formula; some take the wide forms too.
_BEGINS_FORMULA = ("=", "+", "-", "@", "\uff1d", "\uff0b", "\uff0d", "\uff20")


def csv_bytes(rows: Iterable[Sequence[object]]) -> bytes:
    """Return rows as csv, with each text as it is."""
    lines: list[str] = []
    # Only a character of the line's end is quoted, so this end has both.
    csv.writer(SimpleNamespace(write=lines.append), lineterminator="\r\n").writerows(rows)
    return "".join(f"{line[:-2]}\n" for line in lines).encode("utf-8", "surrogatepass")


def csv_for_people(rows: Iterable[Sequence[object]]) -> bytes:
    """Return rows as csv. Undefined numbers are empty; an apostrophe stands before a text that would be a formula.

    Texts are ``printable``.
    """
    return csv_bytes([_cell(value) for value in row] for row in rows)


def _cell(value: object) -> object:
    if isinstance(value, str):
        text = printable(value)
        return f"'{text}" if text.startswith(_BEGINS_FORMULA) and not _is_number(text) else text
    return "" if isinstance(value, float) and math.isnan(value) else value


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text)) and "_" not in text and text == text.strip()
    except ValueError:
        return False
