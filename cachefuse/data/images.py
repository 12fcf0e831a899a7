"""Untrusted image files to RGB: pixels and formats are limited, and every failure is a BadSampleError with its reason.

Stores keep these reasons, and digests hash them: do not reword them.
"""

import errno
import io
import os
import stat
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageFile, UnidentifiedImageError

from cachefuse.data.digests import hash_parts
from cachefuse.errors import BadSampleError

MAX_PIXELS = 100_000_000
MAX_BYTES = 1 << 29
# Failures of the machine, not of the image: a failing disk or mount must stop a run, not mark samples absent for ever.
FAILURES = {errno.EIO, errno.ESTALE, errno.ENOTCONN, errno.ETIMEDOUT, errno.EMFILE, errno.ENFILE, errno.ENOMEM}
# Formats whose decoders run no other program, as EPS would run Ghostscript. MPO, of some cameras, opens as JPEG.
FORMATS = ("JPEG", "PNG", "GIF", "BMP", "WEBP", "TIFF", "PPM", "JPEG2000", "AVIF", "ICO", "TGA")

# The user cannot act on Pillow's warnings on odd metadata and on sizes between its limit and ours. This is set once:
# warnings.catch_warnings around each image would not be thread-safe.
warnings.filterwarnings("ignore", module=r"PIL\.")


@dataclass(frozen=True, slots=True)
class FileImage:
    """An image file of the raw data. Its path must lie in ``root``."""

    path: Path
    root: Path | None = None

    @property
    def name(self) -> str:
        return str(self.path)

    def load(self) -> Image.Image:
        return decode(read_file(self._locate()[0]))

    def fingerprint(self) -> str:
        try:
            path, relative = self._locate()
        except BadSampleError as error:
            return f"{self.path.name}:{error}"
        return f"{relative}:{file_fingerprint(path)}"

    def digest(self) -> str:
        try:
            return hash_parts("file", read_file(self._locate()[0]))
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
        return path, path[len(root) :]


def read_file(path: str, start: int = 0, n_bytes: int = -1) -> bytes:
    """Return a file's bytes, or at most ``n_bytes`` of them from ``start`` on.

    Raises BadSampleError with the reason if the file is not readable, OSError if the disk failed.
    """
    try:
        status = os.stat(path)
        if stat.S_ISDIR(status.st_mode):
            raise BadSampleError("is a folder, not an image")
        if not stat.S_ISREG(status.st_mode):  # reading a pipe or a device may never end
            raise BadSampleError("is not a regular file")
        if status.st_size > MAX_BYTES:
            raise BadSampleError(f"is larger than {MAX_BYTES:,} bytes")
        with open(path, "rb") as file:
            file.seek(start)
            return file.read(n_bytes)
    except BadSampleError:
        raise
    except (OSError, ValueError) as error:
        raise BadSampleError(_explain(error)) from error


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


def decode(data: bytes) -> Image.Image:
    """Decode an image to RGB: the first frame, transparency over white, 16 bits scaled to 8.

    Raises BadSampleError for data that is empty, truncated, not an image, or over MAX_PIXELS.
    """
    if not data:
        raise BadSampleError("the file is empty")
    if ImageFile.LOAD_TRUNCATED_IMAGES:
        raise RuntimeError("PIL.ImageFile.LOAD_TRUNCATED_IMAGES must be off: it hides truncated images")
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            if image.width * image.height > MAX_PIXELS:
                raise BadSampleError(f"has {image.width} x {image.height} pixels, over the limit of {MAX_PIXELS:,}")
            image.load()
            return to_rgb(image)
    except BadSampleError:
        raise
    except Image.DecompressionBombError:
        raise BadSampleError(f"is over the limit of {MAX_PIXELS:,} pixels") from None
    except UnidentifiedImageError:
        raise BadSampleError("is not an image, or not of a supported format") from None
    except Exception as error:  # decoders raise many kinds of errors on damaged files
        raise BadSampleError(f"can't be decoded: {str(error) or type(error).__name__}") from error


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert any mode to RGB. 16-bit values are not clipped, and transparent pixels become white."""
    if image.mode == "RGB" and "transparency" not in image.info:
        return image.copy()
    if image.mode.startswith("I") or image.mode == "F":
        return Image.fromarray(_to_8_bits(np.asarray(image))).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
    return image.convert("RGB")


def _to_8_bits(values: np.ndarray) -> np.ndarray:
    """Scale wide grey values to 0..255: floats from 0..1, integers from 16 bits if any value needs them."""
    largest = np.nan_to_num(values).max(initial=0)
    white = 1.0 if values.dtype.kind == "f" and largest <= 1 else (65535.0 if largest > 255 else 255.0)
    scaled = np.round(np.nan_to_num(values).astype(np.float64) * (255.0 / white))
    clipped: np.ndarray = np.clip(scaled, 0, 255)
    return clipped.astype(np.uint8)
