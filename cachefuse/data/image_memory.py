"""The memory that Pillow takes for an image, estimated before it is decoded, from headers that are not believed.

Bytes at the peak; n is the number of pixels. Pillow holds 1 byte a pixel in modes of one byte, 2 for 16 bits, else 4,
and 8 bytes for each row. ``tests/data/test_image_memory.py`` measures that the estimates hold.
"""

import struct
from typing import IO, Literal

from PIL import ImageFile

from cachefuse.data.pixels import BLOCK, is_rgb

FIXED = 8_000_000  # buffers of any decoder
LOOSE = 64 << 20  # Pillow's limit of the unpacked texts of a PNG
BLOCKS = 40 * BLOCK  # blocks that are converted, in float64
POINTER = 8
MAX_CHUNKS = 100_000  # of a PNG before its pixels
SEARCHED = 1 << 16  # bytes from the start in which AVIF's and JPEG 2000's own headers are looked for
PNG, ICO, JPEG = b"\x89PNG\r\n\x1a\n", b"\0\0\1\0", b"\xff\xd8"
TIFF_TYPES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4, 16: 8, 17: 8, 18: 8}


def size_before_open(file: IO[bytes]) -> tuple[int, int]:
    """Return the width and height of formats that Pillow decodes, or allocates for, when it opens them; else (0, 0)."""
    start = _read(file, 0, 33)
    if start.startswith(PNG):
        return _png_size(start)
    if start.startswith(ICO):
        return max((_icon_size(file, i) for i in range(_icons(start))), key=lambda size: size[0] * size[1])
    return 0, 0


def opening_bytes(file: IO[bytes], n_file: int) -> tuple[int, int]:
    """Return the memory that opening an image takes, before its size is known, and what of it stays: metadata."""
    start = _read(file, 0, 33)
    if start.startswith(PNG):
        width, height = _png_size(start)
        metadata, cleared = _png_chunks(file)
        return 4 * metadata + (2 * rgb_bytes(width, height) * cleared), metadata + rgb_bytes(width, height) * cleared
    if start.startswith(ICO):
        return 4 * rgb_bytes(*size_before_open(file)) + 2 * n_file, 0
    if start[:4] == b"RIFF" or start[4:8] == b"ftyp":
        return 3 * n_file, 0  # the decoder's own copy is counted with it
    if start[:2] in (b"II", b"MM"):
        tags = _tiff_tags(file, start)
        return 2 * tags, tags
    return 2 * min(n_file, LOOSE), min(n_file, LOOSE) * start.startswith(JPEG)


def decoding_bytes(image: ImageFile.ImageFile, file: IO[bytes], n_file: int) -> int:
    """Return the memory that decoding an opened image and converting it to RGB takes at its peak."""
    n, pointers = image.width * image.height, POINTER * image.height
    own = n * _pixel_bytes(image.mode) + pointers
    rgb = rgb_bytes(image.width, image.height)
    position = file.tell()
    decoding = own + _decoder_bytes(image, file, n_file)
    file.seek(position)
    converting = own if is_rgb(image) else own + rgb + min(BLOCKS, 40 * n)
    return max(decoding, converting) + FIXED


def rgb_bytes(width: int, height: int) -> int:
    """Return the memory of an RGB image."""
    return 4 * width * height + POINTER * height


def _pixel_bytes(mode: str) -> int:
    if mode in ("1", "L", "P"):
        return 1
    return 2 if mode.startswith("I;16") else 4


def _decoder_bytes(image: ImageFile.ImageFile, file: IO[bytes], n_file: int) -> int:
    """Return what a decoder holds beside the image."""
    n = image.width * image.height
    match image.format:
        case "JPEG" | "MPO":
            return _jpeg_coefficients(image, file)
        case "WEBP":
            return 12 * n + n_file  # two canvases, the pixels being decoded, and a frame
        case "AVIF":
            return _avif_planes(file, n) + 4 * n + n_file
        case "JPEG2000":
            return _jpeg2000_tile(file, n)
        case "TIFF":
            return _tiff_strip(image, n) + n_file * (image.tile[0].codec_name == "libtiff")
        case "PPM":
            return 9 * n if image.tile[0].codec_name != "raw" else _rows(image, 3)
        case "BMP":
            return 6 * n if image.tile[0].codec_name.endswith("rle") else _rows(image, 3)
        case "PNG" | "TGA":
            return _rows(image, 3)
    return n  # GIF


def _rows(image: ImageFile.ImageFile, n_rows: int) -> int:
    """Return the bytes of some rows as they are in the file, which decoders hold."""
    arguments = image.tile[0].args
    raw = str(arguments if isinstance(arguments, str) or not arguments else arguments[0])
    value = 4 if image.mode in ("I", "F") else 1 + ("16" in raw)
    return n_rows * image.width * value * len(image.getbands())


def _read(file: IO[bytes], start: int, n_bytes: int) -> bytes:
    file.seek(start)
    return file.read(n_bytes)


def _png_size(start: bytes) -> tuple[int, int]:
    return struct.unpack(">II", start[16:24]) if start[12:16] == b"IHDR" and len(start) >= 24 else (0, 0)


