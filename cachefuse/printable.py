"""Text of data (ids, file names, captions, names of classes), made safe and short for a terminal."""

import re
from collections.abc import Iterable

MAX_MESSAGE = 500  # characters
# Controls (C0, DEL, C1), line and paragraph separators, halves of surrogate pairs, non-characters, and the marks that
# change the direction of text: a terminal obeys these, or shows other text than the data have.
_UNSAFE = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff\ufeff\ufffe\uffff]")


def printable(text: object, limit: int | None = None) -> str:
    r"""Return text with unsafe characters escaped, as in ``\x1b`` and ``\u202e``; newlines too.

    Of more than ``limit`` characters, only the first and the last are kept.
    """
    safe = _UNSAFE.sub(lambda match: _escape(match[0]), str(text))
    return safe if limit is None else shorten(safe, limit)


def printable_lines(text: str, limit: int | None = None) -> str:
    """Return text with each line made ``printable``; its line breaks stay."""
    return "\n".join(printable(line, limit) for line in text.split("\n"))


def shorten(text: str, limit: int) -> str:
    """Return the first and the last characters of a long text, ``limit`` in all."""
    if len(text) <= limit:
        return text
    tail = (limit - 5) // 3
    return f"{text[: limit - 5 - tail]} ... {text[len(text) - tail :]}"


def listed(names: Iterable[object], limit: int = 300) -> str:
    """Return names for a message, with commas: as many as fit into ``limit`` characters, and how many more there are.

    Each is ``printable``, and a long one is cut.
    """
    short = [printable(name, 80) for name in names]
    n, length = 0, 0
    while n < len(short) and (length := length + len(short[n]) + 2) <= limit:
        n += 1
    return ", ".join(short) if n == len(short) else f"{', '.join(short[:n])}, ... and {len(short) - n:,} more"


def escape_json(text: str, *, ascii_only: bool = False) -> str:
    r"""Return JSON text with unsafe characters as ``\u001b``; its own line breaks stay. Other text stays readable."""
    unsafe = re.compile("[^\\x00-\\x7f]") if ascii_only else _UNSAFE
    return unsafe.sub(lambda match: match[0] if match[0] == "\n" else _json_escape(match[0]), text)


def _json_escape(character: str) -> str:
    """Return a character as JSON writes it: in one unit of UTF-16, or in two."""
    units = character.encode("utf-16-be", "surrogatepass").hex()
    return "".join(f"\\u{units[i : i + 4]}" for i in range(0, len(units), 4))


def _escape(character: str) -> str:
    return character.encode("unicode_escape", "surrogatepass").decode("ascii")
