"""The built-in dataset: drawn shapes with captions. Neither modality alone shows every class."""

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw
from pydantic import Field

from cachefuse.data.column import Column
from cachefuse.data.digests import hash_parts
from cachefuse.data.readers.base import Reader, Samples

SIDE = 96
FORMS = ("circle", "square", "triangle", "star")  # only in the image
MATERIALS = ("wooden", "metal", "glass", "paper")  # only in the text
JOINT = ("heavy", "fragile", "floats")  # only in both: a size from the image with a material from the text
CLASSES = FORMS + MATERIALS + JOINT

_OPENINGS = ("a {} thing", "this {} object", "one {} item", "the {} piece", "some {} part", "an old {} one")
_WORDS = {
    "wooden": ("wooden", "oak", "pine", "timber", "carved walnut"),
    "metal": ("metal", "steel", "iron", "brass", "welded copper"),
    "glass": ("glass", "crystal", "blown glass", "transparent glass", "bottle glass"),
    "paper": ("paper", "cardboard", "folded paper", "paper origami", "papier-mache"),
}
_PLACES = (
    "on the shelf", "from the market", "for sale", "in good shape", "that someone lost", "my neighbour made",
    "on a plain ground", "seen from above", "in the museum", "with no label", "at home", "ready to post",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class ShapeImage:
    """A drawing that is made when it is loaded, always the same."""

    seed: int
    form: str
    large: bool

    @property
    def name(self) -> str:
        return f"shapes/{self.seed:05d}"

    def load(self) -> Image.Image:
        rng = np.random.default_rng([self.seed, 1])
        ground, colour = rng.integers(0, 256, (2, 3))
        while np.abs(ground - colour).sum() < 150:
            colour = rng.integers(0, 256, 3)
        image = Image.new("RGB", (SIDE, SIDE), tuple(map(int, ground)))
        radius = SIDE * (rng.uniform(0.30, 0.42) if self.large else rng.uniform(0.12, 0.20))
        centre = rng.uniform(radius, SIDE - radius, 2)
        draw, fill = ImageDraw.Draw(image), tuple(map(int, colour))
        if self.form == "circle":
            draw.circle(tuple(centre), radius, fill=fill)
        else:
            draw.polygon(_outline(self.form, centre, radius, rng.uniform(-0.3, 0.3)), fill=fill)
        noise = rng.normal(0, 6, (SIDE, SIDE, 1))
        return Image.fromarray(np.clip(np.asarray(image) + noise, 0, 255).astype(np.uint8))

    def fingerprint(self) -> str:
        return f"{self.seed}:{self.form}:{self.large}"

    def digest(self) -> str:
        return hash_parts("drawing", self.fingerprint())


def _outline(form: str, centre: np.ndarray, radius: float, tilt: float) -> list[tuple[float, float]]:
    corners = {"square": 4, "triangle": 3, "star": 10}[form]
    turn = tilt + (math.pi / 4 if form == "square" else -math.pi / 2)
    reach = [radius * (0.45 if form == "star" and i % 2 else 1.0) for i in range(corners)]
    angles = [turn + 2 * math.pi * i / corners for i in range(corners)]
    return [(centre[0] + r * math.cos(a), centre[1] + r * math.sin(a)) for r, a in zip(reach, angles, strict=True)]


class ShapesReader(Reader):
    """Makes samples from a seed, without files. The test split is unlabelled, as in a competition."""

    train: int = Field(default=2400, ge=1, le=1_000_000)
    test: int = Field(default=600, ge=0, le=1_000_000)
    seed: int = 0

    def missing(self, root: Path) -> list[str]:
        return []

    def read(self, root: Path) -> Samples:
        rng = np.random.default_rng(self.seed)
        images: list[ShapeImage] = []
        texts: list[tuple[str, ...]] = []
        labels: list[tuple[str, ...] | None] = []
        for i in range(self.train + self.test):
            form, material = str(rng.choice(FORMS)), str(rng.choice(MATERIALS))
            large = bool(rng.random() < 0.5)
            opening = str(rng.choice(_OPENINGS)).format(rng.choice(_WORDS[material]))
            images.append(ShapeImage(self.seed * 10_000_000 + i, form, large))
            texts.append((f"{opening} {rng.choice(_PLACES)}",))
            names = (form, material, *joint_classes(material, large))
            labels.append(names if i < self.train else None)
        return Samples(
            ids=[f"{i:05d}" for i in range(len(images))],
            splits=["train"] * self.train + ["test"] * self.test,
            labels=labels,
            modalities={"image": Column(images), "text": Column.texts(texts)},
            classes=CLASSES,
        )


def joint_classes(material: str, large: bool) -> tuple[str, ...]:
    """Return the classes that need both the image (size) and the text (material)."""
    if material == "metal":
        return ("heavy",) if large else ()
    if material == "glass":
        return () if large else ("fragile",)
    return ("floats",) if large else ()
