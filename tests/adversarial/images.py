"""Hostile images: small files of every format that is read, and some that are not, then mutated or made to lie."""

import io
import os
import random
import struct
import zlib
from pathlib import Path

import numpy as np
from PIL import Image, PngImagePlugin

LIMIT = 100_000_000  # pixels, as in cachefuse.data.images


def picture(rng, mode="RGB", size=None):
    """A picture of noise over a gradient."""
    width, height = size or (rng.randrange(1, 64), rng.randrange(1, 64))
    seed = np.random.default_rng(rng.getrandbits(32))
    if mode in ("I;16", "I"):
        return Image.fromarray(seed.integers(0, 65536, (height, width), dtype=np.uint16))
    if mode == "F":
        return Image.fromarray(seed.normal(size=(height, width)).astype(np.float32))
    return Image.fromarray(seed.integers(0, 256, (height, width, 3), dtype=np.uint8)).convert(mode)


def saved(image, format, **options):
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def plain(format, modes=("RGB",), **options):
    """A maker of a format in any of its modes; an option that is a list is chosen from."""

    def make(rng):
        chosen = {name: rng.choice(value) if isinstance(value, list) else value for name, value in options.items()}
        return saved(picture(rng, rng.choice(modes)), format, **chosen)

    return make


def frames(format, modes=("RGB",), **options):
    def make(rng):
        size = rng.randrange(1, 40), rng.randrange(1, 40)
        mode = rng.choice(modes)
        images = [picture(rng, mode, size) for _ in range(rng.choice((2, 3, 20)))]
        return saved(images[0], format, save_all=True, append_images=images[1:], **options)

    return make


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width, height, depth=8, colour=2, interlace=0, data=None, before=b""):
    """A PNG by hand: its header may lie."""
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, interlace)
    body = zlib.compress(bytes(1000) if data is None else data, 9)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + before + chunk(b"IDAT", body) + chunk(b"IEND", b"")


def png_by_hand(rng):
    return png(
        rng.randrange(1, 30),
        rng.randrange(1, 30),
        rng.choice((1, 2, 4, 8, 16)),
        rng.choice((0, 2, 3, 4, 6)),
        rng.randrange(2),
    )


def png_text(rng):
    info = PngImagePlugin.PngInfo()
    info.add_text("Comment", "x" * rng.choice((10, 10_000, 3_000_000)), zip=rng.random() < 0.7)
    info.add_itxt("Title\x1b[31m", "\u202e" * rng.choice((1, 1000)))
    return saved(picture(rng), "PNG", pnginfo=info)


def profile(format):
    def make(rng):
        return saved(picture(rng), format, icc_profile=rng.randbytes(rng.choice((10, 5000, 500_000))))

    return make


def exif(format):
    def make(rng):
        data = Image.Exif()
        data[0x010E] = "d\x1b" * rng.choice((3, 10_000))
        data[0x0112] = rng.choice((0, 1, 6, 8, 99))
        return saved(picture(rng), format, exif=data)

    return make


def big_tiff(rng):
    return saved(picture(rng), "TIFF", big_tiff=True)


def netpbm(rng):
    magic = rng.choice((b"P1", b"P2", b"P3", b"P4", b"P5", b"P6", b"Pf", b"PF", b"P7"))
    width, height = rng.randrange(1, 20), rng.randrange(1, 20)
    top = rng.choice((b"", b"255", b"65535", b"1", b"-1.0", b"0", b"99999999"))
    return magic + b"\n%d %d\n" % (width, height) + top + b"\n" + rng.randbytes(width * height * 12)


def not_an_image(rng):
    kinds = (
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 99 99\nshowpage\n",
        b"%PDF-1.4\n%\xe2\xe3\n1 0 obj\n<<>>\nendobj\n",
        b'<?xml version="1.0"?><svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"/>',
        b"just some text\n" * 50,
        b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + rng.randbytes(200),
        b"\0\0\0\x18ftypavif\0\0\0\0mif1avif" + rng.randbytes(200),
        b"",
        b"\0",
        rng.randbytes(rng.randrange(1, 4000)),
        b"GIF89a",
        b"\xff\xd8\xff\xe0",
        b"RIFF\0\0\0\0WEBP",
        b"II*\0",
        b"MZ" + rng.randbytes(500),
        b"PK\x03\x04" + rng.randbytes(500),
        b"<html></html>",
        b"\x1b]0;title\x07",
    )
    return rng.choice(kinds)


