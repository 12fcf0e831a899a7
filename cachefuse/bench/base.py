"""What the measurements share: how much is measured, a folder to write in, and a store beside a file of its rows."""

import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from cachefuse.bench.timing import BenchRow
from cachefuse.data.column import Column
from cachefuse.data.dataset import Dataset
from cachefuse.data.manifest import parse_manifest
from cachefuse.extraction.open_store import open_store
from cachefuse.store.features import Features
from cachefuse.store.rows import Rows
from cachefuse.store.writer import ViewWriter

ROW_BATCH = 4096  # rows of one random batch
N_CLASSES = 18
VAL_ROWS = 10_000
Measured = TypeVar("Measured")  # what measurements share
OnProgress = Callable[[str, int, int], None]  # (what is measured now, how many before it, of how many)
MANIFEST = 'name = "bench"\ntask = "multilabel"\nreader = { kind = "shapes" }'


@dataclass(frozen=True)
class Sizes:
    """How much is measured; the last two only with memory. The defaults take some four minutes on two cores."""

    pairs: int = 5
    gather_pairs: int = 200  # of a millisecond each
    disk_pairs: int = 9
    width: int = 768
    rows: int = 200_000
    open_rows: int = 1_000_000
    images: int = 192
    images_on_cuda: int = 8192
    image_layers: int = 12  # of ViT-B-32
    texts: int = 256
    text_layers: int = 6  # of MiniLM
    train_rows: int = 4_000_000  # 6 GB of features
    extract_rows: int = 100_000

    def n_bytes(self, memory: bool) -> int:
        """Return the room that what is written takes at its most, with what each row's sample takes beside it."""
        stores = self.rows * 4 + max(self.open_rows, self.train_rows if memory else 0)
        return stores * (self.width * 2 + 100) + self.image_layers * (40 << 20)


@dataclass
class Bench:
    """What the measurements share."""

    folder: Path
    device: str
    sizes: Sizes
    generator: np.random.Generator = field(default_factory=lambda: np.random.default_rng(0))

    @cached_property
    def features(self) -> Features:
        """Features in a store, float16 (rows, width)."""
        return write_store(self.folder / "rows.zarr", self.sizes.rows, self.sizes.width)

    @cached_property
    def rows(self) -> Rows:
        """Their rows, all touched once, so that their checksums are verified."""
        rows = self.features.rows()
        rows[:]
        return rows

    @cached_property
    def raw(self) -> Tensor:
        """A memory map of a plain file with the same rows, all touched once."""
        path = self.folder / "rows.raw"
        self.rows[:].tofile(path)
        raw = torch.from_numpy(np.memmap(path, np.float16, "c", shape=self.rows.shape))
        raw.clone()
        return raw

    def random_rows(self) -> Tensor:
        """Return the row numbers of a random batch, (B,) int64."""
        return torch.from_numpy(self.generator.integers(0, self.sizes.rows, ROW_BATCH))


def write_store(path: Path, n_rows: int, width: int, scale: float = 1.0) -> Features:
    """Write a store of random float16 features, its samples labelled and all but a few in train.

    ``scale`` is the features' standard deviation. They are the same random rows again and again: what they hold makes
    no difference here.
    """
    rng = np.random.default_rng(0)
    n_val = min(VAL_ROWS, n_rows // 4)
    dataset = Dataset(
        manifest=parse_manifest(MANIFEST, "bench.toml"),
        classes=tuple(f"class {c}" for c in range(N_CLASSES)),
        ids=[f"{row:08d}" for row in range(n_rows)],
        splits=np.repeat(["val", "train"], [n_val, n_rows - n_val]),
        targets=(rng.random((n_rows, N_CLASSES), np.float32) < 0.2).astype(np.int8),
        modalities={"text": Column.texts([("a text",)] * n_rows)},
        name="bench",
    )
    store = open_store(path, dataset)
    provenance = {"family": "bench", "dtype": "float16"}
    features = store.require_features("bench", "text", provenance, "bench", {"pooled": "float16"})
    some = (scale * rng.standard_normal((ROW_BATCH, width), np.float32)).astype(np.float16)
    with ViewWriter(features, "pooled", ragged=False, dtype="float16") as writer:
        for start in range(0, n_rows, ROW_BATCH):
            rows = np.arange(start, min(start + ROW_BATCH, n_rows))
            writer.add(rows, list(some[: len(rows)]))
    return features


def measure_all(
    measurements: Mapping[str, Callable[[Measured], BenchRow]], bench: Measured, on_progress: OnProgress
) -> list[BenchRow]:
    """Take measurements one after the other, telling ``on_progress`` the name of each before it."""
    rows: list[BenchRow] = []
    for what, measure in measurements.items():
        on_progress(what, len(rows), len(measurements))
        rows.append(measure(bench))
    return rows


@contextmanager
def temporary(folder: Path) -> Iterator[Path]:
    """Make a folder inside another, and remove it at the end whatever happens; with those above it that were made."""
    new = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with tempfile.TemporaryDirectory(dir=folder, prefix=".bench-") as made:
            yield Path(made)
    finally:
        with suppress(OSError):  # something else was put there
            for path in new:
                path.rmdir()
