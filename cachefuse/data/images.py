"""Untrusted image files to RGB: pixels and formats are limited, and every failure is a BadSampleError with its reason.

Stores keep these reasons, and digests hash them: do not reword them.
"""

import errno
import io
import os
import stat
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, BinaryIO, cast

from PIL import Image, ImageFile, UnidentifiedImageError

from cachefuse import memory
from cachefuse.data import image_memory
from cachefuse.data.digests import hash_file, hash_parts
from cachefuse.data.inside import is_allowed
from cachefuse.data.opened_image import PixelFile, decoders_words, forget_words, hear_decoders, load_lean
from cachefuse.data.pixels import to_rgb
from cachefuse.errors import BadSampleError

MAX_PIXELS = 100_000_000
MAX_BYTES = 1 << 29
# Failures of the machine, not of the image: a failing disk or mount must stop a run, not mark samples absent for ever.
FAILURES = {errno.EIO, errno.ESTALE, errno.ENOTCONN, errno.ETIMEDOUT, errno.EMFILE, errno.ENFILE, errno.ENOMEM}
FLAGS = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)  # a pipe is not waited for
AT_ONCE = 1 << 20  # bytes of a file that is read before it is decoded; larger ones are read as the decoder asks
# Formats whose decoders run no other program, as EPS would run Ghostscript. MPO, of some cameras, opens as JPEG.
FORMATS = ("JPEG", "PNG", "GIF", "BMP", "WEBP", "TIFF", "PPM", "JPEG2000", "AVIF", "ICO", "TGA")

# The user cannot act on Pillow's warnings on odd metadata and on sizes between its limit and ours. This is set once:
# warnings.catch_warnings around each image would not be thread-safe.
warnings.filterwarnings("ignore", module=r"PIL\.")
hear_decoders()


@dataclass(frozen=True, slots=True)
class FileImage:
    """An image file of the raw data. Its path must lie in ``root``."""

    path: Path
    root: Path | None = None

    @property
    def name(self) -> str:
        return str(self.path)

    def load(self) -> Image.Image:
        with open_file(self._locate()[0]) as (file, n_bytes):
            return decode(file.read() if n_bytes <= AT_ONCE else PixelFile(file, n_bytes))

    def fingerprint(self) -> str:
        try:
            path, relative = self._locate()
        except BadSampleError as error:
            return f"{self.path.name}:{error}"
        return f"{relative}:{file_fingerprint(path)}"

    def digest(self) -> str:
        try:
            with open_file(self._locate()[0]) as (file, n_bytes):
                return hash_file("file", file, n_bytes)
        except BadSampleError as error:
            return hash_parts("unusable", str(error))

    def _locate(self) -> tuple[str, str]:
        """Return the absolute path and the path from the root. Raises BadSampleError for a path outside the root."""
        path = os.path.abspath(self.path)  # resolves "..", which after a link could lead elsewhere
        if self.root is None:
            return path, self.path.name
        root = os.path.join(os.path.abspath(self.root), "")
        if not os.path.join(path, "").startswith(root):
            raise BadSampleError("lies outside the data folder")
        if not is_allowed(path, root):
            raise BadSampleError("a link leads out of the data folder, which --untrusted refuses")
        return path, path[len(root) :]


@contextmanager
def open_file(path: str) -> Iterator[tuple[BinaryIO, int]]:
    """Open a regular file; yield it and its size in bytes.

    Raises BadSampleError with the reason if the file is not readable, OSError if the disk failed.
    """
    n_bytes = None
    try:
        _check_kind(os.stat(path))  # opening a device may already change something
        with open(os.open(path, FLAGS), "rb") as file:
            status = os.fstat(file.fileno())
            _check_kind(status)  # the file may be another one by now
            n_bytes = status.st_size
            yield file, n_bytes
    except BadSampleError:
        raise
    except (OSError, ValueError) as error:
        if isinstance(error, OSError) and error.errno is not None and error.filename is None:
            error.filename = path
        if isinstance(error, OSError) and n_bytes == 0:  # no disk holds it: a link into /proc
            raise BadSampleError(f"can't be read: {error.strerror}") from error
        raise BadSampleError(_explain(error)) from error


def _check_kind(status: os.stat_result) -> None:
    if stat.S_ISDIR(status.st_mode):
        raise BadSampleError("is a folder, not an image")
    if not stat.S_ISREG(status.st_mode):  # reading a pipe or a device may never end
        raise BadSampleError("is not a regular file")
    if status.st_size > MAX_BYTES:
        raise BadSampleError(f"is larger than {MAX_BYTES:,} bytes")


def read_file(path: str, start: int = 0, n_bytes: int = -1) -> bytes:
    """Return a file's bytes, or at most ``n_bytes`` of them from ``start`` on; errors as of ``open_file``."""
    with open_file(path) as (file, _):
        file.seek(start)
        return file.read(n_bytes)


