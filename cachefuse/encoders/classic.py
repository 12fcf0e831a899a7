"""Histograms and hashed n-grams: a baseline without weights or downloads, which works everywhere."""

from collections.abc import Collection, Mapping, Sequence

import numpy as np
import PIL
import sklearn
from PIL import Image
from sklearn.feature_extraction.text import HashingVectorizer

from cachefuse.encoders.base import EncoderSpec, Features, Tower
from cachefuse.encoders.pieces import pieces
from cachefuse.errors import EncoderError

SIDE = 64  # pixels; every image is resized to SIDE x SIDE
HUES, GREYS, COLOUR_GRID = 8, 4, 4
ORIENTATIONS, GRADIENT_GRID = 8, 8
CHUNK = 4
HASHED = 512  # columns per type of n-gram
TOGETHER = 1 << 20  # characters of texts whose n-grams are in memory at a time


class ClassicImageTower(Tower):
    """Soft colour histograms on a 4 x 4 grid, gradient orientations on an 8 x 8 grid, and both over the whole image.

    The square root of each of the four is scaled to norm 1. Orientations are unsigned, as in Dalal and Triggs,
    "Histograms of oriented gradients for human detection", 2005.
    """

    modality = "image"
    views = ("pooled",)
    width = (HUES + GREYS) * (COLOUR_GRID**2 + 1) + ORIENTATIONS * (GRADIENT_GRID**2 + 1)

    @property
    def provenance(self) -> Mapping[str, str]:
        return {
            "family": "classic",
            "architecture": f"colour {HUES}+{GREYS} on {COLOUR_GRID} x {COLOUR_GRID} and whole, "
            f"gradient {ORIENTATIONS} on {GRADIENT_GRID} x {GRADIENT_GRID} and whole",
            "preprocessing": f"box resize to {SIDE}",
            "library": _version("pillow", PIL.__version__),
        }

    def prepare_bytes(self, width: int, height: int) -> int:
        # Pillow resizes rows first, with 4 bytes a pixel, and holds a float64 weight for each pixel of a side.
        return (4 * SIDE + 8) * height + 8 * (width + height)

    def prepare(self, sample: Image.Image) -> np.ndarray:
        return np.asarray(sample.resize((SIDE, SIDE), Image.Resampling.BOX))  # (SIDE, SIDE, 3) uint8

    def encode(self, batch: Sequence[np.ndarray], views: Collection[str]) -> Features:
        # A few images at a time stay in the processor's cache.
        return {"pooled": np.concatenate([_histograms(batch[i : i + CHUNK]) for i in range(0, len(batch), CHUNK)])}


class ClassicTextTower(Tower):
    """Hashed words and word pairs, and hashed n-grams of 3 to 5 characters within words, each of norm 1."""

    modality = "text"
    by_length = True
    views = ("pooled",)
    width = 2 * HASHED

    def __init__(self) -> None:
        self._vectorizers = [
            HashingVectorizer(analyzer=analyzer, ngram_range=ngrams, n_features=HASHED, norm="l2", dtype=np.float32)
            for analyzer, ngrams in (("word", (1, 2)), ("char_wb", (3, 5)))
        ]

    @property
    def provenance(self) -> Mapping[str, str]:
        return {
            "family": "classic",
            "architecture": f"word 1-2 and char_wb 3-5 n-grams, {HASHED} columns each",
            "library": _version("scikit-learn", sklearn.__version__),
        }

    def prepare(self, sample: str) -> str:
        return sample

    def length(self, prepared: str) -> int:
        return len(prepared)

    def encode(self, batch: Sequence[str], views: Collection[str]) -> Features:
        rows = []
        for texts in pieces(batch, TOGETHER):
            rows.append(np.hstack([vectorizer.transform(texts).toarray() for vectorizer in self._vectorizers]))
        return {"pooled": np.concatenate(rows)}


def open_classic(spec: EncoderSpec, device: str) -> dict[str, Tower]:
    """Open ``classic`` as an image and a text tower; both run on the CPU. Raises EncoderError for a model name."""
    if spec.model or spec.weights:
        raise EncoderError(f"classic has no models or weights; write 'classic', not {str(spec)!r}")
    return {"image": ClassicImageTower(), "text": ClassicTextTower()}


def _histograms(batch: Sequence[np.ndarray]) -> np.ndarray:
    pixels = np.stack(batch).astype(np.float32) / 255  # (B, SIDE, SIDE, 3)
    cells = _colours(pixels), _gradients(pixels)  # (B, cells, bins) each
    whole = [counts.sum(1, keepdims=True) for counts in cells]
    return np.concatenate([_unit(np.sqrt(counts.reshape(len(batch), -1))) for counts in (*cells, *whole)], axis=1)


def _colours(pixels: np.ndarray) -> np.ndarray:
    """Histograms of hue, weighted by chroma, and of lightness, weighted by 1 - chroma: (B, 16, 12)."""
    red, green, blue = np.moveaxis(pixels, -1, 0)
    high, low = np.maximum(np.maximum(red, green), blue), np.minimum(np.minimum(red, green), blue)
    chroma = high - low  # (B, SIDE, SIDE)
    safe = np.where(chroma > 0, chroma, 1)
    sixths = np.select(
        [high == red, high == green],
        [((green - blue) / safe) % 6, (blue - red) / safe + 2],
        (red - green) / safe + 4,
    )
    hues = _histogram(sixths * (HUES / 6), chroma, HUES, COLOUR_GRID, circular=True)
    greys = _histogram((high + low) / 2 * (GREYS - 1), 1 - chroma, GREYS, COLOUR_GRID, circular=False)
    return np.concatenate([hues, greys], axis=2)


def _gradients(pixels: np.ndarray) -> np.ndarray:
    """Histograms of edge orientation, weighted by contrast, of each pixel's strongest channel: (B, 64, 8)."""
    down, right = np.gradient(pixels, axis=(1, 2))  # (B, SIDE, SIDE, 3) each
    strength = np.hypot(down, right)
    best = strength.argmax(-1)[..., None]
    down, right, strength = (np.take_along_axis(x, best, -1)[..., 0] for x in (down, right, strength))
    half_turns = np.arctan2(down, right) / np.pi % 1  # opposite directions are one orientation
    return _histogram(half_turns * ORIENTATIONS, strength, ORIENTATIONS, GRADIENT_GRID, circular=True)


def _histogram(position: np.ndarray, weight: np.ndarray, bins: int, grid: int, circular: bool) -> np.ndarray:
    """Count pixels (B, SIDE, SIDE) per cell, each shared linearly between its two nearest bins: (B, grid², bins)."""
    n_images, cell = len(position), SIDE // grid
    lower = np.minimum(position.astype(np.intp), bins - 1)
    upper = (lower + 1) % bins if circular else np.minimum(lower + 1, bins - 1)
    share = position - lower
    rows = np.arange(SIDE) // cell
    cells = np.arange(n_images)[:, None, None] * grid**2 + rows[:, None] * grid + rows  # (B, SIDE, SIDE)
    counts = np.bincount((cells * bins + lower).ravel(), (weight * (1 - share)).ravel(), n_images * grid**2 * bins)
    counts += np.bincount((cells * bins + upper).ravel(), (weight * share).ravel(), n_images * grid**2 * bins)
    return counts.reshape(n_images, grid**2, bins).astype(np.float32)


def _unit(rows: np.ndarray) -> np.ndarray:
    """Scale rows to norm 1. Rows of zeros stay zero."""
    unit: np.ndarray = rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)
    return unit


def _version(name: str, version: str) -> str:
    return f"{name} {'.'.join(str(version).split('.')[:2])}"
