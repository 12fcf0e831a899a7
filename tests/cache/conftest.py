"""A small dataset, and a toy encoder whose features say which sample they belong to."""

import sys
import threading
import time
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from cachefuse.data.dataset import Dataset, load_dataset
from cachefuse.data.manifest import parse_manifest
from cachefuse.encoders import FAMILIES, Family
from cachefuse.encoders.base import Tower
from cachefuse.errors import BadSampleError
from cachefuse.extraction.extract import extract
from cachefuse.store.store import FeatureStore

SHAPES = """
name = "small"
task = "multilabel"

[reader]
kind = "shapes"
train = {train}
test = {test}
"""


def make_shapes(train: int = 60, test: int = 20) -> Dataset:
    return load_dataset(parse_manifest(SHAPES.format(train=train, test=test), "small.toml"), Path("nowhere"))


@pytest.fixture(scope="session")
def shapes() -> Dataset:
    return make_shapes()


@pytest.fixture
def store_path(tmp_path) -> Path:
    return tmp_path / "cache" / "small.zarr"


@dataclass
class Toy:
    """The settings of the toy encoder's towers and what they were asked to do."""

    width: int = 4
    version: str = "1"
    batches: list[tuple[str, list[str], tuple[str, ...]]] = field(default_factory=list)
    prepared: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)
    on_prepare: Callable[[object], None] = lambda sample: None
    on_encode: Callable[[list[np.ndarray]], None] = lambda batch: None
    change: Callable[[np.ndarray], np.ndarray] = lambda features: features

    def interrupt_after(self, n_batches: int, store: Path | None = None, n_blocks: int = 0) -> None:
        """Have the encoding interrupted, once, when so many batches are done.

        Until then so many blocks of a store's images are written, which is done in the background.
        """

        def interrupt(batch: list[np.ndarray]) -> None:
            if len(self.batches) == n_batches:
                while store is not None and finished_blocks(store / "features" / "toy" / "image") < n_blocks:
                    time.sleep(0.001)
                self.on_encode = lambda batch: None
                raise KeyboardInterrupt

        self.on_encode = interrupt

    @property
    def n_encoded(self) -> int:
        return sum(len(batch) for _, batch, _ in self.batches)


def finished_blocks(features: Path) -> int:
    journal = features / "journal.jsonl"
    return len(journal.read_bytes().splitlines()) if journal.is_file() else 0


class ToyTower(Tower):
    def __init__(self, toy: Toy) -> None:
        self.toy = toy
        self.width = toy.width

    @property
    def provenance(self):
        return {"family": "toy", "weights": self.toy.version, "width": str(self.width)}

    def prepare(self, sample):
        self.toy.on_prepare(sample)
        with self.toy.lock:
            self.toy.prepared += 1
        return self.codes(sample)  # (T,) int

    def length(self, prepared):
        return len(prepared)

    def encode(self, batch, views):
        self.toy.on_encode(batch)
        self.toy.batches.append((self.modality, list(batch), tuple(views)))
        tokens = [self.toy.change(np.outer(codes, np.arange(1, self.width + 1)).astype(np.float32)) for codes in batch]
        found = {"pooled": np.stack([rows.sum(0) for rows in tokens]), "tokens": tokens}
        if not self.ragged:
            found["tokens"] = np.stack(tokens)
        if "ids" in views:
            found["ids"] = [codes.astype(np.int32) for codes in batch]
        return {view: found[view] for view in views}


class ToyImageTower(ToyTower):
    """Three tokens an image, from its mean colour."""

    modality = "image"

    def codes(self, sample):
        return np.asarray(sample, np.float64).mean((0, 1)).round().astype(int)


class ToyTextTower(ToyTower):
    """A token a word; its id is one of 50."""

    modality = "text"
    views = ("pooled", "tokens", "ids")
    ragged = True
    vocabulary = 50

    def codes(self, sample):
        return np.array([zlib.crc32(word.encode()) % 50 for word in sample.split()], int)


@pytest.fixture
def toy(monkeypatch) -> Toy:
    toy = Toy()
    towers = {"image": ToyImageTower, "text": ToyTextTower}
    module = SimpleNamespace(open_toy=lambda spec, device: {m: tower(toy) for m, tower in towers.items()})
    monkeypatch.setitem(sys.modules, "toy_encoder", module)
    monkeypatch.setitem(FAMILIES, "toy", Family("toy_encoder:open_toy", "toy", "image, text", "a toy"))
    return toy


@dataclass(frozen=True)
class FakeImage:
    """An image of one colour, or one that can't be used for a reason."""

    number: int
    bad: str = ""

    @property
    def name(self) -> str:
        return f"pictures/{self.number}.png"

    def load(self) -> Image.Image:
        if self.bad:
            raise BadSampleError(self.bad)
        return Image.new("RGB", (2, 2), (self.number % 200, self.number // 200, 7))

    def fingerprint(self) -> str:
        return f"{self.number}"

    def digest(self) -> str:
        return f"{self.number}"


def make_dataset(shapes: Dataset, images=None, texts=None, **changes) -> Dataset:
    """The rows of ``shapes`` with other images and texts, as many as there are."""
    n = len(images if images is not None else texts)
    return replace(
        shapes,
        ids=[f"row-{i}" for i in range(n)],
        splits=np.array(["train"] * n),
        targets=np.resize(shapes.targets, (n, shapes.targets.shape[1])),
        images=images,
        texts=texts,
        **changes,
    )


def head(dataset: Dataset, n: int) -> Dataset:
    """The first ``n`` samples."""
    return replace(
        dataset,
        ids=dataset.ids[:n],
        splits=dataset.splits[:n],
        targets=dataset.targets[:n],
        images=dataset.images[:n],
        texts=dataset.texts[:n],
    )


@pytest.fixture
def tools() -> SimpleNamespace:
    return SimpleNamespace(
        SHAPES=SHAPES,
        make_shapes=make_shapes,
        make_dataset=make_dataset,
        FakeImage=FakeImage,
        files=files,
        head=head,
        read=read,
    )


def files(folder: Path) -> dict[str, bytes]:
    """Every file of a store but the time of its last extract."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path != folder / "zarr.json"
    }


def read(dataset, store_path, encoder, modality, view="pooled", **options):
    """Extract, and return one view."""
    extract(dataset, [encoder], store_path, views=(view,), device="cpu", **options)
    return FeatureStore(store_path).open_features(encoder, modality).read(view)
