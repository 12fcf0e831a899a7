"""How far from this machine's limits: each figure is a ratio to a plain baseline, measured by turns in one run."""

import json
import math
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cachefuse.cache.extract import WINDOW_BATCHES, Progress, extract
from cachefuse.cache.features import Features
from cachefuse.cache.layout import block_rows
from cachefuse.cache.pipeline import encode_prepared
from cachefuse.cache.plan import ROOM_TO_LEAVE
from cachefuse.cache.rows import Rows
from cachefuse.cache.shard import ShardWriter
from cachefuse.cache.store import FeatureStore
from cachefuse.cache.writer import ViewWriter
from cachefuse.data.dataset import Dataset, load_dataset
from cachefuse.data.manifest import parse_manifest
from cachefuse.encoders import open_encoder
from cachefuse.errors import CacheError, ConfigError
from cachefuse.runtime import n_threads, resolve_device

ROW_BATCH = 4096  # rows of one random batch
WRITE_BATCH = 256
ENCODE_BATCH = 32
SAMPLING = 0.005  # seconds between two looks at a process's memory
CLASSES = 18
OnProgress = Callable[[str, int, int], None]  # (what is being measured, how many before it, of how many)


@dataclass(frozen=True)
class Sizes:
    """How much is measured. The defaults take about four minutes on two cores, and as long again with memory."""

    pairs: int = 5
    gather_pairs: int = 25  # of few milliseconds each
    width: int = 768
    rows: int = 200_000
    open_rows: int = 1_000_000
    images: int = 128
    images_on_cuda: int = 8192
    image_layers: int = 12  # of ViT-B-32
    texts: int = 256
    text_layers: int = 6  # of MiniLM
    text_tokens: int = 256
    train_rows: int = 4_000_000  # 6 GB of features
    extract_rows: int = 100_000

    def n_bytes(self, memory: bool) -> int:
        """Return the room on the disk that the largest measurement takes."""
        stores = [self.rows * 4, self.open_rows, self.train_rows if memory else 0]
        return max(stores) * (self.width * 2 + 200) + (1 << 30 if self.image_layers > 1 else 1 << 28)


@dataclass(frozen=True)
class BenchRow:
    """One figure, in ``unit``: ours and the baseline's, medians both; ``ratio`` is the median of those of the pairs.

    ``goal`` is for ``judged``: at least it for a ratio, at most it for what is measured alone. None: not measured here,
    for the reason in ``note``, or without a goal.
    """

    name: str
    what: str
    unit: str
    ours: float | None
    baseline: float | None = None
    ratio: float | None = None
    goal: float | None = None
    at_most: bool = False
    note: str = ""

    @property
    def met(self) -> bool | None:
        """Whether the goal is met; None where there is none, or nothing was measured."""
        judged = self.ours if self.at_most else self.ratio
        if self.goal is None or judged is None:
            return None
        return judged <= self.goal if self.at_most else judged >= self.goal


def bench_store(
    folder: Path,
    *,
    device: str = "auto",
    memory: bool = False,
    sizes: Sizes | None = None,
    on_progress: OnProgress = lambda name, done, total: None,
) -> list[BenchRow]:
    """Measure storage on the disk of ``folder``, and extraction on a device; what is written is removed again.

    ``memory`` also measures the memory of training and extracting. Raises CacheError if the disk has no room.
    """
    sizes, device = sizes or Sizes(), resolve_device(device)
    with _temporary(folder) as temporary:
        _check_room(temporary, sizes.n_bytes(memory))
        names = [name for name in MEASUREMENTS if memory or name not in NEED_MEMORY]
        bench, rows = Bench(temporary, device, sizes), []
        for name in names:
            on_progress(name.replace("_", " "), len(rows), len(names))
            rows.append(MEASUREMENTS[name](bench))
        return rows


def describe_machine(device: str = "auto") -> dict[str, Any]:
    """Return what figures depend on: the processor, how many cores this process may use, torch, the device."""
    device = resolve_device(device)
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").is_file() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    cpu = models[0] if models else platform.processor() or platform.machine()
    name = f"{device} ({torch.cuda.get_device_name(device)})" if device.startswith("cuda") else device
    return {"cpu": cpu, "cores": n_threads(), "torch": torch.__version__, "device": name}


