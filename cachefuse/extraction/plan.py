"""An estimate of an extraction: rows, bytes, seconds, and free disk space."""

import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from cachefuse.data.column import TextOrSource
from cachefuse.data.dataset import Dataset
from cachefuse.encoders import NO_OPTIONS
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
from cachefuse.feature_spec import IDS, NGRAMS
from cachefuse.files import format_bytes
from cachefuse.store.format import DTYPES
from cachefuse.store.rows import Rows
from cachefuse.store.store import FeatureStore

MEASURED_TEXTS = 64  # to estimate the number of tokens of texts
PROBE_BATCHES = 4  # encoded to estimate the time, after one that is not counted
ROOM_TO_LEAVE = 64 << 20  # bytes


@dataclass(frozen=True)
class PlannedView:
    """One view to extract: all rows, pending rows, and the mean bytes of a row."""

    encoder: str
    modality: str
    view: str
    dtype: str
    rows: int
    pending: int
    row_bytes: float

    @property
    def n_bytes(self) -> int:
        """The bytes of all pending rows."""
        return round(self.pending * self.row_bytes)


@dataclass(frozen=True)
class Plan:
    """The plan of an extraction: ``seconds`` by (encoder, modality), ``free`` bytes on the disk."""

    store: Path
    views: tuple[PlannedView, ...]
    seconds: dict[tuple[str, str], float]
    free: int

    @property
    def n_bytes(self) -> int:
        """The bytes of all pending rows."""
        return sum(view.n_bytes for view in self.views)

    @property
    def fits(self) -> bool:
        """Whether the disk has room for the pending rows."""
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
    options: Mapping[str, str] = NO_OPTIONS,
) -> Plan:
    """Estimate what ``extract`` with the same arguments would take. Nothing is written.

    The time is that of a few batches, measured now and scaled to all pending rows.
    """
    request = open_request(dataset, encoders, views, device, batch_size, dtype, options)
    store = FeatureStore(store_path) if (store_path / "zarr.json").is_file() else None
    planned, seconds = [], {}
    for spec, tower in request.towers:
        sources = dataset.modalities[tower.modality].feature_sources()
        dtypes = request.dtypes(tower)
        missing = {view: _missing(store, spec.short, request, tower, view, len(sources)) for view in dtypes}
        for view, view_dtype in dtypes.items():
            n_bytes = row_bytes(tower, sources, view, view_dtype)
            n_missing = int(missing[view].sum())
            planned.append(PlannedView(spec.short, tower.modality, view, view_dtype, len(sources), n_missing, n_bytes))
        pending = int(np.logical_or.reduce(list(missing.values())).sum())
        base = base_rows(store, tower) if store is not None and isinstance(tower, DerivedTower) else None
        row_seconds = 0.0
        if pending and base is None:
            row_seconds = _encode_seconds(tower, sources, views_to_encode(missing), request.batch_size)
        if pending and base is not None and isinstance(tower, DerivedTower):
            row_seconds = _derive_seconds(tower, base)
        seconds[(spec.short, tower.modality)] = pending * row_seconds
    return Plan(store_path, tuple(planned), seconds, free_bytes(store_path))


def row_bytes(tower: Tower, sources: Sequence[TextOrSource | None], view: str, dtype: str) -> float:
    """Return the bytes of a row; for ragged tokens, an estimate from the lengths of some texts."""
    if view == "pooled":
        return float(tower.width * np.dtype(DTYPES[dtype]).itemsize)
    if view == IDS:
        return _mean_length(tower, sources) * np.dtype(DTYPES[dtype]).itemsize
    if view == NGRAMS:
        return _mean_ngrams(tower, sources) * 2 * np.dtype(DTYPES[dtype]).itemsize
    if tower.token_shape is None:
        return 0.0  # unknown before the first sample
    n_tokens, width = tower.token_shape
    token_bytes = width * np.dtype(DTYPES[dtype]).itemsize + (2 if dtype == "int8" else 0)
    return (_mean_length(tower, sources) if tower.ragged else float(n_tokens)) * token_bytes


