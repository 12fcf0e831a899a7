"""`cachefuse bench store`: reads, writes, extraction and memory against plain baselines on the same machine."""

import shutil
from collections.abc import Callable
from pathlib import Path

from cachefuse.bench.base import Bench, OnProgress, Sizes, measure_all, temporary
from cachefuse.bench.encoding import encode_texts, extract_images
from cachefuse.bench.process import extract_memory, first_batch, train_memory
from cachefuse.bench.storage import gather, gather_zarr, read_all, write
from cachefuse.bench.timing import BenchRow
from cachefuse.device import resolve_device
from cachefuse.errors import CacheError
from cachefuse.threads import same_threads

ROOM_TO_LEAVE = 1 << 30

MEASUREMENTS: dict[str, Callable[[Bench], BenchRow]] = {
    "random reads": gather,
    "random reads by zarr-python": gather_zarr,
    "reading all rows": read_all,
    "writing": write,
    "opening": first_batch,
    "extracting images": extract_images,
    "encoding texts": encode_texts,
}
OF_MEMORY: dict[str, Callable[[Bench], BenchRow]] = {
    "memory of training": train_memory,
    "memory of extracting": extract_memory,
}


@same_threads()
def bench_store(
    folder: Path,
    *,
    device: str = "auto",
    memory: bool = False,
    sizes: Sizes | None = None,
    on_progress: OnProgress = lambda what, done, total: None,
) -> list[BenchRow]:
    """Measure reads, writes and extraction on the disk of ``folder``; its files are removed at the end.

    ``memory`` also measures the memory of training and extraction, over gigabytes of features. Raises CacheError if the
    disk has too little free space, ConfigError for a missing device.
    """
    sizes, device = sizes or Sizes(), resolve_device(device)
    measurements = {**MEASUREMENTS, **(OF_MEMORY if memory else {})}
    with temporary(folder) as own_folder:
        _check_space(own_folder, sizes.n_bytes(memory))
        return measure_all(measurements, Bench(own_folder, device, sizes), on_progress)


def _check_space(folder: Path, n_bytes: int) -> None:
    free = shutil.disk_usage(folder).free
    if n_bytes + ROOM_TO_LEAVE > free:
        raise CacheError(
            f"measuring needs {n_bytes / 1e9:.1f} GB, and the disk of {folder.parent} has {free / 1e9:.1f} GB free; "
            f"free some space, or measure another disk with --workspace"
        )
