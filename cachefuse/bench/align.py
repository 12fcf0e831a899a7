"""`cachefuse bench align`: an alignment's epochs against their matrix products, exact search against NumPy."""

import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch

from cachefuse.alignment.config import AlignConfig
from cachefuse.alignment.data import PairData, SideRows, fit_statistics
from cachefuse.alignment.loop import fit
from cachefuse.alignment.model import Aligner
from cachefuse.alignment.search import nearest
from cachefuse.bench import process
from cachefuse.bench.base import OnProgress, measure_all, temporary, write_store
from cachefuse.bench.timing import BenchRow, in_turns, seconds, timed
from cachefuse.device import resolve_device
from cachefuse.nn.transformer import EXPANSION
from cachefuse.threads import same_threads
from cachefuse.training.loop import Optimization
from cachefuse.training.optim import EMA, adamw

K = 10
REST = 0.3  # seconds


@dataclass(frozen=True)
class AlignSizes:
    """The sizes of alignment and search. The defaults take a minute or two on two cores, and 4 GB of memory."""

    pairs: int = 7
    samples: int = 6000
    captions: int = 5
    width: int = 768
    batch: int = 512
    common: int = 512
    rows: int = 1_000_000
    queries: int = 64


@dataclass
class AlignBench:
    """The data that the measurements share: random features of two sides, in files."""

    folder: Path
    device: str
    sizes: AlignSizes

    @cached_property
    def data(self) -> PairData:
        n, captions = self.sizes.samples, self.sizes.captions
        images = write_store(self.folder / "images.zarr", n, self.sizes.width).rows()
        texts = write_store(self.folder / "texts.zarr", n * captions, self.sizes.width).rows()
        sides = SideRows("image", images, np.arange(n + 1)), SideRows("text", texts, np.arange(n + 1) * captions)
        return PairData("bench", sides, np.arange(n), np.full(n, "train"))

    def epoch(self, config: AlignConfig, n: int = 2) -> float:
        """Return the seconds of an epoch: the mean of ``n`` epochs after the first."""
        torch.manual_seed(0)
        model = Aligner([self.sizes.width] * 2, config).to(self.device)
        fit_statistics(model, self.data, self.data.samples)
        model.to(self.device)
        optimization = Optimization(adamw(model.parameters(), lr=config.lr), ema=EMA(model, config.ema))
        ends: list[float] = []
        fit(
            model, config, self.data, self.data.samples, self.data.samples[:0], optimization,
            torch.Generator().manual_seed(0), on_epoch=lambda epoch: ends.append(time.perf_counter()),
        )  # fmt: skip
        return (ends[-1] - ends[0]) / n


def align_epoch(bench: AlignBench) -> BenchRow:
    """Measure an epoch of the default DFE on pooled features, against only its matrix products."""
    sizes, n = bench.sizes, 2
    config = AlignConfig(width=sizes.common, batch_size=sizes.batch, epochs=1 + n, patience=0)
    products = matrix_products(bench)
    products()
    pairs = in_turns(lambda: bench.epoch(config, n), timed(products), sizes.pairs)
    ours, baseline = np.median(pairs, axis=0).tolist()
    return BenchRow(
        "align", f"align {sizes.samples:,} pairs, an epoch / GEMMs", "s", ours, baseline,
        float(np.median(pairs[:, 1] / pairs[:, 0])),
        note=f"pooled {sizes.width} to {sizes.common}, batch {sizes.batch}; with dropout, AdamW and averaged weights",
    )  # fmt: skip


def matrix_products(bench: AlignBench) -> Callable[[], None]:
    """Return a function that computes an epoch's products: layers forward, their two gradients, the loss's cosines."""
    sizes, device, m = bench.sizes, bench.device, bench.sizes.batch
    d, w = sizes.width, sizes.common
    # Two layers of the projection; values, output and two layers of the transformer block, which reads one token.
    shapes = [(d, w), (w, w), (w, w), (w, w), (w, EXPANSION * w), (EXPANSION * w, w)]
    layers = [(torch.randn(m, i, device=device), torch.randn(o, i, device=device)) for i, o in shapes]
    gradients = [torch.randn(m, o, device=device) for _, o in shapes]
    vectors, scores = torch.randn(m, w, device=device), torch.randn(m, m, device=device)

    def epoch() -> None:
        for start in range(0, sizes.samples, m):
            n = min(m, sizes.samples - start)
            for _ in range(2):
                for (x, weight), gradient in zip(layers, gradients, strict=True):
                    x[:n] @ weight.T
                    gradient[:n].T @ x[:n]
                    if x is not layers[0][0]:
                        gradient[:n] @ weight
            vectors[:n] @ vectors[:n].T
            for _ in range(2):  # gradients of <x, y>
                scores[:n, :n] @ vectors[:n]
        if device.startswith("cuda"):
            torch.cuda.synchronize(device)

    return epoch