def bomb(rng):
    """A file whose header asks for pixels just under, at or over the limit, or for very many."""
    width, height = rng.choice(
        (
            (9999, 9999),
            (10_000, 10_000),
            (10_001, 10_000),
            (1, 99_999_999),
            (99_999_999, 1),
            (65_535, 65_535),
            (2**31 - 1, 2**31 - 1),
        )
    )
    depth, colour = rng.choice(((8, 2), (16, 0), (8, 4), (16, 6), (1, 0)))
    if rng.random() < 0.5:
        return png(width, height, depth, colour)
    header = b"P5\n%d %d\n%d\n" % (width, height, rng.choice((255, 65535)))
    bmp = b"BM" + struct.pack(
        "<IHHIIiiHHIIiiII", 54, 0, 0, 54, 40, width % 2**31, height % 2**31, 1, 24, 0, 0, 0, 0, 0, 0
    )
    gif = (
        b"GIF89a"
        + struct.pack("<HH", min(width, 65535), min(height, 65535))
        + b"\x80\0\0"
        + bytes(6)
        + b",\0\0\0\0"
        + struct.pack("<HH", min(width, 65535), min(height, 65535))
        + b"\0\x02\x02D\x01\0;"
    )
    return rng.choice((header + bytes(1000), bmp + bytes(1000), gif))


LARGE = ((9990, 9990), (1, 99_999_000), (99_000, 1000))


def real_bomb(rng):
    """A file under the limit that does decode, to as much memory as it may."""
    kind = rng.choice(("png L", "png LA", "png 16", "png RGBA", "png 1", "tiff F", "gif"))
    width, height = rng.choice(LARGE)
    if kind == "gif":
        return saved(Image.new("P", (9000, 9000)), "GIF")
    if kind == "tiff F":
        return saved(Image.new("F", (9000, 9000)), "TIFF", compression="tiff_adobe_deflate")
    depth, colour, size = {
        "png L": (8, 0, 8),
        "png LA": (8, 4, 16),
        "png 16": (16, 0, 16),
        "png RGBA": (8, 6, 32),
        "png 1": (1, 0, 1),
    }[kind]
    row = bytes(1 + (width * size + 7) // 8)
    packer = zlib.compressobj(1)
    body = (
        b"".join(packer.compress(row) for _ in range(height))
        if height < 200_000
        else packer.compress(bytes(len(row) * height))
    )
    body += packer.flush()
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", body) + chunk(b"IEND", b"")


MAKERS = {
    "jpeg": plain("JPEG", ("RGB", "L"), quality=[1, 50, 100], subsampling=[0, 1, 2]),
    "jpeg progressive": plain("JPEG", progressive=True),
    "jpeg cmyk": plain("JPEG", ("CMYK",)),
    "jpeg exif": exif("JPEG"),
    "jpeg icc": profile("JPEG"),
    "mpo": frames("MPO"),
    "png": plain("PNG", ("RGB", "RGBA", "L", "LA", "P", "1", "I;16")),
    "png by hand": png_by_hand,
    "png text": png_text,
    "png icc": profile("PNG"),
    "apng": frames("PNG"),
    "gif": plain("GIF", ("P", "L")),
    "gif animated": frames("GIF", ("P",), duration=20, loop=0),
    "bmp": plain("BMP", ("RGB", "L", "1", "P")),
    "webp": plain("WEBP", ("RGB", "RGBA"), quality=[1, 80]),
    "webp lossless": plain("WEBP", ("RGB", "RGBA"), lossless=True),
    "webp animated": frames("WEBP"),
    "tiff": plain("TIFF", ("RGB", "L", "1", "P", "CMYK", "I;16", "F", "LAB", "RGBA", "LA")),
    "tiff compressed": plain(
        "TIFF", ("RGB", "L"), compression=["tiff_lzw", "tiff_adobe_deflate", "packbits", "jpeg", "raw", "tiff_deflate"]
    ),
    "tiff group4": plain("TIFF", ("1",), compression=["group3", "group4", "tiff_ccitt"]),
    "tiff pages": frames("TIFF"),
    "tiff big": big_tiff,
    "ppm": netpbm,
    "jpeg2000": plain("JPEG2000", ("RGB", "L", "RGBA")),
    "avif": plain("AVIF", ("RGB", "RGBA")),
    "ico": plain("ICO", ("RGB", "RGBA")),
    "tga": plain("TGA", ("RGB", "RGBA", "L", "P"), compression=[None, "tga_rle"]),
    "none": not_an_image,
    "bomb": bomb,
}


def as_made(data, rng):
    return data


def bytes_changed(data, rng):
    data = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 5, 50))):
        if data:
            data[rng.randrange(len(data))] = rng.choice((0, 255, 0x7F, 0x80, rng.randrange(256)))
    return bytes(data)


