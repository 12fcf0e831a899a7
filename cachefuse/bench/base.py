"""Shared by the measurements: their sizes, a temporary folder, and a store with a plain file of the same rows."""

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
Setup = TypeVar("Setup")  # the data that measurements share
OnProgress = Callable[[str, int, int], None]  # (the next measurement, the number of finished ones, the total number)
MANIFEST = 'name = "bench"\ntask = "multilabel"\nreader = { kind = "shapes" }'


@dataclass(frozen=True)
class Sizes:
    """The sizes of the measurements; the last two are for memory. The defaults take about four minutes on two cores."""

    pairs: int = 5
    gather_pairs: int = 200  # a millisecond each
    disk_pairs: int = 9
    width: int = 768
    rows: int = 200_000
    open_rows: int = 1_000_000
    images: int = 192
    images_on_cuda: int = 8192
    image_layers: int = 12  # as in ViT-B-32
    texts: int = 256
    text_layers: int = 6  # as in MiniLM
    train_rows: int = 4_000_000  # 6 GB of features
    extract_rows: int = 100_000

    def n_bytes(self, memory: bool) -> int:
        """Return the most bytes that the files take: the features, about 100 bytes per sample, and the model."""
        stores = self.rows * 4 + max(self.open_rows, self.train_rows if memory else 0)
        return stores * (self.width * 2 + 100) + self.image_layers * (40 << 20)


@dataclass
class Bench:
    """The data that the measurements share."""

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
        """The rows of the features, all read once, so their checksums are verified."""
        rows = self.features.rows()
        rows[:]
        return rows

    @cached_property
    def raw(self) -> Tensor:
        """A memory map of a plain file with the same rows, all read once."""
        path = self.folder / "rows.raw"
        self.rows[:].tofile(path)
        raw = torch.from_numpy(np.memmap(path, np.float16, "c", shape=self.rows.shape))
        raw.clone()
        return raw

    def random_rows(self) -> Tensor:
        """Return the row numbers of a random batch, (B,) int64."""
        return torch.from_numpy(self.generator.integers(0, self.sizes.rows, ROW_BATCH))


def write_store(path: Path, n_rows: int, width: int, scale: float = 1.0) -> Features:
    """Write a store of random float16 features with labels, most of its samples in train.

    ``scale`` is the features' standard deviation. The same random rows repeat: their values do not affect the speed.
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
    batch = (scale * rng.standard_normal((ROW_BATCH, width), np.float32)).astype(np.float16)
    with ViewWriter(features, "pooled", ragged=False, dtype="float16") as writer:
        for start in range(0, n_rows, ROW_BATCH):
            rows = np.arange(start, min(start + ROW_BATCH, n_rows))
            writer.add(rows, list(batch[: len(rows)]))
    return features


def measure_all(
    measurements: Mapping[str, Callable[[Setup], BenchRow]], bench: Setup, on_progress: OnProgress
) -> list[BenchRow]:
    """Run the measurements one after the other; call ``on_progress`` before each."""
    rows: list[BenchRow] = []
    for what, measurement in measurements.items():
        on_progress(what, len(rows), len(measurements))
        rows.append(measurement(bench))
    return rows


@contextmanager
def temporary(folder: Path) -> Iterator[Path]:
    """Make a temporary folder inside another, and always remove it at the end, with any parents made for it."""
    new = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with tempfile.TemporaryDirectory(dir=folder, prefix=".bench-") as new_folder:
            yield Path(new_folder)
    finally:
        with suppress(OSError):  # others have put files into it
            for path in new:
                path.rmdir()