def search(bench: AlignBench) -> BenchRow:
    """Measure a query over all rows of a store, against NumPy's product with the same rows, float32 in memory."""
    sizes, path = bench.sizes, bench.folder / "search.zarr"
    rows = write_store(path, sizes.rows, sizes.common, scale=sizes.common**-0.5).rows()  # of length about 1
    rng = np.random.default_rng(0)
    queries = iter(rng.standard_normal((4 + 2 * sizes.pairs, 1, sizes.common), np.float32))

    def ours() -> None:
        nearest(rows, torch.from_numpy(next(queries)), K, unit=True)

    first = seconds(ours)
    in_memory = rows[:].astype(np.float32)
    in_memory @ next(queries)[0]
    pairs = in_turns(_rested(ours), _rested(lambda: in_memory @ next(queries)[0]), sizes.pairs)
    many = torch.from_numpy(rng.standard_normal((sizes.queries, sizes.common), np.float32))
    batched = np.median([seconds(lambda: nearest(rows, many, K, unit=True)) for _ in range(3)]) / sizes.queries
    eighth, query = rows[: len(rows) // 8], next(queries)[0].astype(np.float16)
    as_stored = 8 * seconds(lambda: eighth @ query)
    memory = _memory(path)
    shutil.rmtree(path)
    write_store(path, sizes.rows // 4, sizes.common, scale=sizes.common**-0.5)
    quarter = _memory(path)
    shutil.rmtree(path)
    ours_ms, numpy_ms = (1000 * np.median(pairs, axis=0)).tolist()
    memory_note = "memory not measured: only Linux reports it"
    if memory is not None and quarter is not None:
        memory_note = f"{memory:.0f} MB of memory, with a quarter of the rows {quarter:.0f} MB"
    return BenchRow(
        "search", f"search {sizes.rows:,} x {sizes.common} / NumPy", "ms", ours_ms, numpy_ms,
        float(np.median(pairs[:, 1] / pairs[:, 0])), goal=0.8,
        note=f"a query, its best {K}; NumPy: x @ q, float32 in memory (float16, as stored: {1000 * as_stored:,.0f}"
        f" ms); {memory_note}; the first query, which verifies checksums: {1000 * first:,.0f} ms; {sizes.queries}"
        f" queries in one batch: {1000 * batched:.1f} ms each",
    )  # fmt: skip


def _memory(path: Path) -> float | None:
    """Return the memory of a search in MB, beyond opening the store; None if the system does not report it."""
    with_search, without = (process.run("search", path=str(path), k=k)[1] for k in (K, 0))
    return 1000 * (with_search - without) if with_search else None


def _rested(function: Callable[[], object]) -> Callable[[], float]:
    """Return a function that waits until threads of other libraries have stopped spinning, then returns seconds."""

    def run() -> float:
        time.sleep(REST)
        return seconds(function)

    return run


MEASUREMENTS: dict[str, Callable[[AlignBench], BenchRow]] = {
    "an epoch of alignment": align_epoch,
    "exact search": search,
}


@same_threads()
def bench_align(
    folder: Path,
    *,
    device: str = "auto",
    sizes: AlignSizes | None = None,
    on_progress: OnProgress = lambda what, done, total: None,
) -> list[BenchRow]:
    """Measure alignment and search on random features, in a temporary folder inside ``folder``.

    Raises ConfigError for a missing device.
    """
    sizes, device = sizes or AlignSizes(), resolve_device(device)
    with temporary(folder) as own_folder:
        return measure_all(MEASUREMENTS, AlignBench(own_folder, device, sizes), on_progress)
