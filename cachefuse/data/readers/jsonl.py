"""Tables with a JSON object a line."""

import io
import json
from collections.abc import Collection, Iterator
from typing import Any, BinaryIO

from cachefuse.data.readers.json_stream import PIECE, JsonStream
from cachefuse.data.readers.lines import TEXT_ERRORS
from cachefuse.data.readers.table_columns import Cell, TableColumns
from cachefuse.errors import DataError
from cachefuse.limits import limits


def read_jsonl(file: BinaryIO, name: str, wanted: Collection[str] | None) -> TableColumns:
    """Return the columns of a file. Raises DataError, naming the line, if one is not a JSON object."""
    names: dict[str, None] = {}  # in the order of first use
    columns: dict[str, list[Cell]] = {}
    last: tuple[str, ...] | None = None  # the keys of the row before
    filled: list[tuple[str, list[Cell]]] = []  # their columns, which have a cell for each row so far
    n, most = 0, limits().rows
    for number, row in _objects(file, name):
        keys = tuple(row)
        if keys != last:
            names.update(dict.fromkeys(keys))
            if len(names) > limits().columns:
                raise DataError(f"{name} line {number}: the file has over {limits().columns:,} columns, the limit")
            last = keys
            chosen = keys if wanted is None else [key for key in wanted if key in row]
            filled = [(key, columns.setdefault(key, [])) for key in chosen]
            for _, column in filled:
                column.extend([None] * (n - len(column)))
        for key, column in filled:
            column.append(row[key])
        n += 1
        if n > most:
            raise DataError(f"{name}: has over {most:,} rows, the limit")
    if not n:
        raise DataError(f"{name}: the file is empty")
    for column in columns.values():
        column.extend([None] * (n - len(column)))
    return TableColumns({key: columns[key] for key in names if key in columns}, names, n)


def _objects(file: BinaryIO, name: str) -> Iterator[tuple[int, dict[str, Any]]]:
    lines = io.TextIOWrapper(file, encoding="utf-8-sig", errors=TEXT_ERRORS)
    try:
        yield from _rows(lines, name)
    finally:
        lines.detach()  # the caller closes the file


def _rows(lines: io.TextIOWrapper, name: str) -> Iterator[tuple[int, dict[str, Any]]]:
    number = 0
    while line := lines.readline(PIECE):
        number += 1
        is_whole = len(line) < PIECE or line.endswith("\n")
        if is_whole and line.isspace():
            continue
        try:
            row = json.loads(line) if is_whole else _one(lines, line)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{name} line {number}: not valid JSON: {error}") from error
        if not isinstance(row, dict):
            raise DataError(f"{name} line {number}: must be a JSON object. Got {type(row).__name__} instead")
        yield number, row


def _one(lines: io.TextIOWrapper, line: str) -> Any:
    """Return the value of a long line, of which ``line`` is the first part."""

    def pieces() -> Iterator[str]:
        piece = line
        while piece:
            yield piece
            piece = "" if piece.endswith("\n") else lines.readline(PIECE)

    stream = JsonStream(pieces())
    value = stream.value()
    stream.end()
    return value