def _png_chunks(file: IO[bytes]) -> tuple[int, bool]:
    """Return the bytes of a PNG's chunks before its pixels, and of what they unpack to at most.

    And whether its first frame is cleared afterwards: Pillow makes the empty frame when it opens the image.
    """
    n_bytes, packed, cleared, at = 0, 0, False, len(PNG)
    for _ in range(MAX_CHUNKS):
        header = _read(file, at, 8)
        name = header[4:]
        if len(header) < 8 or name in (b"IDAT", b"IEND"):
            break
        length = int.from_bytes(header[:4], "big")
        n_bytes += length
        packed += length if name in (b"zTXt", b"iTXt", b"iCCP") else 0
        cleared |= name == b"fcTL" and _read(file, at + 8 + 24, 1) != b"\0"
        at += length + 12
    return min(n_bytes, _end(file)) + min(LOOSE, 1000 * packed), cleared


def _end(file: IO[bytes]) -> int:
    return file.seek(0, 2)


def _icons(start: bytes) -> int:
    return max(1, int.from_bytes(start[4:6], "little"))


def _icon_size(file: IO[bytes], number: int) -> tuple[int, int]:
    """Return the size that an icon's own PNG or bitmap states, whatever the list of icons says."""
    entry = _read(file, 6 + 16 * number, 16)
    icon = _read(file, int.from_bytes(entry[12:16], "little"), 24)
    if icon.startswith(PNG):
        return _png_size(icon)
    if len(icon) < 12:
        return 0, 0
    width, height = struct.unpack("<ii", icon[4:12])
    return abs(width), abs(height) // 2


def _tiff_tags(file: IO[bytes], start: bytes) -> int:
    """Return the bytes of the values of a TIFF's first directory."""
    order: Literal["little", "big"] = "little" if start[:2] == b"II" else "big"
    big = int.from_bytes(start[2:4], order) == 43
    word, entry = (8, 20) if big else (4, 12)
    at = int.from_bytes(start[8:16] if big else start[4:8], order)
    n_count = 8 if big else 2
    n = min(int.from_bytes(_read(file, at, n_count), order), 1 << 16)
    entries = _read(file, at + n_count, n * entry)
    total = 0
    for i in range(0, len(entries) - entry + 1, entry):
        kind = int.from_bytes(entries[i + 2 : i + 4], order)
        total += TIFF_TYPES.get(kind, 0) * int.from_bytes(entries[i + 4 : i + 4 + word], order)
    return min(total, _end(file))


def _tiff_strip(image: ImageFile.ImageFile, n: int) -> int:
    """Return the bytes of the largest strip or tile, unpacked, of which a decoder holds one."""
    tags = getattr(image, "tag_v2", {})
    try:
        samples, bits = int(tags.get(277, 1)), max(map(int, tags.get(258, (1,))), default=1)
        width = int(tags.get(322, image.width))
        height = int(tags.get(323, min(image.height, tags.get(278, image.height))))
    except (TypeError, ValueError):  # the tag has another type
        return 8 * n
    strip = max(0, width * height) * max(4, samples * ((bits + 7) // 8))
    return min(strip, max(8 * n, 1 << 26)) + _rows(image, 3)


def _jpeg_coefficients(image: ImageFile.ImageFile, file: IO[bytes]) -> int:
    """Return the bytes of the coefficients, which a file with several scans needs all at once."""
    layers = getattr(image, "layer", [])
    if not all(layer[1] and layer[2] for layer in layers) or not layers:
        return 0
    position = file.tell()
    scans = [_read(file, max(0, position - n), 3) for n in (8, 10, 12, 14)]
    whole = struct.pack(">HB", 6 + 2 * len(layers), len(layers)) in scans
    if whole and not image.info.get("progressive"):
        return 0
    across, down = max(layer[1] for layer in layers), max(layer[2] for layer in layers)
    edge = 8 * max(across, down)
    n = (image.width + edge) * (image.height + edge)
    return sum(2 * n * layer[1] * layer[2] // (across * down) for layer in layers)


def _avif_planes(file: IO[bytes], n: int) -> int:
    """Return the bytes of the planes of colour and alpha: one byte a value, or two for deep ones."""
    start = _read(file, 0, SEARCHED)
    flags = [start[i + 2] for i in _places(start, b"av1C") if len(start) > i + 2]
    deep = not flags or any(flag & 0x40 for flag in flags)
    halved = bool(flags) and all(flag & 0x10 or flag & 0x0C == 0x0C for flag in flags)  # 4:2:0, or grey
    return int(n * (2.5 if halved else 5.2) * (2 if deep else 1))


def _jpeg2000_tile(file: IO[bytes], n: int) -> int:
    """Return the bytes of a tile's values: 32 bits each in the decoder, and once more in one or two bytes."""
    start = _read(file, 0, SEARCHED)
    tile, n_values = n, 4
    for i in (place - 4 for place in _places(start, b"\xff\x4f\xff\x51")):
        if len(start) >= i + 42:
            width, height = struct.unpack(">II", start[i + 24 : i + 32])
            tile, n_values = min(n, width * height), int.from_bytes(start[i + 40 : i + 42], "big")
    return tile * n_values * 6


def _places(data: bytes, word: bytes) -> list[int]:
    """Return the positions after each occurrence of a word."""
    places, at = [], data.find(word)
    while at >= 0:
        places.append(at + len(word))
        at = data.find(word, at + 1)
    return places
