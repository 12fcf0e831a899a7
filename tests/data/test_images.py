import contextlib
import io
import os
import struct
import sys
import threading
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFile

from cachefuse.data import images
from cachefuse.data.digests import hash_parts
from cachefuse.data.images import FileImage, decode, read_file
from cachefuse.data.pixels import to_rgb
from cachefuse.errors import BadSampleError
from fixtures.messages import naming


def encode(image, kind="PNG", **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def pixels(data):
    image = decode(data)
    assert image.mode == "RGB"
    return np.asarray(image)


def png_claiming(width, height):
    def chunk(name, content):
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


NOISE = np.random.default_rng(0).integers(0, 256, (24, 32, 3), np.uint8)


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF", "PPM"])
def test_lossless_formats_come_back_pixel_for_pixel(kind):
    np.testing.assert_array_equal(pixels(encode(Image.fromarray(NOISE), kind)), NOISE)


@pytest.mark.parametrize("kind", ["JPEG", "WEBP", "GIF"])
def test_lossy_formats(kind):
    assert np.abs(pixels(encode(Image.new("RGB", (32, 24), (200, 100, 50)), kind)) - [200.0, 100, 50]).max() < 8


def test_cmyk_is_converted_to_its_colours():
    red = Image.new("CMYK", (16, 16), (0, 255, 255, 0))
    assert np.abs(pixels(encode(red, "JPEG", quality=95))[8, 8] - [255.0, 0, 0]).max() < 12
    np.testing.assert_array_equal(pixels(encode(red, "TIFF"))[0, 0], [255, 0, 0])


@pytest.mark.parametrize("transparency", [0, b"\x00"])
def test_transparent_palette_colour_is_white(transparency):
    image = Image.new("P", (2, 1))
    image.putpalette([255, 0, 0, 0, 0, 255])
    image.putpixel((1, 0), 1)
    np.testing.assert_array_equal(pixels(encode(image, transparency=transparency))[0], [[255, 255, 255], [0, 0, 255]])


@pytest.mark.parametrize(
    ("mode", "colour", "expected"),
    [
        ("RGBA", (255, 0, 0, 0), (255, 255, 255)),
        ("RGBA", (255, 0, 0, 255), (255, 0, 0)),
        ("RGBA", (0, 0, 0, 127), (128, 128, 128)),
        ("LA", (0, 0), (255, 255, 255)),
        ("LA", (7, 255), (7, 7, 7)),
        ("L", 9, (9, 9, 9)),
        ("1", 1, (255, 255, 255)),
        ("1", 0, (0, 0, 0)),
    ],
)
def test_modes(mode, colour, expected):
    np.testing.assert_array_equal(pixels(encode(Image.new(mode, (3, 2), colour)))[0, 0], expected)


def test_transparent_colour_of_an_image_without_a_palette_is_white():
    image = Image.new("RGB", (2, 1), (10, 20, 30))
    image.putpixel((1, 0), (1, 2, 3))
    np.testing.assert_array_equal(pixels(encode(image, transparency=(10, 20, 30)))[0], [[255] * 3, [1, 2, 3]])


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_16_bit_grey_is_scaled(kind):
    values = np.array([[0, 257, 32768, 65535]], np.uint16)
    np.testing.assert_array_equal(pixels(encode(Image.fromarray(values), kind))[0, :, 0], [0, 1, 128, 255])


def test_grey_floats_are_scaled_and_what_is_no_number_is_black():
    values = np.array([[0.0, 0.5, 1.0, np.nan]], np.float32)
    np.testing.assert_array_equal(pixels(encode(Image.fromarray(values), "TIFF"))[0, :, 0], [0, 128, 255, 0])


def test_first_frame_of_an_animation():
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue", "lime")]
    data = encode(frames[0], "GIF", save_all=True, append_images=frames[1:])
    np.testing.assert_array_equal(pixels(data)[0, 0], [255, 0, 0])


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "file"),
        (b"<html>404 Not Found</html>", "image format"),
        (b"\xff\xd8\xff", "image format"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n", "format"),
        (encode(Image.fromarray(NOISE), "EPS"), "format"),
        (encode(Image.fromarray(NOISE), "PDF"), "format"),
        (b"\x89PNG\r\n\x1a\n" + b"\0" * 40, ""),
        (png_claiming(60_000, 60_000), "100,000,000 pixels"),
        (png_claiming(12_000, 10_000), "12000 10000 100,000,000"),
        (png_claiming(0, 5), ""),
    ],
    ids=["empty", "html", "cut", "header", "eps", "pdf", "damaged", "huge", "large", "no width"],  # a PDF has its date
)
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_what_is_no_image(data, message):
    with pytest.raises(BadSampleError, match=naming(message)):
        decode(data)


