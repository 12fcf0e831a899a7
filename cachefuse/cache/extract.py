"""Stage 1: every sample passes the frozen encoders once, and what they see is kept."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from cachefuse.cache.layout import DTYPES
from cachefuse.cache.store import BadSample, BlockWriter, Features, FeatureStore, text_offsets
from cachefuse.data.dataset import Dataset
from cachefuse.encoders import EncoderSpec, open_encoder
from cachefuse.encoders.base import Tower
from cachefuse.errors import BadSampleError, CacheError, ConfigError, EncoderError
from cachefuse.runtime import n_threads, resolve_device

VIEWS = ("pooled", "tokens")
BATCH_SIZE = {"cpu": 32, "cuda": 256}
WINDOW_BATCHES = 16


@dataclass(frozen=True)
class Progress:
    """How far one encoder is with one modality, in rows; ``begun`` rows were there before this call."""

    encoder: str
    modality: str
    done: int
    total: int
    begun: int


@dataclass
class ExtractReport:
    """What extract did: rows by (encoder, modality), how many of them were computed now, and the bad samples."""

    store: Path
    rows: dict[tuple[str, str], int] = field(default_factory=dict)
    computed: dict[tuple[str, str], int] = field(default_factory=dict)
    bad: list[BadSample] = field(default_factory=list)


def extract(
    dataset: Dataset,
    encoders: Sequence[str],
    store_path: Path,
    *,
    views: Sequence[str] = ("pooled",),
    device: str = "auto",
    batch_size: int | None = None,
    dtype: str = "float16",
    max_bad: float = 0.05,
    on_progress: Callable[[Progress], None] = lambda progress: None,
) -> ExtractReport:
    """Encode a dataset with each encoder and write the features to its store; what is there is not computed again.

    Interrupted at any moment, the next call goes on at the first block that is not whole. A sample that can't be
    encoded keeps its row (zeros), is marked absent and listed; more than ``max_bad`` of them raise CacheError.
    """
    _check(encoders, views, batch_size, dtype, max_bad)
    device = resolve_device(device)
    batch_size = batch_size or BATCH_SIZE[device.partition(":")[0]]
    plan = [(EncoderSpec.parse(text), open_encoder(text, device)) for text in dict.fromkeys(encoders)]
    _check_plan(plan, dataset, views)
    store = FeatureStore.for_dataset(store_path, dataset)
    report = ExtractReport(store_path)
    for spec, towers in plan:
        for modality in dataset.modalities:
            if modality not in towers:
                continue
            tower = towers[modality]
            features = store.require_features(
                spec.short,
                modality,
                {**tower.provenance, "dtype": dtype},
                str(spec.absolute()),
            )
            job = _Job(dataset, store, features, tower, tuple(views), batch_size, max_bad)
            report.computed[(spec.short, modality)] = job.run(on_progress)
            report.rows[(spec.short, modality)] = features.n_rows
    report.bad = store.ledger()
    return report


def _check(encoders: Sequence[str], views: Sequence[str], batch_size: int | None, dtype: str, max_bad: float) -> None:
    if not encoders:
        raise ConfigError("extract needs at least one encoder")
    unknown = [view for view in views if view not in VIEWS]
    if unknown or not views:
        raise ConfigError(f"unknown view {unknown[0] if unknown else ''!r}; choose from: {', '.join(VIEWS)}")
    if batch_size is not None and batch_size < 1:
        raise ConfigError(f"batch size must be at least 1. Got {batch_size} instead")
    if dtype not in DTYPES:
        raise ConfigError(f"unknown dtype {dtype!r}; choose from: {', '.join(DTYPES)}")
    if not 0 <= max_bad <= 1:
        raise ConfigError(f"max-bad must be between 0 and 1. Got {max_bad} instead")


def _check_plan(plan: Sequence[tuple[EncoderSpec, dict[str, Tower]]], dataset: Dataset, views: Sequence[str]) -> None:
    for spec, towers in plan:
        if not set(towers) & set(dataset.modalities):
            raise EncoderError(
                f"encoder {spec} encodes {' and '.join(towers)}, but {dataset.name} has only "
                f"{' and '.join(dataset.modalities) or 'labels'}"
            )
        for tower in towers.values():
            for view in views:
                if view not in tower.views:
                    raise ConfigError(f"encoder {spec} has no {view} view; choose from: {', '.join(tower.views)}")
    shorts = [spec.short for spec, _ in plan]
    for short in shorts:
        if shorts.count(short) > 1:
            raise ConfigError(f"two encoders are both called {short}; rename one of the folders")


@dataclass
class _Job:
    """One encoder over one modality of a dataset."""

    dataset: Dataset
    store: FeatureStore
    features: Features
    tower: Tower
    views: tuple[str, ...]
    batch_size: int
    max_bad: float

    def run(self, on_progress: Callable[[Progress], None]) -> int:
        """Compute the rows that are missing and return how many those are."""
        missing = {view: self.features.missing_rows(view) for view in self.views}
        rows = np.unique(np.concatenate(list(missing.values())))
        if not len(rows):
            return 0
        writers = {
            view: BlockWriter(self.features, view, ragged=self.tower.ragged and view == "tokens") for view in self.views
        }
        needs = {view: np.isin(rows, missing[view]) for view in self.views}
        # Texts are encoded among others of like length: a window is what may be sorted and put back in order.
        window = self.batch_size * (WINDOW_BATCHES if self.tower.modality == "text" else 1)
        sources = item_sources(self.dataset, self.tower.modality)
        done = begun = self.features.n_rows - len(rows)
        with ThreadPoolExecutor(n_threads(), thread_name_prefix="prepare") as pool:
            prepared = in_order(pool, lambda row: prepare_source(self.tower, sources[row]), rows.tolist(), 2 * window)
            try:
                for start in range(0, len(rows), window):
                    on_progress(Progress(self.features.encoder, self.tower.modality, done, self.features.n_rows, begun))
                    here = slice(start, start + window)
                    encoded = self._encode(rows[here], list(islice(prepared, window)))
                    for view, writer in writers.items():
                        values = [encoded[view][i] for i in np.flatnonzero(needs[view][here])]
                        writer.add(rows[here][needs[view][here]], values)
                    done += len(rows[here])
            finally:
                pool.shutdown(wait=False, cancel_futures=True)
        on_progress(Progress(self.features.encoder, self.tower.modality, done, self.features.n_rows, begun))
        if any(view not in self.features.views for view in self.views):
            raise CacheError(f"no sample of {self.dataset.name} has a usable {self.tower.modality}")
        return len(rows)

    def _encode(self, rows: np.ndarray, prepared: list[Any]) -> dict[str, list[np.ndarray | None]]:
        """Encode a window of rows, listing those that can't be used."""
        self._note_bad([(int(row), item) for row, item in zip(rows, prepared, strict=True) if is_bad(item)])
        return encode_prepared(self.tower, prepared, self.views, self.batch_size)

    def _note_bad(self, bad: list[tuple[int, BadSampleError]]) -> None:
        if not bad:
            return
        modality = self.tower.modality
        owners = item_owners(self.dataset, modality)
        sources = item_sources(self.dataset, modality)
        lines = [
            BadSample(self.dataset.ids[owners[row]], modality, getattr(sources[row], "name", ""), str(error))
            for row, error in bad
        ]
        self.store.mark_bad(lines)
        n_bad = sum(line.modality == modality for line in self.store.ledger())
        if n_bad > self.max_bad * len(self.dataset):
            raise CacheError(
                f"{n_bad:,} of {len(self.dataset):,} samples have no usable {modality}, over the limit of "
                f"{self.max_bad:.0%} (--max-bad); the last: {lines[-1].id} {lines[-1].reason}"
            )


