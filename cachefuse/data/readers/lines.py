"""Lines of text files: with or without a byte-order mark, with either line end, in UTF-8 or cp1252."""

import codecs
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from cachefuse.data.column import TooLong, checked_text
from cachefuse.errors import DataError
from cachefuse.files import open_regular
from cachefuse.limits import limits

TEXT_ERRORS = "cachefuse-cp1252"
MAX_LINE_BYTES = 1 << 20


class _Guesses(threading.local):
    """How many bytes of texts were not UTF-8 since someone set this to zero, in this thread."""

    n_bytes = 0


guesses = _Guesses()


def read_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Yield (number, line) for the lines that are not blank, numbered from 1, without line ends.

    Raises DataError, naming the line, for data that is not text, and for lines that are too long.
    """
    for number, (line,) in read_fields(path, None):
        if isinstance(line, TooLong) or len(line) > MAX_LINE_BYTES:
            raise DataError(f"{path.name} line {number}: is longer than {MAX_LINE_BYTES:,} bytes")
        yield number, line


def read_fields(
    path: Path, separator: str | None, n_separators: int = -1, errors: str = TEXT_ERRORS
) -> Iterator[tuple[int, list[str | TooLong]]]:
    """Yield (number, fields) for the lines that are not blank, numbered from 1, without line ends.

    A line ends a field at each separator, or only at the first ``n_separators``. Raises DataError, naming the line, for
    data that is not text.
    """
    with open_regular(path, limits().file_bytes) as file:
        number = 0
        while data := file.readline(MAX_LINE_BYTES + 1):
            number += 1
            where = f"{path.name} line {number}"
            if number == 1:
                data = data.removeprefix(codecs.BOM_UTF8)
            if len(data) > MAX_LINE_BYTES:
                yield number, _long_line(file, data, separator, n_separators, errors, where)
                continue
            _check_text(data, where)
            if data.strip():
                line = data.decode("utf-8", errors=errors).rstrip("\r\n")
                fields = line.split(separator, n_separators) if separator else [line]
                yield number, [checked_text(field) for field in fields]


def _long_line(
    file: BinaryIO, data: bytes, separator: str | None, n_separators: int, errors: str, where: str
) -> list[str | TooLong]:
    """Return the fields of a line, of which ``data`` is the first part; of long ones only their sizes are kept."""
    mark = separator.encode() if separator else None
    fields: list[str | TooLong] = []
    pieces: list[bytes] = []
    n_bytes = 0

    def end_field() -> None:
        text = b"".join(pieces).decode("utf-8", errors=errors)
        fields.append(checked_text(text) if n_bytes <= limits().text_bytes else TooLong(n_bytes))
        pieces.clear()

    while data:
        _check_text(data, where)
        is_last = data.endswith(b"\n")
        left = n_separators - len(fields) if n_separators >= 0 else -1
        line = data.rstrip(b"\r\n") if is_last else data
        parts = line.split(mark, left) if mark and left else [line]
        for i, part in enumerate(parts):
            if i:
                end_field()
                n_bytes = 0
            n_bytes += len(part)
            if n_bytes <= limits().text_bytes:
                pieces.append(part)
            else:
                pieces.clear()
        if len(fields) > limits().columns:
            raise DataError(f"{where}: has over {limits().columns:,} columns, the limit")
        data = b"" if is_last else file.readline(MAX_LINE_BYTES + 1)
    end_field()
    return fields


def _check_text(data: bytes, where: str) -> None:
    if b"\0" in data:
        raise DataError(f"{where}: is not UTF-8 text: it holds zero bytes")


def _decode_as_cp1252(error: UnicodeError) -> tuple[str, int]:
    """Decode only the bytes that are not UTF-8 as the old Windows encoding: some files mix both."""
    if not isinstance(error, UnicodeDecodeError):
        raise error
    guesses.n_bytes += error.end - error.start
    return error.object[error.start : error.end].decode("cp1252", errors="replace"), error.end


codecs.register_error(TEXT_ERRORS, _decode_as_cp1252)
