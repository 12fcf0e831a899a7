"""What a child does with hostile files: decode each under a watch of its memory, and say what came of it."""

import contextlib
import json
import logging
import os
import sys
import time
from pathlib import Path

from PIL import Image

SIMPLE = ("RGB", "L", "1", "CMYK", "P", "YCbCr")  # of which Pillow's own conversion is what we give


def resident(name):
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name):
            return int(line.split()[1]) * 1024
    return 0


def watched(names, answers, start, work):
    """Do ``work(name)`` for each name, and write a line of JSON for each.

    ``work`` returns a verdict and what is wrong with the result. The line has these, the seconds, the peak in bytes and
    the number of bytes written to stderr.
    """
    with open(answers, "a", encoding="utf-8") as file:
        for number in range(start, len(names)):
            Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
            base, words, begun = resident("VmRSS"), os.fstat(2).st_size, time.monotonic()
            found, wrong = work(names[number])
            sys.stderr.flush()
            about = {
                "seconds": time.monotonic() - begun,
                "peak": resident("VmHWM") - base,
                "said": os.fstat(2).st_size - words,
            }
            file.write(
                json.dumps({"number": number, "found": found, "wrong": wrong() if wrong else "", **about}) + "\n"
            )
            file.flush()


def decode(folder, names, answers, start):
    """Decode images."""
    from cachefuse.data.images import FileImage
    from cachefuse.errors import BadSampleError

    def work(name):
        path = Path(folder, name)
        try:
            image = FileImage(path, Path(folder)).load()
        except BadSampleError as error:
            return f"bad: {error}", None
        except (MemoryError, OSError) as error:
            return f"error: {type(error).__name__}: {error}", None
        return "usable", lambda: unlike_pillow(path, image)

    watched(names, answers, start, work)


def read(datasets, answers, start):
    """Read datasets, (manifest, folder) each, and load their sources."""
    logging.getLogger("cachefuse").addHandler(logging.NullHandler())  # notes are no words on stderr
    from cachefuse.data.dataset import load_dataset
    from cachefuse.data.manifest import load_manifest
    from cachefuse.errors import BadSampleError, CachefuseError

    def work(given):
        try:
            dataset = load_dataset(load_manifest(given[0])[0], Path(given[1]))
            dataset.fingerprints()
            for modality in dataset.modalities:
                for row in range(len(dataset)):
                    for source in dataset.sources(modality, row):
                        if not isinstance(source, str):
                            with contextlib.suppress(BadSampleError):
                                source.load()
        except (CachefuseError, OSError) as error:
            return f"bad: {error}", None
        except Exception as error:
            return f"{type(error).__name__}: {error}", None
        return "usable", None

    watched(datasets, answers, start, work)


def unlike_pillow(path, image):
    """Return how an image differs from Pillow's own decoding, "" where it does not or where none is defined."""
    if image.mode != "RGB":
        return f"mode {image.mode}"
    if image.width * image.height > 1_000_000:
        return ""
    saved = os.dup(2)
    nothing = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nothing, 2)  # Pillow's own decoding may let libtiff speak
    try:
        with Image.open(path) as other:
            other.load()
            if other.mode not in SIMPLE or "transparency" in other.info:
                return "" if other.size == image.size else f"size {image.size} for {other.size}"
            return "" if other.convert("RGB").tobytes() == image.tobytes() else "other pixels than Pillow's"
    except Exception as error:
        return f"Pillow raises {type(error).__name__}"
    finally:
        os.dup2(saved, 2)
        os.close(saved)
        os.close(nothing)