def head_changed(data, rng):
    data = bytearray(data)
    for _ in range(rng.choice((1, 2, 4))):
        if data:
            data[rng.randrange(min(64, len(data)))] = rng.randrange(256)
    return bytes(data)


def size_lies(data, rng):
    """Write a large number over four or two bytes near the start."""
    data = bytearray(data)
    if len(data) > 12:
        at = rng.randrange(4, min(100, len(data) - 4))
        n = rng.choice((0, 1, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFF, 10_000, 9_999, 100_000))
        order = rng.choice("<>")
        data[at : at + 4] = (
            struct.pack(order + "I", n) if rng.random() < 0.6 else struct.pack(order + "HH", n & 0xFFFF, n & 0xFFFF)
        )
    return bytes(data)


def cut(data, rng):
    return data[: rng.randrange(len(data) + 1)]


def piece_twice(data, rng):
    a, b = sorted((rng.randrange(len(data) + 1), rng.randrange(len(data) + 1)))
    return data[:b] + data[a:b] * rng.choice((1, 2, 50)) + data[b:]


def piece_gone(data, rng):
    a, b = sorted((rng.randrange(len(data) + 1), rng.randrange(len(data) + 1)))
    return data[:a] + data[b:]


def two_joined(data, rng):
    return data + MAKERS[rng.choice(list(MAKERS))](rng)


def crc_mended(data, rng):
    """Change a byte of a PNG's chunk, and mend the chunk's checksum."""
    if not data.startswith(b"\x89PNG"):
        return bytes_changed(data, rng)
    parts, at = [data[:8]], 8
    while at + 12 <= len(data):
        (n,) = struct.unpack(">I", data[at : at + 4])
        kind, body = data[at + 4 : at + 8], bytearray(data[at + 8 : at + 8 + n])
        if body and rng.random() < 0.5:
            body[rng.randrange(len(body))] = rng.randrange(256)
        parts.append(chunk(kind, bytes(body)))
        at += 12 + n
    return b"".join(parts)


MUTATIONS = {
    "as made": as_made,
    "bytes changed": bytes_changed,
    "head changed": head_changed,
    "size lies": size_lies,
    "cut": cut,
    "a piece twice": piece_twice,
    "a piece gone": piece_gone,
    "two joined": two_joined,
    "checksums mended": crc_mended,
}
SUFFIXES = ("jpg", "png", "gif", "tif", "webp", "bmp", "jp2", "avif", "ppm", "tga", "ico", "eps", "txt", "")
ODD = (
    "line\nbreak",
    "esc\x1b[31mred",
    "\u202egnp",
    "x" * 240,
    " blank ",
    "-rf",
    "caf\udce9",
    'a,b"c',
    "%s{0}",
    "\x9b31m",
    "\u200f",
)


def hostile_image(seed: int) -> tuple[str, bytes]:
    """Return what a hostile image is, and its bytes."""
    rng = random.Random(seed)
    kind = rng.choice(list(MAKERS))
    mutation = "as made" if rng.random() < 0.15 else rng.choice(list(MUTATIONS))
    if rng.random() < 0.002:
        kind, mutation = "real bomb", "as made"
        return f"{kind} as made", real_bomb(rng)
    try:
        data = MAKERS[kind](rng)
    except (OSError, ValueError, SystemError):  # this build of Pillow can't write the format
        kind, data = "none", not_an_image(rng)
    return f"{kind}, {mutation}", MUTATIONS[mutation](data, rng)


def write_images(folder: Path, seeds) -> list[str]:
    """Write hostile images, some under odd names and some that are links or pipes; return what each is."""
    folder.mkdir(parents=True)
    about = []
    for seed in seeds:
        rng = random.Random(f"name {seed}")
        kind, data = hostile_image(seed)
        name = f"{seed}{rng.choice(ODD) if rng.random() < 0.05 else ''}.{rng.choice(SUFFIXES)}"
        path, special = folder / name, rng.random()
        if special < 0.01:
            kind = "link to a device"
            path.symlink_to(rng.choice(("/dev/zero", "/dev/random", "/dev/stdin", "/dev/tty", "/proc/self/mem")))
        elif special < 0.015:
            kind = "pipe"
            os.mkfifo(path)
        elif special < 0.02:
            kind = "link to itself"
            path.symlink_to(path)
        elif special < 0.022:
            kind = "folder"
            path.mkdir()
        else:
            path.write_bytes(data)
        about.append((name, f"{kind} (seed {seed})"))
    return about