@dataclass
class Bench:
    """What the measurements share: a folder to write in, the device, and a store beside a plain file of its rows."""

    folder: Path
    device: str
    sizes: Sizes
    generator: np.random.Generator = field(default_factory=lambda: np.random.default_rng(0))

    @cached_property
    def features(self) -> Features:
        return write_store(self.folder / "rows.zarr", self.sizes.rows, self.sizes.width)

    @cached_property
    def rows(self) -> Rows:
        """The store's rows, all touched once, so that their checksums are verified."""
        rows = self.features.rows()
        for batch in torch.arange(len(rows)).split(ROW_BATCH):
            rows.index_select(0, batch)
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
        return torch.from_numpy(self.generator.integers(0, self.sizes.rows, ROW_BATCH))


def gather(bench: Bench) -> BenchRow:
    """Random batches, over the same gather from a memory map of a plain file."""
    rows, raw, batches = bench.rows, bench.raw, [bench.random_rows() for _ in range(8)]

    def ours() -> None:
        for batch in batches:
            rows.index_select(0, batch)

    def baseline() -> None:
        for batch in batches:
            torch.index_select(raw, 0, batch)

    n_bytes = len(batches) * ROW_BATCH * raw[0].nbytes
    pairs = _by_turns(_timed(ours), _timed(baseline), bench.sizes.gather_pairs)
    return _rates(pairs, n_bytes / 1e6, "gather", "random rows / raw memory map", "MB/s", goal=0.80)


def gather_zarr(bench: Bench) -> BenchRow:
    """Random batches, over zarr-python's own reads of the same store."""
    import zarr

    rows, batch = bench.rows, bench.random_rows()
    array: Any = zarr.open_array(bench.features.path / "pooled", mode="r")
    orthogonal, index = array.oindex, batch.numpy()
    pairs = _by_turns(
        _timed(lambda: rows.index_select(0, batch)), _timed(lambda: orthogonal[index]), bench.sizes.pairs
    )
    n_bytes = ROW_BATCH * bench.raw[0].nbytes
    return _rates(pairs, n_bytes / 1e6, "gather_zarr", "random rows / zarr-python", "MB/s", goal=100)


def read_all(bench: Bench) -> BenchRow:
    """All rows in order, over a plain copy out of a memory map."""
    first = _seconds(lambda: bench.features.rows()[:])
    rows, raw = bench.rows, bench.raw.numpy()
    pairs = _by_turns(_timed(lambda: rows[:]), _timed(lambda: np.array(raw)), bench.sizes.pairs)
    note = f"all rows: checksums are verified at a block's first touch, which made it {first:.2f} s once"
    return _rates(pairs, raw.nbytes / 1e6, "read_all", "all rows / plain copy", "MB/s", note=note)


def write(bench: Bench) -> BenchRow:
    """Shards of the store's blocks, each synchronised and moved to its place, over one plain file and one sync."""
    data, folder = bench.raw.numpy(), bench.folder / "written"
    size = block_rows(len(data), data[0].nbytes)

    def ours() -> None:
        for block, start in enumerate(range(0, len(data), size)):
            with ShardWriter(folder / f".{block}.partial") as shard:
                for part in range(start, min(start + size, len(data)), WRITE_BATCH):
                    shard.append(data[part : min(part + WRITE_BATCH, start + size)])
                shard.finish(folder / str(block), size, data[0].nbytes)

    def baseline() -> None:
        with (folder / "plain").open("wb") as file:
            for part in range(0, len(data), WRITE_BATCH):
                file.write(data[part : part + WRITE_BATCH].data)
            file.flush()
            os.fsync(file.fileno())

    def anew(function: Callable[[], None]) -> float:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        return _seconds(function)

    pairs = _by_turns(lambda: anew(ours), lambda: anew(baseline), bench.sizes.pairs)
    shutil.rmtree(folder)
    return _rates(pairs, data.nbytes / 1e6, "write", "streaming write / plain file", "MB/s", goal=0.50)


