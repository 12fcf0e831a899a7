import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from cachefuse.data import pixels
from cachefuse.data.images import FileImage, decode

RNG = np.random.default_rng(0)
SIZE = (37, 29)  # width, height


def noise(mode):
    if mode == "F":
        return Image.fromarray(RNG.normal(0, 100, SIZE[::-1]).astype(np.float32))
    if mode == "I":
        return Image.fromarray(RNG.integers(-5, 70_000, SIZE[::-1], np.int32))
    if mode.startswith("I;16"):
        return Image.frombytes(mode, SIZE, RNG.bytes(2 * SIZE[0] * SIZE[1]))
    if mode == "1":
        return noise("L").convert("1")
    bands = len(Image.new(mode, (1, 1)).getbands())
    image = Image.frombytes(mode, SIZE, RNG.bytes(bands * SIZE[0] * SIZE[1]))
    if mode in ("P", "PA"):
        image.putpalette(RNG.bytes(768))
    return image


def at_once(image):
    """The conversion of a whole image, without blocks."""
    if image.mode.startswith("I") or image.mode == "F":
        values = np.asarray(image)
        largest = np.nan_to_num(values).max(initial=0)
        white = 1.0 if values.dtype.kind == "f" and largest <= 1 else (65535.0 if largest > 255 else 255.0)
        scaled = np.round(np.nan_to_num(values).astype(np.float64) * (255.0 / white))
        return Image.fromarray(np.clip(scaled, 0, 255).astype(np.uint8)).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
    return image.convert("RGB")


MODES = ("1", "L", "P", "PA", "LA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "LAB", "HSV", "F", "I")
TRANSPARENT = {"P": (7, bytes(range(256))), "RGB": ((1, 2, 3),), "L": (9,), "1": (255,)}
CASES = [(mode, None) for mode in (*MODES, "I;16", "I;16B")]
CASES += [(mode, value) for mode, values in TRANSPARENT.items() for value in values]


@pytest.mark.parametrize("block", [30, 500])
@pytest.mark.parametrize(("mode", "transparency"), CASES)
def test_blocks_give_the_pixels_of_the_whole(monkeypatch, mode, transparency, block):
    image = noise(mode)
    if transparency is not None:
        image.info["transparency"] = transparency
    expected = at_once(image).tobytes()
    monkeypatch.setattr(pixels, "BLOCK", block)
    result = pixels.to_rgb(image)
    assert (result.mode, result.size, result.info) == ("RGB", SIZE, {})
    assert result.tobytes() == expected


@pytest.mark.parametrize("largest", [0.5, 1.0, 200.0, 70_000.0])
def test_the_scale_is_that_of_the_whole_image(monkeypatch, largest):
    values = RNG.random((50, 40)).astype(np.float32)
    values[-1, -1] = largest
    values[0, :3] = np.nan, -1, 0
    monkeypatch.setattr(pixels, "BLOCK", 64)
    assert pixels.to_rgb(Image.fromarray(values)).tobytes() == at_once(Image.fromarray(values)).tobytes()


def test_an_rgb_image_is_not_copied():
    image = noise("RGB")
    assert pixels.to_rgb(image).im is image.im


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "WEBP", "GIF", "BMP", "PPM", "JPEG", "JPEG2000", "AVIF", "ICO", "TGA"])
def test_a_large_file_is_read_like_bytes(monkeypatch, tmp_path, kind):
    data = io.BytesIO()
    noise("RGB").resize((120, 110)).save(data, kind)
    (tmp_path / "image").write_bytes(data.getvalue())
    monkeypatch.setattr("cachefuse.data.images.AT_ONCE", 0)
    loaded = FileImage(tmp_path / "image").load()
    assert loaded.tobytes() == decode(data.getvalue()).tobytes()


def png(kind, bits, rows, key):
    """A PNG of N rows of bytes, with the transparent colour ``key``; kind 0 is grey, 2 is RGB."""
    width = 8 * len(rows[0]) // (bits * (3 if kind else 1))
    header = struct.pack(">IIBBBBB", width, len(rows), bits, kind, 0, 0, 0)
    pixels = zlib.compress(b"".join(b"\0" + row for row in rows))
    chunks = [(b"IHDR", header), (b"tRNS", struct.pack(f">{len(key)}H", *key)), (b"IDAT", pixels), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data)) for name, data in chunks
    )


@pytest.mark.parametrize(
    ("kind", "bits", "row", "key", "expected"),
    [
        (0, 1, b"\x40", (0,), [255] * 8),
        (0, 2, b"\x1b", (1,), [0, 255, 170, 255]),
        (0, 4, b"\x57", (5,), [255, 119]),
        (0, 8, b"\x05\x07", (5,), [255, 7]),
        (0, 16, struct.pack(">3H", 1000, 1001, 2570), (1000,), [255, 4, 10]),
        (2, 8, bytes([1, 2, 3, 1, 2, 4]), (1, 2, 3), [255, 255, 255, 1, 2, 4]),
        (2, 16, struct.pack(">6H", 257, 514, 771, 257, 514, 1028), (257, 514, 771), [255, 255, 255, 1, 2, 4]),
    ],
)
def test_the_transparent_colour_of_a_png_becomes_white(kind, bits, row, key, expected):
    pixels = np.asarray(decode(png(kind, bits, [row], key)))
    assert pixels.reshape(-1)[:: 1 if kind else 3].tolist() == expected
