"""What is not an image's fault: a failing disk, too little memory; and what decoders print themselves."""

import errno
import io
import os
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from cachefuse import memory
from cachefuse.data import images
from cachefuse.data.images import FileImage, decode
from cachefuse.data.opened_image import PixelFile
from cachefuse.errors import BadSampleError
from cachefuse.limits import Limits, limited
from fixtures.messages import naming

NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 48, 3), np.uint8))


def encode(image, kind, **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


class FailingDisk(io.BytesIO):
    """A file of which only the first bytes can be read."""

    def read(self, n_bytes=-1):
        if n_bytes < 0 or self.tell() + n_bytes > 600:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return super().read(n_bytes)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "TIFF", "GIF", "BMP", "WEBP", "JPEG2000"])
def test_a_failing_disk_is_not_the_images_fault(kind):
    data = encode(NOISE, kind)
    with pytest.raises(OSError, match="Input/output"):
        decode(PixelFile(FailingDisk(data), len(data)))


@pytest.mark.parametrize("at_once", [0, 1 << 20])
def test_an_error_of_the_disk_names_the_file(monkeypatch, tmp_path, at_once):
    def fail(status):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    NOISE.save(tmp_path / "photo.png")
    monkeypatch.setattr(images, "AT_ONCE", at_once)
    monkeypatch.setattr(images, "_check_kind", fail)
    with pytest.raises(OSError, match="Input/output") as caught:
        FileImage(tmp_path / "photo.png").load()
    assert caught.value.filename == str(tmp_path / "photo.png")


def test_positions_are_those_of_bytes(tmp_path):
    data = bytes(range(100))
    (tmp_path / "file").write_bytes(data)
    with (tmp_path / "file").open("rb") as opened:
        file, expected = PixelFile(opened, 100), io.BytesIO(data)
        for whence, position in ((0, 5), (1, 7), (2, -3), (2, 50), (0, 2**62), (1, -(2**63) + 1), (0, 99)):
            assert file.seek(position, whence) == expected.seek(position, whence)
            assert file.read(4) == expected.read(4)
            assert file.tell() == expected.tell()
        with pytest.raises(ValueError, match="negative seek value -1"):
            file.seek(-1)


SHORT = """
import resource, sys
from pathlib import Path
from cachefuse.data.images import FileImage
size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (size + int(sys.argv[2]), resource.RLIM_INFINITY))
try:
    print(FileImage(Path(sys.argv[1])).load().size)
except Exception as error:
    print(type(error).__name__)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(
    ("kind", "options"),
    [("png", {}), ("tif", {"compression": "tiff_lzw"}), ("jpg", {"progressive": True}), ("webp", {"method": 0})],
)
def test_too_little_memory_is_not_the_images_fault(tmp_path, kind, options):
    path = tmp_path / f"image.{kind}"
    Image.new("RGB", (4000, 4000), (9, 99, 9)).save(path, **options)  # takes 64 MB, and what decoders add

    def load(path, n_bytes):
        command = [sys.executable, "-c", SHORT, str(path), str(n_bytes)]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    assert load(path, 40_000_000) == "MemoryError"
    assert load(path, 500_000_000) == "(4000, 4000)"
    path.write_bytes(path.read_bytes()[:-1000])
    if kind != "tif":  # its last strip may be whole
        assert load(path, 500_000_000) == "BadSampleError"


def test_an_image_over_the_budget_is_unusable():
    with limited(Limits(memory=20_000_000)), pytest.raises(BadSampleError, match=naming("memory --memory")):
        decode(encode(Image.new("RGB", (2000, 2000)), "PNG"))
    assert memory.budget().used == 0


def test_damaged_images_print_nothing(capfd):
    """What libtiff would print is the reason why the sample is bad."""
    rng, reasons = np.random.default_rng(0), set()
    for options in ({"compression": "tiff_lzw"}, {"compression": "tiff_adobe_deflate"}, {"compression": "jpeg"}):
        data = np.frombuffer(encode(NOISE, "TIFF", **options), np.uint8)
        for _ in range(60):
            damaged = data.copy()
            damaged[rng.integers(0, len(data), 6)] = rng.integers(0, 256, 6)
            try:
                decode(damaged.tobytes())
            except BadSampleError as error:
                reasons.add(str(error))
    assert capfd.readouterr().err == ""
    assert any("LZWDecode" in reason or "code" in reason for reason in reasons), reasons
    assert any("ZIPDecode: Decoding error at scanline" in reason for reason in reasons), reasons
    assert all(len(reason) < 400 for reason in reasons)
    with pytest.raises(BadSampleError, match="truncated"):  # of this image, not of the one before
        decode(encode(NOISE, "JPEG")[:-1000])
