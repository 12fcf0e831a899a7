"""A large image file as Pillow reads it: piece by piece, like one in memory, and without a failure of the disk lost."""

import ctypes
import io
import logging
import re
import sys
import threading
from contextlib import suppress
from typing import IO, Any, BinaryIO, cast

from PIL import ImageFile, _imaging

OWN_NAME = b"tempfile.tif"  # Pillow's for the data that it hands to libtiff
OWN_BUFFER = ("WEBP", "AVIF")  # their decoders hold whole images of their own beside Pillow's
GREY_STEP = {"L;2": 85, "L;4": 17}  # of 2 and 4 bits a pixel, to reach 255
COMMENT = re.compile(rb"#[^\r\n]*[\r\n]?")  # of a plain PPM, as Pillow reads it


class PixelFile(io.RawIOBase):
    """A regular file of ``n_bytes``, with the positions and errors of ``io.BytesIO``.

    It has no file descriptor: libtiff would map the file into memory, where a file that is cut meanwhile ends the
    process. ``failure`` is the system's error, which decoders may take for the end of the image.
    """

    def __init__(self, file: BinaryIO, n_bytes: int):
        self._file, self.n_bytes = file, n_bytes
        self._at = 0
        self.failure: OSError | None = None

    def read(self, n_bytes: int | None = -1) -> bytes:
        most = max(0, self.n_bytes - self._at)
        wanted = most if n_bytes is None or n_bytes < 0 else min(n_bytes, most)
        if not wanted:
            return b""
        try:
            self._file.seek(self._at)
            data = self._file.read(wanted)
        except OSError as error:
            self.failure = error
            raise
        self._at += len(data)
        return data

    def seek(self, position: int, whence: int = io.SEEK_SET) -> int:
        if whence == io.SEEK_SET and position < 0:
            raise ValueError(f"negative seek value {position}")
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self.n_bytes}[whence]
        self._at = max(0, start + position)
        return self._at

    def tell(self) -> int:
        return self._at

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True


def load_lean(image: ImageFile.ImageFile) -> None:
    """Load an image's pixels with less of memory and time than Pillow alone takes."""
    decoder = getattr(image, "_decoder", None)
    if image.format in OWN_BUFFER and decoder is not None:
        image._decoder = _Once(decoder)  # type: ignore[attr-defined]
    if len(image.tile) == 1 and image.width > image.decodermaxblock:
        # Pillow hands over whole rows, and copies all that it has read of one for each piece that it reads.
        image.decodermaxblock = min(8 * image.width, 1 << 26)
    if len(image.tile) == 1 and image.tile[0].codec_name == "ppm_plain":
        image.fp = cast(IO[bytes], _WithoutComments(image.fp))
    _scale_key(image)
    image.load()


def _scale_key(image: ImageFile.ImageFile) -> None:
    """Give a PNG's transparent colour the scale that its pixels will have: Pillow leaves it as the file has it."""
    key, raw = image.info.get("transparency"), image.tile[0].args if image.tile else None
    if image.format != "PNG" or key is None:
        return
    if raw in GREY_STEP:
        image.info["transparency"] = key * GREY_STEP[raw]
    elif raw == "RGB;16B":
        image.info["transparency"] = tuple(value >> 8 for value in key)


class _WithoutComments:
    """A plain PPM as its decoder reads it. The decoder's time grows with the square of the number of comments."""

    def __init__(self, file: Any):
        self._file, self._in_comment = file, False

    def seek(self, position: int) -> None:
        self._file.seek(position)
        self._in_comment = False

    def read(self, n_bytes: int) -> bytes:
        while data := self._file.read(n_bytes):
            data = b"#" + data if self._in_comment else data
            last_line = max(data.rfind(b"\n"), data.rfind(b"\r")) + 1
            self._in_comment = data.find(b"#", last_line) >= 0
            if data := COMMENT.sub(b"", data):
                return data
        return b""


class _Once:
    """A decoder of a first frame, freed as soon as its pixels are out: before they become an image."""

    def __init__(self, decoder: Any):
        self._decoder = decoder

    def get_next(self) -> Any:  # WebP's
        decoder, self._decoder = self._decoder, None
        return decoder.get_next()

    def get_frame(self, number: int) -> Any:  # AVIF's
        decoder, self._decoder = self._decoder, None
        return decoder.get_frame(number)


class _Said(threading.local):
    """What libtiff said last of a damaged image, in this thread."""

    words = ""


_said = _Said()


def _keep(module: bytes | None, words: bytes | None, values: int | None) -> None:
    """Be libtiff's error handler: ``words`` is a format of C, and ``values`` its va_list, a pointer on each system."""
    if _said.words or not words:
        return
    text = ctypes.create_string_buffer(300)
    if sys.platform == "win32" or ctypes.CDLL(None).vsnprintf(text, len(text), words, ctypes.c_void_p(values)) < 0:
        text.value = words
    parts = (b"" if module == OWN_NAME else module, text.value)
    _said.words = b": ".join(part for part in parts if part).decode("utf-8", "replace")


_HANDLER = ctypes.CFUNCTYPE(None, ctypes.c_char_p, ctypes.c_char_p, ctypes.c_void_p)(_keep)


def decoders_words() -> str:
    """Return what decoders said first in this thread since ``forget_words``, or ""."""
    return _said.words


def forget_words() -> None:
    _said.words = ""


def hear_decoders() -> None:
    """Keep what decoders say of damaged images, instead of printing it to stderr between the lines of a progress bar.

    Of Pillow's decoders, only libtiff prints; Pillow logs.
    """
    logging.getLogger("PIL").addHandler(logging.NullHandler())  # without a handler, Python prints what is logged
    with suppress(AttributeError, OSError):  # a Pillow that does not have libtiff as a library of its own
        ctypes.CDLL(_imaging.__file__).TIFFSetErrorHandler(_HANDLER)