def open_store(bench: Bench) -> BenchRow:
    """Seconds to open a large store and read one random batch, checksums verified, in a process of its own."""
    path = bench.folder / "large.zarr"
    write_store(path, bench.sizes.open_rows, bench.sizes.width)
    seconds = [in_new_process("first_batch", path=str(path), seed=seed)[0] for seed in range(bench.sizes.pairs)]
    shutil.rmtree(path)
    what = f"open {bench.sizes.open_rows:,} rows, first batch"
    return BenchRow("open", what, "s", float(np.median(seconds)), goal=0.5, at_most=True)


def extract_images(bench: Bench) -> BenchRow:
    """`extract` of JPEG files with CLIP's ViT-B-32, once it is open, over its forward alone on tensors that are ready.

    Weights are random. Reading and decoding, the store and its syncs are ours only.
    """
    on_cuda = bench.device.startswith("cuda")
    n_images = bench.sizes.images_on_cuda if on_cuda else bench.sizes.images
    dataset = make_images(bench.folder / "images", n_images)
    spec = save_clip(bench.folder / "clip", bench.sizes.image_layers)
    tower: Any = open_encoder(spec, bench.device)["image"]
    sources = (dataset.images or [])[:ENCODE_BATCH]
    ready = tower.stack([tower.prepare(source.load()) for source in sources if source])  # (B, 3, H, W)

    def ours() -> float:
        begun: list[float] = []

        def on_progress(progress: Progress) -> None:
            if progress.encoder and not begun:  # the encoders are open, and the samples known
                begun.append(time.perf_counter())

        path = bench.folder / "images.zarr"
        extract(dataset, [spec], path, device=bench.device, batch_size=ENCODE_BATCH, on_progress=on_progress)
        seconds = time.perf_counter() - begun[0]
        shutil.rmtree(path)
        return seconds

    def baseline() -> None:
        with torch.inference_mode(), torch.autocast(tower.device.type, tower.half, enabled=on_cuda):
            for _ in range(0, n_images, ENCODE_BATCH):
                tower.model.encode_image(ready, normalize=False)
            if on_cuda:
                torch.cuda.synchronize(tower.device)

    baseline()
    pairs = _by_turns(ours, _timed(baseline), bench.sizes.pairs)
    goal = None if on_cuda else 0.92  # there decoding on the CPU is the limit
    return _rates(pairs, n_images, "extract", "extract ViT-B-32 / its forward", "images/s", goal=goal)


def encode_texts(bench: Bench) -> BenchRow:
    """Texts in batches of like length, over padding every text to the most tokens. Both are tokenised beforehand."""
    limit = bench.sizes.text_tokens
    tower: Any = open_encoder(save_bert(bench.folder / "bert", bench.sizes.text_layers, limit), bench.device)["text"]
    lengths = bench.generator.lognormal(math.log(100) - 0.18, 0.6, bench.sizes.texts).astype(int).clip(1, limit - 2)
    prepared = [tower.prepare(" ".join(["word"] * length)) for length in lengths]
    windows = [prepared[i : i + WINDOW_BATCHES * ENCODE_BATCH] for i in range(0, len(prepared), WINDOW_BATCHES * 32)]
    ids = torch.full((len(prepared), limit), tower.pad_id)  # (N, T)
    for row, tokens in zip(ids, prepared, strict=True):
        row[: len(tokens)] = torch.tensor(tokens)
    mask = torch.arange(limit) < torch.tensor([[len(tokens)] for tokens in prepared])

    def ours() -> None:
        for window in windows:
            encode_prepared(tower, window, ("pooled",), ENCODE_BATCH)

    def baseline() -> None:
        with torch.inference_mode(), torch.autocast(tower.device.type, tower.half, enabled=tower.device.type == "cuda"):
            for part, real in zip(ids.split(ENCODE_BATCH), mask.split(ENCODE_BATCH), strict=True):
                real = real.to(tower.device).long()
                hidden = tower.model(input_ids=part.to(tower.device), attention_mask=real).last_hidden_state
                ((hidden.float() * real.unsqueeze(-1)).sum(1) / real.sum(1, keepdim=True)).cpu()

    encode_prepared(tower, prepared[:ENCODE_BATCH], ("pooled",), ENCODE_BATCH)
    pairs = _by_turns(_timed(ours), _timed(baseline), bench.sizes.pairs)
    return _rates(pairs, len(prepared), "text", f"texts by length / padded to {limit}", "texts/s", goal=2.0)
