"""Lines of text files: with or without a byte-order mark, with either line end, in UTF-8 or cp1252."""

import codecs
from collections.abc import Iterator
from pathlib import Path

from cachefuse.errors import DataError

TEXT_ERRORS = "cachefuse-cp1252"
MAX_LINE_BYTES = 1 << 20


def read_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Yield (number, line) for the lines that are not blank, numbered from 1, without line ends.

    Raises DataError, naming the line, for data that is not text, and for lines that are too long.
    """
    with path.open("rb") as file:
        number = 0
        while data := file.readline(MAX_LINE_BYTES + 1):
            number += 1
            if len(data) > MAX_LINE_BYTES:
                raise DataError(f"{path.name} line {number}: is longer than {MAX_LINE_BYTES:,} bytes")
            if b"\0" in data:
                raise DataError(f"{path.name} line {number}: is not UTF-8 text: it holds zero bytes")
            if number == 1:
                data = data.removeprefix(codecs.BOM_UTF8)
            if data.strip():
                yield number, data.decode("utf-8", errors=TEXT_ERRORS).rstrip("\r\n")


def _decode_as_cp1252(error: UnicodeError) -> tuple[str, int]:
    """Decode only the bytes that are not UTF-8 as the old Windows encoding: some files mix both."""
    if not isinstance(error, UnicodeDecodeError):
        raise error
    return error.object[error.start : error.end].decode("cp1252", errors="replace"), error.end


codecs.register_error(TEXT_ERRORS, _decode_as_cp1252)