@pytest.mark.parametrize("kind", ["BMP", "GIF", "JPEG", "PNG", "TIFF"])
def test_truncated_at_any_place(kind):
    data = encode(Image.fromarray(NOISE), kind)
    for end in range(1, len(data) // 2, 61):
        with pytest.raises(BadSampleError):
            decode(data[:end])


@pytest.mark.filterwarnings("ignore")
def test_damaged_files_are_bad_samples_or_images():
    rng = np.random.default_rng(1)
    for kind in ("GIF", "JPEG", "PNG", "TIFF", "WEBP"):
        data = np.frombuffer(encode(Image.fromarray(NOISE), kind), np.uint8)
        for _ in range(30):
            damaged = data.copy()
            damaged[rng.integers(0, len(data), 8)] = rng.integers(0, 256, 8)
            with contextlib.suppress(BadSampleError):
                decode(damaged.tobytes())


def test_pixel_limit(monkeypatch):
    data = encode(Image.new("RGB", (10, 11)))
    monkeypatch.setattr(images, "MAX_PIXELS", 110)
    assert decode(data).size == (10, 11)
    monkeypatch.setattr(images, "MAX_PIXELS", 109)
    with pytest.raises(BadSampleError, match=naming("10 11 pixels 109")):
        decode(data)


def test_truncated_images_must_not_be_hidden(monkeypatch):
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    with pytest.raises(RuntimeError, match="LOAD_TRUNCATED_IMAGES"):
        decode(encode(Image.new("RGB", (1, 1))))


def test_decoding_in_threads_leaves_the_warning_filters_alone():
    before = list(warnings.filters)
    data = encode(Image.fromarray(NOISE))
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(decode, [data] * 200))
    assert warnings.filters == before


@pytest.fixture
def root(tmp_path):
    folder = tmp_path / "root"
    (folder / "data").mkdir(parents=True)
    Image.fromarray(NOISE).save(folder / "data/a.png")
    Image.new("RGB", (2, 2)).save(tmp_path / "secret.png")
    return folder


def test_file(root):
    source = FileImage(root / "data/a.png", root)
    np.testing.assert_array_equal(np.asarray(source.load()), NOISE)
    assert source.name == str(root / "data/a.png")
    assert FileImage(root / "data/a.png").load().size == (32, 24)


@pytest.mark.parametrize("path", ["data/../data/a.png", "./data/a.png", "link.png", "folder/a.png"])
def test_other_ways_to_a_file_under_the_root(root, path):
    (root / "link.png").symlink_to("data/a.png")
    (root / "folder").symlink_to("data")
    assert FileImage(root / path, root).load().size == (32, 24)


def test_roots_that_end_in_a_slash_or_are_relative(root, monkeypatch):
    monkeypatch.chdir(root)
    for folder in (Path(), Path("/"), Path(f"{root}/")):
        path = folder / "data/a.png" if folder != Path("/") else root / "data/a.png"
        assert FileImage(path, folder).load().size == (32, 24)


