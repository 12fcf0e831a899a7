"""Samples that show at opening whether a tower is whole: a dozen words, and a dozen pictures."""

from functools import cache

import numpy as np
from PIL import Image

N_PROBES = 12
WORDS = ("water", "music", "house", "green", "table", "horse", "seven", "night", "bread", "river", "white", "smile")
LENGTHS = (1, 17, 60)  # of texts, in words, that are encoded alone and together


@cache
def pictures() -> tuple[Image.Image, ...]:
    """Return pictures of noise around different colours, of one size that no model has."""
    rng = np.random.default_rng(0)
    noise = rng.integers(-60, 60, (N_PROBES, 48, 64, 3))
    colours = rng.integers(60, 196, (N_PROBES, 1, 1, 3))
    return tuple(Image.fromarray(pixels) for pixels in (colours + noise).astype(np.uint8))
