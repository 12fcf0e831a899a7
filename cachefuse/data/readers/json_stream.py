"""JSON read value by value: a file of any size takes little memory. Strings over the limit become ``TooLong``."""

import codecs
import json
import re
import secrets
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO

from cachefuse.data.column import TooLong
from cachefuse.limits import limits

PIECE = 1 << 20  # bytes read at a time
MOST_VALUE = 1 << 24  # characters of a value without its long strings; one of only [] and {} takes 24 times as much
ESCAPE = 6  # a character of a string has at most as many in the file: \u0041

_MARK = secrets.token_hex(16)  # stands for a string that is cut; no file can know it
_BLANKS = re.compile(r"[ \t\n\r]*+")
_STRING = re.compile(r'"[^"\\]*+(?:\\.[^"\\]*+)*+"', re.DOTALL)
_TO_QUOTE = re.compile(r'[^"\\]*+(?:\\.[^"\\]*+)*+', re.DOTALL)

Keep = Callable[[dict[str, Any]], Any]


class JsonStream:
    """Reads values one after another from pieces of a text. All methods raise ValueError for what is not JSON.

    keep: reduces each object to the keys that are needed, to save memory.
    """

    def __init__(self, pieces: Iterator[str], keep: Keep | None = None) -> None:
        self._pieces = pieces
        self._decode = json.JSONDecoder(object_hook=keep).raw_decode
        self._text, self._at = "", 0
        self._is_cut = False

    @classmethod
    def of_file(cls, file: BinaryIO, keep: Keep | None = None) -> "JsonStream":
        """Return a stream of a file, in UTF-8, UTF-16 or UTF-32 as the ``json`` module finds."""
        first = file.read(4)
        decoder = codecs.getincrementaldecoder(json.detect_encoding(first))("surrogatepass")

        def pieces() -> Iterator[str]:
            yield decoder.decode(first)
            while data := file.read(PIECE):
                yield decoder.decode(data)
            yield decoder.decode(b"", final=True)

        return cls(pieces(), keep)

    def peek(self) -> str:
        """Return the next character that is not a blank, or "" at the end."""
        while True:
            self._at = self._skip_blanks(self._at)
            if self._at < len(self._text):
                return self._text[self._at]
            if not self._more(PIECE):
                return ""

    def take(self, expected: str) -> None:
        """Step over a character."""
        if self.peek() != expected:
            raise ValueError(f"must have {expected!r} in place of {self.peek() or 'the end of the file'!r}")
        self._at += 1

    def value(self) -> Any:
        """Return the next value. Raises RecursionError for one that is nested too deeply."""
        if not self.peek():
            raise ValueError("it ends where a value must begin, as in an empty file")
        while True:
            try:
                value, end = self._decode(self._text, self._at)
            except json.JSONDecodeError as error:
                if self._more(max(PIECE, len(self._text) - self._at)):
                    continue
                raise ValueError(error.msg) from None
            # A number at the end of what is read may go on.
            if end == len(self._text) and not isinstance(value, str | list | dict) and self._more(PIECE):
                continue
            self._at = end
            return _put_long(value) if self._is_cut else value

    def items(self) -> Iterator[Any]:
        """Yield the values of a list."""
        self.take("[")
        if self.peek() == "]":
            self._at += 1
            return
        while True:
            yield self.value()
            if self.peek() == "]":
                self._at += 1
                return
            self.take(",")

    def names(self) -> Iterator[str]:
        """Yield the keys of an object. The caller reads the value of each before the next."""
        self.take("{")
        if self.peek() == "}":
            self._at += 1
            return
        while True:
            if self.peek() != '"':
                raise ValueError("must have a name in quotes")
            key = self.value()
            self.take(":")
            yield str(key)
            if self.peek() == "}":
                self._at += 1
                return
            self.take(",")

    def end(self) -> None:
        """Raise ValueError if anything follows."""
        if self.peek():
            raise ValueError("it goes on after its end")

    def _skip_blanks(self, at: int) -> int:
        match = _BLANKS.match(self._text, at)
        return match.end() if match else at

    def _more(self, n: int) -> bool:
        """Read about ``n`` more characters, and forget what is taken. Return whether there were any."""
        pieces, n_read = [self._text[self._at :]], 0
        while n_read < n and (piece := next(self._pieces, None)) is not None:
            pieces.append(piece)
            n_read += len(piece)
        self._text, self._at = "".join(pieces), 0
        if len(self._text) > self._most:
            self._cut()
            if len(self._text) > self._most:
                raise ValueError(f"a value has over {self._most:,} characters, besides long texts")
        return n_read > 0

    @property
    def _most(self) -> int:
        return max(MOST_VALUE, 2 * ESCAPE * limits().text_bytes)

    def _cut(self) -> None:
        """Replace strings that are surely over the limit by a mark with their size."""
        most = ESCAPE * limits().text_bytes
        kept, at = [], 0
        while (begin := self._text.find('"', at)) >= 0:
            string = _STRING.match(self._text, begin)
            end = string.end() if string else len(self._text)
            if end - begin <= most:
                kept.append(self._text[at:end])
                at = end
                continue
            n = end - begin - 2
            kept += [self._text[at:begin], ""]
            at = end
            if string is None:
                n_rest, rest = self._skip_string(self._text[begin + 1 :])
                n = n_rest
                kept[-1] = f'"{_MARK}{n}"'
                self._text, at = rest, 0
                self._is_cut = True
                break
            kept[-1] = f'"{_MARK}{n}"'
            self._is_cut = True
        self._text = "".join([*kept, self._text[at:]])

    def _skip_string(self, text: str) -> tuple[int, str]:
        """Return the length of a string of which ``text`` is the beginning, and what follows it."""
        n = 0
        while True:
            match = _TO_QUOTE.match(text)
            end = match.end() if match else 0
            if end < len(text) and text[end] == '"':
                return n + end, text[end + 1 :]
            n += end
            following = next(self._pieces, None)  # a backslash that ends a piece stands before what it escapes
            if following is None:
                raise ValueError("a text never ends")
            text = text[end:] + following


def _put_long(value: Any) -> Any:
    """Return a value with ``TooLong`` in place of marks."""
    if isinstance(value, str):
        return TooLong(int(value.removeprefix(_MARK))) if value.startswith(_MARK) else value
    if isinstance(value, list):
        return [_put_long(item) for item in value]
    if isinstance(value, dict):
        return {key: _put_long(item) for key, item in value.items()}
    return value