def is_bad(item: Any) -> bool:
    """Whether ``prepare_source`` could not use its source."""
    return isinstance(item, BadSampleError)


def prepare_source(tower: Tower, source: Any) -> Any:
    """Load and preprocess one image source or text; what can't be used comes back as its BadSampleError."""
    try:
        if not source:
            raise BadSampleError(f"has no {tower.modality}")
        return tower.prepare(source if isinstance(source, str) else source.load())
    except BadSampleError as error:
        return error


def encode_prepared(
    tower: Tower, prepared: Sequence[Any], views: Sequence[str], batch_size: int
) -> dict[str, list[np.ndarray | None]]:
    """Encode prepared samples in batches of like length, each view in the order given; None where one is bad."""
    good = sorted((i for i, item in enumerate(prepared) if not is_bad(item)), key=lambda i: tower.length(prepared[i]))
    values: dict[str, list[np.ndarray | None]] = {view: [None] * len(prepared) for view in views}
    for start in range(0, len(good), batch_size):
        batch = good[start : start + batch_size]
        encoded = tower.encode([prepared[i] for i in batch], views)
        for view in views:
            for i, value in zip(batch, encoded[view], strict=True):
                values[view][i] = value
    return values


def item_sources(dataset: Dataset, modality: str) -> list[Any]:
    """Return one source a feature row: images or texts, flat where samples have several texts."""
    if modality == "image":
        return dataset.images or []
    if text_offsets(dataset) is not None:
        return [text for texts in dataset.texts or () for text in texts]
    return [texts[0] if texts else "" for texts in dataset.texts or ()]


def item_owners(dataset: Dataset, modality: str) -> np.ndarray:
    """Return the sample that each feature row belongs to."""
    offsets = text_offsets(dataset) if modality == "text" else None
    return np.arange(len(dataset)) if offsets is None else np.repeat(np.arange(len(dataset)), np.diff(offsets))


def in_order(
    pool: ThreadPoolExecutor, function: Callable[[int], Any], items: Iterable[int], ahead: int
) -> Iterator[Any]:
    """Yield ``function(item)`` in order, computed in the pool at most ``ahead`` items before they are taken."""
    waiting: deque[Future[Any]] = deque()
    items = iter(items)
    while True:
        waiting.extend(pool.submit(function, item) for item in islice(items, ahead - len(waiting)))
        if not waiting:
            return
        yield waiting.popleft().result()