def file_fingerprint(path: str | Path) -> str:
    """Return a fingerprint that shows a change of a file without reading it. Raises OSError if the machine fails.

    It has the file's type, size in bytes, time of change and whether it is readable; or the reason why it has none.
    """
    try:
        status = os.stat(path)
        readable = os.access(path, os.R_OK)
    except (OSError, ValueError) as error:
        return _explain(error)
    return f"{stat.S_IFMT(status.st_mode):o}:{status.st_size}:{status.st_mtime_ns}:{readable:d}"


def _explain(error: OSError | ValueError) -> str:
    """Return why a file is not readable, without its path. Raises the error if the machine failed."""
    if getattr(error, "errno", None) in FAILURES:
        raise error
    if isinstance(error, FileNotFoundError):
        return "no such file"
    words = getattr(error, "strerror", None) or getattr(error, "reason", None) or error
    return f"can't be read: {words}"


def decode(data: bytes | PixelFile) -> Image.Image:
    """Decode an image to RGB: the first frame, transparency over white, 16 bits scaled to 8.

    The memory that it takes is reserved before, for the sample of ``memory.one_sample``; outside of it, until the
    image is decoded. Raises BadSampleError for data that is empty, truncated, not an image, or over MAX_PIXELS;
    MemoryError, which is not the image's fault, if this process gets too little memory.
    """
    n_bytes = len(data) if isinstance(data, bytes) else data.n_bytes
    if not n_bytes:
        raise BadSampleError("the file is empty")
    if ImageFile.LOAD_TRUNCATED_IMAGES:
        raise RuntimeError("PIL.ImageFile.LOAD_TRUNCATED_IMAGES must be off: it hides truncated images")
    forget_words()
    image = _Undecoded(io.BytesIO(data) if isinstance(data, bytes) else cast(IO[bytes], data), n_bytes)
    with memory.one_sample():
        try:
            return image.decode()
        except BadSampleError:
            raise
        except Exception as error:
            if not memory.may_be_short(error):
                raise image.blame(error) from error
        memory.reserve_all()  # the decoder may have lacked what other samples held
        try:
            return image.decode(reserve=False)
        except BadSampleError:
            raise
        except Exception as error:
            if memory.is_short(image.need):
                raise MemoryError(f"decoding an image takes about {image.need:,} bytes") from error
            raise image.blame(error) from error


@dataclass
class _Undecoded:
    """The bytes of an image, and the memory that its header says it ``needs``, once that is known."""

    file: IO[bytes]
    n_bytes: int
    need: int = 0

    def decode(self, reserve: bool = True) -> Image.Image:
        """Return the image in RGB."""
        _check_pixels(*image_memory.size_before_open(self.file))
        self.need, kept = image_memory.opening_bytes(self.file, self.n_bytes)
        if reserve and self.need > AT_ONCE:
            memory.reserve(self.need)
        image = self._open()
        kept += self.n_bytes if isinstance(self.file, io.BytesIO) else 0
        decoding = image_memory.decoding_bytes(image, self.file, self.n_bytes)
        preparing = image_memory.rgb_bytes(*image.size) + memory.bytes_to_prepare(*image.size)
        self.need = max(self.need, kept + decoding, preparing)
        if reserve and not memory.reserve_now(self.need):
            del image  # what an opened image holds must not wait with it
            memory.reserve(self.need)
            image = self._open()
        load_lean(image)
        return to_rgb(image)

    def _open(self) -> ImageFile.ImageFile:
        self.file.seek(0)
        image = Image.open(self.file, formats=FORMATS)
        _check_pixels(*image.size)
        return image

    def blame(self, error: Exception) -> Exception:
        """Return the reason why the image is unusable, or the system's error if the disk failed."""
        if isinstance(self.file, PixelFile) and self.file.failure is not None:
            return self.file.failure
        if isinstance(error, Image.DecompressionBombError):
            return BadSampleError(f"is over the limit of {MAX_PIXELS:,} pixels")
        if isinstance(error, UnidentifiedImageError):
            return BadSampleError("is not an image, or not of a supported format")
        if isinstance(error, MemoryError):  # there was enough: Pillow says this of rows that it cannot count
            return BadSampleError("can't be decoded: it is too wide or too high")
        # Decoders raise many kinds of errors on damaged files.
        return BadSampleError(f"can't be decoded: {decoders_words() or str(error) or type(error).__name__}")


def _check_pixels(width: int, height: int) -> None:
    if width * height > 2 * (Image.MAX_IMAGE_PIXELS or MAX_PIXELS):
        raise Image.DecompressionBombError
    if width * height > MAX_PIXELS:
        raise BadSampleError(f"has {width} x {height} pixels, over the limit of {MAX_PIXELS:,}")
