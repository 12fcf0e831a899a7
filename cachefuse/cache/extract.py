"""Stage 1: every sample passes the frozen encoders once, and what they see is kept."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import chain, islice
from pathlib import Path
from typing import Any

import filelock
import numpy as np

from cachefuse.cache.features import BlockWriter, Features
from cachefuse.cache.layout import DTYPES
from cachefuse.cache.samples import text_offsets
from cachefuse.cache.store import BadSample, FeatureStore
from cachefuse.data.dataset import Dataset
from cachefuse.encoders import EncoderSpec, open_encoder
from cachefuse.encoders.base import Tower
from cachefuse.errors import BadSampleError, CacheError, ConfigError, EncoderError
from cachefuse.runtime import n_threads, resolve_device, slug

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
    specs = dict.fromkeys(EncoderSpec.parse(text).absolute() for text in encoders)
    plan = [(spec, open_encoder(spec, device)) for spec in specs]
    _check_plan(plan, dataset, views)
    with _only_writer(store_path):
        store = FeatureStore.for_dataset(store_path, dataset)
        report = ExtractReport(store_path)
        for spec, towers in plan:
            for modality in dataset.modalities:
                if modality not in towers:
                    continue
                tower = towers[modality]
                provenance = {**tower.provenance, "dtype": dtype}
                features = store.require_features(spec.short, modality, provenance, str(spec))
                job = _Job(dataset, store, features, tower, tuple(views), batch_size, max_bad)
                try:
                    report.computed[(spec.short, modality)] = job.run(on_progress)
                finally:
                    store.update_present(modality)
                report.rows[(spec.short, modality)] = features.n_rows
    report.bad = store.ledger()
    return report


@contextmanager
def _only_writer(store_path: Path) -> Iterator[None]:
    """Hold the store's lock, which ends with the process however that ends."""
    store_path.parent.mkdir(parents=True, exist_ok=True)
    lock = filelock.FileLock(store_path.with_name(f".{store_path.name}.lock"), timeout=0)
    try:
        lock.acquire()
    except filelock.Timeout:
        raise CacheError(f"another extract is writing to {store_path}; wait until it has ended") from None
    try:
        yield
    finally:
        lock.release()


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
        for modality in sorted(set(towers) & set(dataset.modalities)):
            for view in views:
                if view not in towers[modality].views:
                    known = ", ".join(towers[modality].views)
                    raise ConfigError(f"encoder {spec} has no {view} view of {modality}; choose from: {known}")
    shorts = [spec.short for spec, _ in plan]
    folders = [slug(short) for short in shorts]
    for short, folder in zip(shorts, folders, strict=True):
        if folders.count(folder) > 1:
            raise ConfigError(f"two encoders would both be kept as {short}; rename one, or use another --workspace")


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
        needed = {view: np.zeros(self.features.n_rows, bool) for view in self.views}
        for view, mask in needed.items():
            mask[self.features.missing_rows(view)] = True
        pending = np.logical_or.reduce(list(needed.values()))  # (n_rows,)
        n_pending = int(pending.sum())
        if not n_pending:
            return 0
        ragged = {view: self.tower.ragged and view == "tokens" for view in self.views}
        writers = {view: BlockWriter(self.features, view, ragged=ragged[view]) for view in self.views}
        begun = self.features.n_rows - n_pending
        progress = Progress(self.features.encoder, self.modality, begun, self.features.n_rows, begun)
        on_progress(progress)
        windows = self._windows(pending)
        with prepare_in_order(self.tower, self.sources, chain.from_iterable(windows), 2 * self._window) as prepared:
            for rows in windows:
                items = list(islice(prepared, len(rows)))
                self._note_bad(rows, items)
                encoded = encode_prepared(self.tower, items, self.views, self.batch_size)
                here = slice(rows.start, rows.stop)
                for view, writer in writers.items():
                    wanted = np.flatnonzero(needed[view][here])
                    writer.add(wanted + rows.start, [encoded[view][i] for i in wanted])
                progress = replace(progress, done=progress.done + int(pending[here].sum()))
                on_progress(progress)
        if any(view not in self.features.views for view in self.views):
            raise CacheError(f"no sample of {self.dataset.name} has a usable {self.modality}")
        return n_pending

    @property
    def modality(self) -> str:
        return self.tower.modality

    @cached_property
    def sources(self) -> list[Any]:
        return item_sources(self.dataset, self.modality)

    @cached_property
    def owners(self) -> np.ndarray:
        return item_owners(self.dataset, self.modality)

    @property
    def _window(self) -> int:
        """Rows prepared and encoded together. Texts are sorted by length in it, and put back in order."""
        return self.batch_size * (WINDOW_BATCHES if self.tower.modality == "text" else 1)

    def _windows(self, pending: np.ndarray) -> list[range]:
        """Return the windows with pending rows. They lie where they always lie and are encoded whole, so that a
        resumed run makes the same batches, and with them the same bytes, as one that was never interrupted."""
        size = self._window
        numbers = np.unique(np.flatnonzero(pending) // size).tolist()
        return [range(number * size, min((number + 1) * size, len(pending))) for number in numbers]

    def _note_bad(self, rows: range, items: Sequence[Any]) -> None:
        """List the samples that can't be used. Raises CacheError if they are too many by now."""
        bad = [
            BadSample(
                self.dataset.ids[self.owners[row]], self.modality, getattr(self.sources[row], "name", ""), str(item)
            )
            for row, item in zip(rows, items, strict=True)
            if is_bad(item)
        ]
        if not bad:
            return
        self.store.mark_bad(bad)
        n_bad = self.store.n_bad[self.modality]
        if n_bad > self.max_bad * len(self.dataset):
            raise CacheError(
                f"{n_bad:,} of {len(self.dataset):,} samples have no usable {self.modality}, over the limit of "
                f"{self.max_bad:.0%} (--max-bad); the last: {bad[-1].id} {bad[-1].reason}"
            )


def is_bad(item: Any) -> bool:
    """Whether ``prepare_source`` could not use its source."""
    return isinstance(item, BadSampleError)


def prepare_source(tower: Tower, source: Any) -> Any:
    """Load and preprocess one image source or text; what can't be used comes back as its BadSampleError."""
    try:
        if not source:
            raise BadSampleError(f"has no {tower.modality}")
        if isinstance(source, str):
            return tower.prepare(source.encode("utf-8", "replace").decode())  # half a surrogate pair becomes "?"
        return tower.prepare(source.load())
    except BadSampleError as error:
        return error


@contextmanager
def prepare_in_order(tower: Tower, sources: Sequence[Any], rows: Iterable[int], ahead: int) -> Iterator[Iterator[Any]]:
    """Prepare some rows' sources in threads, in order, at most ``ahead`` before they are taken."""
    with ThreadPoolExecutor(n_threads(), thread_name_prefix="prepare") as pool:
        try:
            yield in_order(pool, lambda row: prepare_source(tower, sources[row]), rows, ahead)
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


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
