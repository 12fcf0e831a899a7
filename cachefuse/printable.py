"""Text of data (ids, file names, captions, names of classes), made safe and short for a terminal."""

import re

MAX_MESSAGE = 500  # characters
# Controls (C0, DEL, C1), line and paragraph separators, halves of surrogate pairs, and the marks that change the
# direction of text: a terminal obeys these, or shows other text than the data have.
_UNSAFE = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff\ufeff]")


def printable(text: object, limit: int | None = None) -> str:
    r"""Return text with unsafe characters escaped, as in ``\x1b`` and ``\u202e``; newlines too.

    Of more than ``limit`` characters, only the first and the last are kept.
    """
    safe = _UNSAFE.sub(lambda match: _escape(match[0]), str(text))
    return safe if limit is None else shorten(safe, limit)


def shorten(text: str, limit: int) -> str:
    """Return the first and the last characters of a long text, ``limit`` in all."""
    if len(text) <= limit:
        return text
    tail = (limit - 5) // 3
    return f"{text[: limit - 5 - tail]} ... {text[len(text) - tail :]}"


def _escape(character: str) -> str:
    return character.encode("unicode_escape", "surrogatepass").decode("ascii")