def _mean_length(tower: Tower, sources: Sequence[TextOrSource | None]) -> float:
    """Return the mean number of tokens of some texts."""
    lengths = [0 if is_bad(item) else tower.length(item) for item in _some(tower, sources)]
    return float(np.mean(lengths)) if lengths else 0.0


def _mean_ngrams(tower: Tower, sources: Sequence[TextOrSource | None]) -> float:
    """Return the mean number of different n-grams of some texts."""
    prepared = _some(tower, sources)
    encoded = tower.encode([item for item in prepared if not is_bad(item)], (NGRAMS,))[NGRAMS]
    return sum(map(len, encoded)) / max(1, len(prepared))


def _some(tower: Tower, sources: Sequence[TextOrSource | None]) -> list[Any]:
    """Return some texts, spread over the dataset, prepared."""
    step = max(1, len(sources) // MEASURED_TEXTS)
    return [prepare_source(tower, source) for source in sources[::step][:MEASURED_TEXTS]]


def check_room(store_path: Path, n_bytes: int) -> None:
    """Raise CacheError if the disk has no room for ``n_bytes``. Call it before writing."""
    free = free_bytes(store_path)
    if not has_room(n_bytes, free):
        raise CacheError(
            f"the features take {format_bytes(n_bytes)}, but {store_path.parent} has only {format_bytes(free)} free; "
            f"free some space, or use another --workspace, fewer --views, or --dtype int8 for tokens"
        )


def has_room(n_bytes: int, free: int) -> bool:
    """Whether ``n_bytes`` fit in ``free`` bytes and leave some for other things. Zero bytes always fit."""
    return not n_bytes or n_bytes + ROOM_TO_LEAVE <= free


def free_bytes(store_path: Path) -> int:
    """Return the free bytes on the disk of a store, which need not exist yet."""
    existing = next(folder for folder in (store_path, *store_path.absolute().parents) if folder.exists())
    return shutil.disk_usage(existing).free


def _missing(
    store: FeatureStore | None, encoder: str, request: Request, tower: Tower, view: str, n_rows: int
) -> np.ndarray:
    """Return which rows extract would compute, (n_rows,) bool."""
    missing = np.ones(n_rows, bool)
    features = store.open_features(encoder, tower.modality) if store else None
    if features is not None and store is not None and features.n_written:
        store.check_same(features, request.provenance(tower), request.dtypes(tower))
        missing[: min(features.n_rows, n_rows)] = False
        rows = features.missing_rows(view)
        missing[rows[rows < n_rows]] = True
    return missing


def _derive_seconds(tower: DerivedTower, base: Rows) -> float:
    """Transform some stored rows, and return the seconds per row."""
    rows = base[:MEASURED_TEXTS]
    tower.transform(rows[:1])
    start = time.perf_counter()
    tower.transform(rows)
    return (time.perf_counter() - start) / max(1, len(rows))


def _encode_seconds(tower: Tower, sources: Sequence[TextOrSource | None], views: Sequence[str], size: int) -> float:
    """Encode a few batches, spread over the dataset, as extract does, and return the seconds per row."""
    n = min(len(sources), (1 + PROBE_BATCHES) * size)
    rows = np.linspace(0, len(sources) - 1, n).round().astype(int).tolist()
    with prepare_in_order(tower, sources, rows, 2 * size) as prepared:
        first = list(islice(prepared, size)) if n > size else []
        encode_prepared(tower, first, views, size)
        start = time.perf_counter()
        rest = list(prepared) if tower.by_length else []
        while rest or (rest := list(islice(prepared, size))):
            encode_prepared(tower, rest, views, size)
            rest = []
        return (time.perf_counter() - start) / (n - len(first))
