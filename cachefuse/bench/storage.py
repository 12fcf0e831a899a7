"""Measure reads and writes of a store's features against plain files on the same disk and memory."""

import os
import shutil
from collections.abc import Callable
from functools import partial

import numpy as np
import zarr

from cachefuse.bench.base import ROW_BATCH, Bench
from cachefuse.bench.timing import BenchRow, in_turns, rates, seconds, timed
from cachefuse.store.format import block_rows
from cachefuse.store.shard import ShardWriter

N_BATCHES = 9  # measured of ours for each batch of zarr-python, which is much slower
WRITE_BATCH = 256


def gather(bench: Bench) -> BenchRow:
    """Read random batches, against the same gather from a memory map of a plain file."""
    rows, raw, n_pairs = bench.rows, bench.raw, bench.sizes.gather_pairs
    batches = [bench.random_rows() for _ in range(n_pairs)]
    ours, baseline = iter(batches), iter(batches)
    pairs = in_turns(
        timed(lambda: rows.index_select(0, next(ours))), timed(lambda: raw.index_select(0, next(baseline))), n_pairs
    )
    megabytes = ROW_BATCH * raw[0].nbytes / 1e6
    return rates(pairs, megabytes, "gather", "random rows / raw memory map", "MB/s", goal=0.80)


def gather_zarr(bench: Bench) -> BenchRow:
    """Read random batches, against zarr-python's reads of the same store."""
    rows, batches = bench.rows, [bench.random_rows() for _ in range(N_BATCHES)]
    array = zarr.open_array(bench.features.path / "pooled", mode="r")
    orthogonal, index = array.oindex, batches[0].numpy()

    def ours() -> float:
        return float(np.median([seconds(partial(rows.index_select, 0, batch)) for batch in batches]))

    pairs = in_turns(ours, timed(lambda: orthogonal[index]), bench.sizes.pairs)
    megabytes = ROW_BATCH * bench.raw[0].nbytes / 1e6
    return rates(pairs, megabytes, "gather_zarr", "random rows / zarr-python", "MB/s", goal=100)


def read_all(bench: Bench) -> BenchRow:
    """Read all rows in order, against a plain copy of a memory map."""
    rows, raw = bench.rows, bench.raw.numpy()
    fresh = bench.features.rows()
    first = raw.nbytes / 1e6 / seconds(lambda: fresh[:])
    pairs = in_turns(timed(lambda: rows[:]), timed(lambda: np.array(raw)), bench.sizes.disk_pairs)
    note = f"{first:,.0f} MB/s at the first read, which verifies the checksums"
    return rates(pairs, raw.nbytes / 1e6, "read_all", "all rows / a copy of a raw map", "MB/s", note=note)


def write(bench: Bench) -> BenchRow:
    """Write the store's blocks as shards, each synced and renamed, against one plain file with one sync."""
    data, folder = bench.raw.numpy(), bench.folder / "written"
    size, row_bytes = block_rows(len(data), data[0].nbytes), data[0].nbytes

    def ours() -> None:
        for block, start in enumerate(range(0, len(data), size)):
            with ShardWriter(folder / f".{block}.partial") as shard:
                for batch in np.split(data[start : start + size], range(WRITE_BATCH, size, WRITE_BATCH)):
                    shard.append(batch)
                shard.finish(folder / str(block), size, row_bytes)

    def baseline() -> None:
        with (folder / "plain").open("wb") as file:
            for start in range(0, len(data), WRITE_BATCH):
                file.write(data[start : start + WRITE_BATCH].data)
            file.flush()
            os.fsync(file.fileno())

    def in_new_folder(function: Callable[[], None]) -> float:
        folder.mkdir()
        try:
            return seconds(function)
        finally:
            shutil.rmtree(folder)

    pairs = in_turns(lambda: in_new_folder(ours), lambda: in_new_folder(baseline), bench.sizes.disk_pairs)
    return rates(pairs, data.nbytes / 1e6, "write", "streaming write / plain file", "MB/s", goal=0.50)
