"""The estimates of memory hold: the peak of a fresh process that decodes an image is at most what was reserved."""

import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

SIDE = 4000
SLACK = 30_000_000  # bytes: imports of plugins, and the allocator's own
MEASURE = """
import sys
from pathlib import Path
from PIL import Image
from cachefuse import memory
from cachefuse.data.images import FileImage
from cachefuse.limits import Limits, limited
def status(key):
    line = next(line for line in open("/proc/self/status") if line.startswith(key))
    return 1024 * int(line.split()[1])
Image.init()
Path("/proc/self/clear_refs").write_text("5")
before = status("VmRSS")
with limited(Limits(memory=4_000_000_000)), memory.one_sample():
    FileImage(Path(sys.argv[1])).load()
    print(status("VmHWM") - before, memory.budget().used)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(
    ("mode", "suffix", "options"),
    [
        ("F", "tif", {}),
        ("F", "tif", {"compression": "tiff_adobe_deflate"}),
        ("I;16", "png", {}),
        ("LA", "png", {}),
        ("RGBA", "webp", {"lossless": True, "method": 0}),
        ("RGB", "webp", {"method": 0}),
        ("RGB", "avif", {"speed": 10}),
        ("RGBA", "avif", {"speed": 10}),
        ("RGB", "jp2", {}),
        ("RGB", "jpg", {"progressive": True, "subsampling": 0}),
        ("CMYK", "jpg", {"progressive": True}),
        ("P", "gif", {}),
        ("RGB", "bmp", {}),
    ],
)
def test_the_peak_is_at_most_the_estimate(tmp_path, mode, suffix, options):
    ramp = Image.fromarray((np.indices((SIDE, SIDE)).sum(0) % 251).astype(np.uint8))
    image = Image.fromarray(np.asarray(ramp, np.uint16)) if mode == "I;16" else ramp.convert(mode)
    path = tmp_path / f"image.{suffix}"
    image.save(path, **options)
    command = [sys.executable, "-W", "ignore", "-c", MEASURE, str(path)]
    peak, reserved = map(int, subprocess.run(command, capture_output=True, text=True, check=True).stdout.split())
    assert peak <= reserved + SLACK
