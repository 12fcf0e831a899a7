"""Decoded images to RGB, in blocks: beside the image and its result, only a few megabytes are in use."""

from collections.abc import Callable, Iterator

import numpy as np
from PIL import Image

BLOCK = 1 << 20  # pixels converted at a time
ALPHA = ("RGBA", "LA", "PA", "La", "RGBa")


def is_rgb(image: Image.Image) -> bool:
    """Whether an image needs no conversion."""
    return image.mode == "RGB" and "transparency" not in image.info


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert any mode to RGB. 16-bit values are not clipped, and transparent pixels become white.

    ``info["transparency"]`` has the scale of the image's pixels. An RGB image is not copied. The result has no
    metadata, which may be large.
    """
    if is_rgb(image):
        return Image.Image()._new(image.im)  # the plain class, without the file and the metadata of ``image``
    if image.mode.startswith("I") or image.mode == "F":
        white, key = _white(image), image.info.get("transparency")
        return _by_block(image, lambda block: Image.fromarray(_to_8_bits(np.asarray(block), white, key)).convert("RGB"))
    if image.mode in ALPHA or "transparency" in image.info:
        return _by_block(image, _over_white)
    return _by_block(image, lambda block: block.convert("RGB"))


def _over_white(block: Image.Image) -> Image.Image:
    rgba = block.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")


def _by_block(image: Image.Image, convert: Callable[[Image.Image], Image.Image]) -> Image.Image:
    if image.width * image.height <= BLOCK:
        return Image.Image()._new(convert(image).im)
    result = Image.new("RGB", image.size)
    for box in _boxes(image):
        result.paste(convert(image.crop(box)), box[:2])
    return result


def _boxes(image: Image.Image) -> Iterator[tuple[int, int, int, int]]:
    """Yield boxes (left, top, right, bottom) of about ``BLOCK`` pixels that cover the image."""
    width = max(1, min(image.width, BLOCK))
    height = BLOCK // width
    for top in range(0, image.height, height):
        for left in range(0, image.width, width):
            yield left, top, min(left + width, image.width), min(top + height, image.height)


def _white(image: Image.Image) -> float:
    """Return the value of white: 1 for floats up to 1; 65,535 if any value is over 255; else 255."""
    blocks = (np.asarray(image.crop(box)) for box in _boxes(image))
    largest = max(np.nan_to_num(block).max(initial=0) for block in blocks)
    if image.mode == "F" and largest <= 1:
        return 1.0
    return 65535.0 if largest > 255 else 255.0


def _to_8_bits(values: np.ndarray, white: float, key: int | None) -> np.ndarray:
    """Return values scaled to 255 for white. Those that equal ``key`` are transparent, and become white."""
    scaled = np.round(np.nan_to_num(values).astype(np.float64) * (255.0 / white))
    if key is not None:
        scaled[values == key] = 255
    clipped: np.ndarray = np.clip(scaled, 0, 255)
    return clipped.astype(np.uint8)
