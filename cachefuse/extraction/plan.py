"""What an extraction will take: rows, bytes, seconds, and whether the disk has room."""

import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from cachefuse.data.dataset import Dataset
from cachefuse.encoders.base import DerivedTower, Tower
from cachefuse.errors import CacheError
from cachefuse.extraction.derive import base_rows
from cachefuse.extraction.pipeline import (
    encode_prepared,
    is_bad,
    prepare_in_order,
    prepare_source,
    views_to_encode,
)
from cachefuse.extraction.request import Request, open_request
from cachefuse.feature_spec import IDS
from cachefuse.files import format_bytes
from cachefuse.store.format import DTYPES
from cachefuse.store.rows import Rows
from cachefuse.store.store import FeatureStore

MEASURED_TEXTS = 64  # that show how many tokens texts have
PROBE_BATCHES = 4  # encoded to tell the time, after one that is not counted
ROOM_TO_LEAVE = 64 << 20


@dataclass(frozen=True)
class PlannedView:
    """One view to make: all of its rows, those still to be computed, and the bytes that a row takes (a mean)."""

    encoder: str
    modality: str
    view: str
    dtype: str
    rows: int
    pending: int
    row_bytes: float

    @property
    def n_bytes(self) -> int:
        """The bytes that are still to be written."""
        return round(self.pending * self.row_bytes)


@dataclass(frozen=True)
class Plan:
    """What an extraction would do; ``seconds`` by (encoder, modality), ``free`` the bytes that the disk has."""

    store: Path
    views: tuple[PlannedView, ...]
    seconds: dict[tuple[str, str], float]
    free: int

    @property
    def n_bytes(self) -> int:
        """The bytes that are still to be written."""
        return sum(view.n_bytes for view in self.views)

    @property
    def fits(self) -> bool:
        """Whether the disk has room for them."""
        return has_room(self.n_bytes, self.free)


def plan(
    dataset: Dataset,
    encoders: Sequence[str],
    store_path: Path,
    *,
    views: Sequence[str] = ("pooled",),
    device: str = "auto",
    batch_size: int | None = None,
    dtype: str = "float16",
) -> Plan:
    """Say what ``extract`` with the same arguments would take; nothing is written.

    The time is that of a few batches, measured now, as a share of the rows that are missing.
    """
    request = open_request(dataset, encoders, views, device, batch_size, dtype)
    store = FeatureStore(store_path) if (store_path / "zarr.json").is_file() else None
    planned, seconds = [], {}
    for spec, tower in request.towers:
        sources = dataset.modalities[tower.modality].feature_sources()
        dtypes = request.dtypes(tower)
        missing = {view: _missing(store, spec.short, request, tower, view, len(sources)) for view in dtypes}
        for view, kind in dtypes.items():
            n_bytes = row_bytes(tower, sources, view, kind)
            n_missing = int(missing[view].sum())
            planned.append(PlannedView(spec.short, tower.modality, view, kind, len(sources), n_missing, n_bytes))
        pending = int(np.logical_or.reduce(list(missing.values())).sum())
        base = base_rows(store, tower) if store is not None and isinstance(tower, DerivedTower) else None
        a_row = 0.0
        if pending and base is None:
            a_row = _seconds_a_row(tower, sources, views_to_encode(missing), request.batch_size)
        if pending and base is not None and isinstance(tower, DerivedTower):
            a_row = _seconds_to_derive(tower, base)
        seconds[(spec.short, tower.modality)] = pending * a_row
    return Plan(store_path, tuple(planned), seconds, free_bytes(store_path))


def row_bytes(tower: Tower, sources: Sequence[Any], view: str, dtype: str) -> float:
    """Return the bytes that a row takes; of tokens that differ in number, by the lengths of some of the texts."""
    if view == "pooled":
        return float(tower.width * np.dtype(DTYPES[dtype]).itemsize)
    if view == IDS:
        return _mean_length(tower, sources) * np.dtype(DTYPES[dtype]).itemsize
    if tower.token_shape is None:
        return 0.0  # not known before the first sample
    n_tokens, width = tower.token_shape
    token_bytes = width * np.dtype(DTYPES[dtype]).itemsize + (2 if dtype == "int8" else 0)
    return (_mean_length(tower, sources) if tower.ragged else float(n_tokens)) * token_bytes


def _mean_length(tower: Tower, sources: Sequence[Any]) -> float:
    """Return how many tokens some of the texts have, on average."""
    step = max(1, len(sources) // MEASURED_TEXTS)
    prepared = [prepare_source(tower, source) for source in sources[::step][:MEASURED_TEXTS]]
    lengths = [0 if is_bad(item) else tower.length(item) for item in prepared]
    return float(np.mean(lengths)) if lengths else 0.0


def check_room(store_path: Path, n_bytes: int) -> None:
    """Raise CacheError if the disk has no room for so many bytes, before any of them is written."""
    free = free_bytes(store_path)
    if not has_room(n_bytes, free):
        raise CacheError(
            f"the features take {format_bytes(n_bytes)} and {store_path.parent} has {format_bytes(free)} free; "
            f"free some, use another --workspace, fewer --views, or --dtype int8 for tokens"
        )


def has_room(n_bytes: int, free: int) -> bool:
    """Whether a disk with ``free`` bytes takes so many, and keeps some for other things; nothing always fits."""
    return not n_bytes or n_bytes + ROOM_TO_LEAVE <= free


def free_bytes(store_path: Path) -> int:
    """Return the bytes that are free where a store is, or will be."""
    there = next(folder for folder in (store_path, *store_path.absolute().parents) if folder.exists())
    return shutil.disk_usage(there).free


def _missing(
    store: FeatureStore | None, encoder: str, request: Request, tower: Tower, view: str, n_rows: int
) -> np.ndarray:
    """Return which rows extract would compute, (n_rows,) bool."""
    missing = np.ones(n_rows, bool)
    features = store.open_features(encoder, tower.modality) if store else None
    if features is not None and store is not None and features.n_written:
        store.check_same(features, request.provenance(tower), request.dtypes(tower))
        there = min(features.n_rows, n_rows)
        missing[:there] = False
        rows = features.missing_rows(view)
        missing[rows[rows < n_rows]] = True
    return missing


def _seconds_to_derive(tower: DerivedTower, base: Rows) -> float:
    """Map some rows that are there already, and return the seconds that one takes."""
    rows = base[:MEASURED_TEXTS]
    tower.transform(rows[:1])
    begun = time.perf_counter()
    tower.transform(rows)
    return (time.perf_counter() - begun) / max(1, len(rows))


def _seconds_a_row(tower: Tower, sources: Sequence[Any], views: Sequence[str], size: int) -> float:
    """Encode a few batches, spread over the dataset, as extract would, and return the seconds that a row takes."""
    n = min(len(sources), (1 + PROBE_BATCHES) * size)
    rows = np.linspace(0, len(sources) - 1, n).round().astype(int).tolist()
    with prepare_in_order(tower, sources, rows, 2 * size) as prepared:
        first = list(islice(prepared, size)) if n > size else []
        encode_prepared(tower, first, views, size)
        begun = time.perf_counter()
        rest = list(prepared) if tower.by_length else []
        while rest or (rest := list(islice(prepared, size))):
            encode_prepared(tower, rest, views, size)
            rest = []
        return (time.perf_counter() - begun) / (n - len(first))