def test_linked_folder_of_the_users_own(root, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    Image.fromarray(NOISE).save(tmp_path / "elsewhere/b.png")
    (root / "photos").symlink_to(tmp_path / "elsewhere")
    assert FileImage(root / "photos/b.png", root).load().size == (32, 24)
    with pytest.raises(BadSampleError, match="file"):  # ".." does not go up from where the link leads
        FileImage(root / "photos/../secret.png", root).load()


@pytest.mark.parametrize("path", ["../secret.png", "data/../../secret.png", "../root2/x.png", "/etc/hostname", "", "."])
def test_paths_out_of_the_root(root, path):
    (root.parent / "root2").mkdir()
    with pytest.raises(BadSampleError, match="folder"):
        FileImage(root / path, root).load()


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("data/none.png", "file"),
        ("data", "folder"),
        ("data/a.png/b.png", "directory"),
        ("data/a\0.png", "embedded null"),
        ("data/" + "x" * 300, "File name too long"),
        ("data/\ud800.png", ""),
        ("loop", "symbolic links"),
    ],
)
def test_files_that_can_not_be_read(root, path, message):
    (root / "loop").symlink_to("loop")
    source = FileImage(root / path, root)
    with pytest.raises(BadSampleError, match=naming(message)):
        source.load()
    assert source.fingerprint() == source.fingerprint()
    assert source.digest() == source.digest() != FileImage(root / "data/a.png", root).digest()


def test_pipes_and_devices_are_not_waited_for(root):
    os.mkfifo(root / "data/pipe.png")
    (root / "data/zero.png").symlink_to("/dev/zero")
    errors = []

    def load(path):
        source = FileImage(path, root)
        source.fingerprint(), source.digest()
        try:
            source.load()
        except BadSampleError as error:
            errors.append(str(error))

    for path in (root / "data/pipe.png", root / "data/zero.png"):
        thread = threading.Thread(target=load, args=(path,), daemon=True)
        thread.start()
        thread.join(timeout=60)
        assert not thread.is_alive()
    assert errors == ["is not a regular file"] * 2


@pytest.mark.skipif(sys.platform != "linux", reason="links into /proc")
def test_a_link_into_the_system_is_the_fault_of_the_sample(root):
    """It says that it is a regular file of no bytes, and its reading fails as a disk's would."""
    (root / "data/memory.png").symlink_to("/proc/self/mem")
    image = FileImage(root / "data/memory.png", root)
    with pytest.raises(BadSampleError, match=r"can't be read: Input/output error"):
        image.load()
    assert image.digest() == hash_parts("unusable", "can't be read: Input/output error")


def test_giant_file(root, monkeypatch):
    monkeypatch.setattr(images, "MAX_BYTES", 100)
    with pytest.raises(BadSampleError, match=naming("100")):
        FileImage(root / "data/a.png", root).load()


@pytest.mark.parametrize(
    ("start", "n_bytes", "expected"), [(0, -1, b"012345"), (2, 3, b"234"), (4, 9, b"45"), (9, 3, b""), (0, 0, b"")]
)
def test_part_of_a_file(tmp_path, start, n_bytes, expected):
    (tmp_path / "a").write_bytes(b"012345")
    assert read_file(str(tmp_path / "a"), start, n_bytes) == expected


COMMENTS = [
    b"P3 # one\n2 1\n255\n1 2 3# two\n 4 5 6 # three",
    b"P3\n2 1\n255\n#\n##\n1 2# # x\r\n3\r#\r4\n#5\n5 6",
    b"P3\n2 1\n255\n1#\n2 3 4 5 6 7\n",
    b"P2\n3 2\n65535\n1 2 3 #" + b"c" * 40 + b"\n400 500 6000\n",
    b"P1\n3 2\n1#\n01 #\r 1#1\n01",
]


@pytest.mark.parametrize("block", [1, 2, 3, 7, 1 << 20])
@pytest.mark.parametrize("data", COMMENTS)
def test_comments_of_plain_ppm_files_are_read_as_by_pillow(monkeypatch, data, block):
    expected = Image.open(io.BytesIO(data))
    expected.load()
    monkeypatch.setattr(ImageFile, "SAFEBLOCK", block)
    np.testing.assert_array_equal(pixels(data), np.asarray(to_rgb(expected)))


@pytest.mark.slow
def test_comments_take_time_with_their_length(growth):
    """Not with its square, 16 times, as in Pillow's decoder."""
    assert growth(lambda n: decode(b"P3\n3 3\n255\n" + b"#\n" * n + b"1 " * 27), 100_000) < 9
