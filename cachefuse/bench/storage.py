"""Reading and writing a store's features, against what the same disk and memory give to plain files."""

import os
import shutil
from collections.abc import Callable
from functools import partial

import numpy as np
import zarr

from cachefuse.bench.base import ROW_BATCH, Bench
from cachefuse.bench.timing import BenchRow, by_turns, rates, seconds, timed
from cachefuse.store.format import block_rows
from cachefuse.store.shard import ShardWriter

N_BATCHES = 9  # of ours beside one that zarr-python takes its time for
WRITE_BATCH = 256


def gather(bench: Bench) -> BenchRow:
    """Random batches, over the same gather from a memory map of a plain file."""
    rows, raw, n_pairs = bench.rows, bench.raw, bench.sizes.gather_pairs
    batches = [bench.random_rows() for _ in range(n_pairs)]
    ours, baseline = iter(batches), iter(batches)
    pairs = by_turns(
        timed(lambda: rows.index_select(0, next(ours))), timed(lambda: raw.index_select(0, next(baseline))), n_pairs
    )
    megabytes = ROW_BATCH * raw[0].nbytes / 1e6
    return rates(pairs, megabytes, "gather", "random rows / raw memory map", "MB/s", goal=0.80)


def gather_zarr(bench: Bench) -> BenchRow:
    """Random batches, over zarr-python's own reads of the same store."""
    rows, batches = bench.rows, [bench.random_rows() for _ in range(N_BATCHES)]
    array = zarr.open_array(bench.features.path / "pooled", mode="r")
    orthogonal, index = array.oindex, batches[0].numpy()

    def ours() -> float:
        return float(np.median([seconds(partial(rows.index_select, 0, batch)) for batch in batches]))

    pairs = by_turns(ours, timed(lambda: orthogonal[index]), bench.sizes.pairs)
    megabytes = ROW_BATCH * bench.raw[0].nbytes / 1e6
    return rates(pairs, megabytes, "gather_zarr", "random rows / zarr-python", "MB/s", goal=100)


def read_all(bench: Bench) -> BenchRow:
    """All rows in order, over a plain copy out of a memory map."""
    rows, raw = bench.rows, bench.raw.numpy()
    fresh = bench.features.rows()
    first = raw.nbytes / 1e6 / seconds(lambda: fresh[:])
    pairs = by_turns(timed(lambda: rows[:]), timed(lambda: np.array(raw)), bench.sizes.disk_pairs)
    note = f"{first:,.0f} MB/s at the first touch, which verifies the checksums"
    return rates(pairs, raw.nbytes / 1e6, "read_all", "all rows / a copy of a raw map", "MB/s", note=note)


def write(bench: Bench) -> BenchRow:
    """Shards of the store's blocks, each synced and moved to its place, over one plain file and one sync."""
    data, folder = bench.raw.numpy(), bench.folder / "written"
    size, row_bytes = block_rows(len(data), data[0].nbytes), data[0].nbytes

    def ours() -> None:
        for block, start in enumerate(range(0, len(data), size)):
            with ShardWriter(folder / f".{block}.partial") as shard:
                for part in np.split(data[start : start + size], range(WRITE_BATCH, size, WRITE_BATCH)):
                    shard.append(part)
                shard.finish(folder / str(block), size, row_bytes)

    def baseline() -> None:
        with (folder / "plain").open("wb") as file:
            for start in range(0, len(data), WRITE_BATCH):
                file.write(data[start : start + WRITE_BATCH].data)
            file.flush()
            os.fsync(file.fileno())

    def anew(function: Callable[[], None]) -> float:
        folder.mkdir()
        try:
            return seconds(function)
        finally:
            shutil.rmtree(folder)

    pairs = by_turns(lambda: anew(ours), lambda: anew(baseline), bench.sizes.disk_pairs)
    return rates(pairs, data.nbytes / 1e6, "write", "streaming write / plain file", "MB/s", goal=0.50)
