"""Stage 1: the frozen encoders encode every sample once, and a store keeps the features."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import chain, islice, pairwise
from pathlib import Path

import numpy as np

from cachefuse.data.column import Column, TextOrSource
from cachefuse.data.dataset import Dataset
from cachefuse.encoders import NO_OPTIONS
from cachefuse.encoders.base import DerivedTower, EncoderSpec, Tower
from cachefuse.errors import CacheError, ConfigError
from cachefuse.extraction.derive import base_rows, derive
from cachefuse.extraction.open_store import open_store
from cachefuse.extraction.pipeline import (
    TEXT_IN_WORK,
    Clock,
    encode_prepared,
    in_background,
    is_bad,
    prepare_in_order,
    text_size,
    views_to_encode,
)
from cachefuse.extraction.plan import check_room, row_bytes
from cachefuse.extraction.request import Request, check_options, open_request
from cachefuse.feature_spec import IDS, NGRAMS, NUMBERED
from cachefuse.store.features import Features
from cachefuse.store.lock import only_writer
from cachefuse.store.long_texts import LongTexts
from cachefuse.store.samples import BadSample
from cachefuse.store.store import FeatureStore
from cachefuse.store.writer import ViewWriter
from cachefuse.threads import adapt_threads, idle_threads

WINDOW_BATCHES = {"pooled": 16, "tokens": 4, IDS: 16, NGRAMS: 16}  # of texts; tokens of long texts take much memory


@dataclass(frozen=True)
class ExtractProgress:
    """The progress of one encoder on one modality, in rows; ``begun`` rows existed before this call.

    ``bottleneck`` is the slowest stage: reading (and decoding), encoding or writing. If ``encoder`` is empty, ``done``
    counts the samples whose content was compared with the store's digests.
    """

    encoder: str
    modality: str
    done: int
    total: int
    begun: int
    bottleneck: str = ""


@dataclass
class ExtractReport:
    """The result of extract: by (encoder, modality) the rows, how many are new, and long texts; the bad samples."""

    store: Path
    rows: dict[tuple[str, str], int] = field(default_factory=dict)
    computed: dict[tuple[str, str], int] = field(default_factory=dict)
    long: dict[tuple[str, str], LongTexts] = field(default_factory=dict)
    bad: list[BadSample] = field(default_factory=list)


OnProgress = Callable[[ExtractProgress], None]


def extract(
    dataset: Dataset,
    encoders: Sequence[str],
    store_path: Path,
    *,
    views: Sequence[str] = ("pooled",),
    device: str = "auto",
    batch_size: int | None = None,
    dtype: str = "float16",
    options: Mapping[str, str] = NO_OPTIONS,
    max_bad: float = 0.05,
    refresh: bool = False,
    on_progress: OnProgress = lambda progress: None,
) -> ExtractReport:
    """Encode a dataset with each encoder and write the features to its store. Existing rows are not computed again.

    After an interruption, the next call goes on at the first incomplete block. An unusable sample keeps its row (of
    zeros), and is marked absent and listed. Raises CacheError if their share exceeds ``max_bad``, if the disk has too
    little room, or if the content of samples has changed. With ``refresh`` those are computed again instead.

    With dtype int8, tokens are quantised (with a float16 scale per row) and pooled features are float16. The views
    ids, a text's token ids, and ngrams are always int32; only some text encoders have them. An encoder with ngrams
    alone, such as lexical, stores these whatever the views.

    An encoder's own options are part of its spec, as in "hf:bert-base-uncased,pooling=cls". ``options`` gives them to
    all encoders that have them.
    """
    check_options(encoders, views, batch_size, dtype)
    if not 0 <= max_bad <= 1:
        raise ConfigError(f"max-bad must be between 0 and 1. Got {max_bad} instead")
    with only_writer(store_path):
        request = open_request(dataset, encoders, views, device, batch_size, dtype, options)

        def on_digest(done: int, total: int) -> None:
            on_progress(ExtractProgress("", "", done, total, 0))

        asked: dict[str, dict[str, str]] = {}
        for spec, tower in request.towers:
            if not isinstance(tower, DerivedTower):  # made anew whenever they are read
                asked.setdefault(spec.short, {})[tower.modality] = str(spec)
        store = open_store(store_path, dataset, refresh=refresh, on_progress=on_digest, asked=asked)
        return extract_into(store, request, max_bad, on_progress)


def extract_into(store: FeatureStore, request: Request, max_bad: float, on_progress: OnProgress) -> ExtractReport:
    """Compute the missing rows of a request. The caller holds the store's lock and has updated its samples."""
    # Derived towers come last: they need other features.
    towers = sorted(request.towers, key=lambda pair: isinstance(pair[1], DerivedTower))
    jobs = [make_job(request, store, spec, tower, max_bad) for spec, tower in towers]
    check_room(store.path, round(sum(job.n_bytes for job in jobs)))
    report = ExtractReport(store.path)
    for job in jobs:
        name = (job.features.encoder, job.features.modality)
        try:
            report.computed[name] = job.run(on_progress)
        finally:
            store.update_present(job.features.modality)
        report.rows[name] = job.features.n_rows
        if (long := job.features.long_texts()) is not None:
            report.long[name] = long
    report.bad = store.bad_samples()
    return report


def make_job(request: Request, store: FeatureStore, spec: EncoderSpec, tower: Tower, max_bad: float) -> "Job":
    """Return the job of one encoder for one modality. Raises CacheError if stored features have another provenance."""
    source, dtypes = str(spec), request.dtypes(tower)
    features = store.require_features(spec.short, tower.modality, request.provenance(tower), source, dtypes)
    return Job(request.dataset, store, features, tower, dtypes, request.batch_size, max_bad)


@dataclass
class Job:
    """One encoder's work on one modality of a dataset. ``dtypes`` has the dtype of each view to extract."""

    dataset: Dataset
    store: FeatureStore
    features: Features
    tower: Tower
    dtypes: Mapping[str, str]
    batch_size: int
    max_bad: float

    @cached_property
    def needed(self) -> dict[str, np.ndarray]:
        """Which rows are missing, (n_rows,) bool by view."""
        needed = {view: np.zeros(self.features.n_rows, bool) for view in self.dtypes}
        for view, mask in needed.items():
            mask[self.features.missing_rows(view)] = True
        return needed

    @cached_property
    def pending(self) -> np.ndarray:
        """Which rows are missing in any view, (n_rows,) bool."""
        pending: np.ndarray = np.logical_or.reduce(list(self.needed.values()))
        return pending

    @cached_property
    def sources(self) -> Sequence[TextOrSource | None]:
        """One source or text per row; None if a sample has none."""
        return self._column.feature_sources()

    @property
    def _column(self) -> Column:
        return self.dataset.modalities[self.tower.modality]

    @property
    def n_bytes(self) -> float:
        """The bytes of the missing rows."""
        missing = {view: int(mask.sum()) for view, mask in self.needed.items()}
        return sum(n * row_bytes(self.tower, self.sources, view, self.dtypes[view]) for view, n in missing.items() if n)

    @idle_threads()
    def run(self, on_progress: OnProgress) -> int:
        """Compute the missing rows and return their number."""
        n_pending = int(self.pending.sum())
        if not n_pending:
            return 0
        begun = self.features.n_rows - n_pending
        progress = ExtractProgress(self.features.encoder, self.tower.modality, begun, self.features.n_rows, begun)
        on_progress(progress)
        if isinstance(self.tower, DerivedTower) and (base := base_rows(self.store, self.tower)) is not None:
            return derive(
                self.features,
                self.tower,
                base,
                self.dtypes,
                lambda done, total: on_progress(replace(progress, done=begun + done)),
            )
        windows, clock = self._windows(), Clock()
        with ExitStack() as stack:
            writers = {view: stack.enter_context(self._writer(view)) for view in self.dtypes if self.needed[view].any()}
            write = stack.enter_context(in_background(lambda writer, *values: writer.add(*values)))
            rows = chain.from_iterable(windows)
            prepared = stack.enter_context(
                prepare_in_order(self.tower, self.sources, rows, 2 * self._window, self._row_name)
            )
            for window in windows:
                adapt_threads()
                with clock.spend("reading"):
                    items = list(islice(prepared, len(window)))
                self._note_bad(window, items)
                needed = {view: mask[window.start : window.stop] for view, mask in self.needed.items()}
                with clock.spend("encoding"):
                    encoded = encode_prepared(self.tower, items, views_to_encode(needed), self.batch_size)
                long = self._long_texts(window, items)
                with clock.spend("writing"):
                    for view, writer in writers.items():
                        wanted = np.flatnonzero(needed[view])
                        write(writer, wanted + window.start, [encoded[view][i] for i in wanted], long)
                done = progress.done + int(self.pending[window.start : window.stop].sum())
                progress = replace(progress, done=done, bottleneck=clock.bottleneck)
                on_progress(progress)
        if any(view not in self.features.views for view in self.dtypes):
            raise CacheError(f"no sample of {self.dataset.name} has a usable {self.tower.modality}")
        return n_pending

    def _writer(self, view: str) -> ViewWriter:
        ragged = view in NUMBERED or (self.tower.ragged and view == "tokens")
        vocabulary = self.tower.vocabulary if view in NUMBERED else 0
        return ViewWriter(
            self.features,
            view,
            ragged=ragged,
            dtype=self.dtypes[view],
            vocabulary=vocabulary,
            count_long=bool(self.tower.max_tokens),
        )

    def _long_texts(self, rows: range, items: Sequence[object]) -> dict[int, int]:
        """Return the tokens of each text that is longer than the tower's limit, by row."""
        if not self.tower.max_tokens:
            return {}
        lengths = {row: self.tower.n_tokens(item) for row, item in zip(rows, items, strict=True) if not is_bad(item)}
        return {row: n for row, n in lengths.items() if n > self.tower.max_tokens}

    @property
    def _window(self) -> int:
        """Rows prepared and encoded together. Texts are sorted by length, then put back in order."""
        n_batches = min(WINDOW_BATCHES[view] for view in self.dtypes)
        return self.batch_size * (n_batches if self.tower.by_length else 1)

    def _windows(self) -> list[range]:
        """Return the windows with pending rows.

        Windows have fixed positions and are encoded whole. So a resumed run has the same batches as an uninterrupted
        one: the same bytes on one machine, with the same library versions and number of threads. A new window begins
        at appended samples, so that only those are computed.
        """
        starts = [0, *self.store.appended_at(self.tower.modality), len(self.pending)]
        windows = (
            window
            for first, end in pairwise(starts)
            for start in range(first, end, self._window)
            for window in self._with_less_text(range(start, min(start + self._window, end)))
        )
        return [window for window in windows if self.pending[window.start : window.stop].any()]

    def _with_less_text(self, window: range) -> list[range]:
        """Return a window, in parts if its texts are so long that together they would take much memory."""
        parts, first, total = [], window.start, 0
        for row in window if self.tower.by_length else ():
            n = text_size(self.sources[row])
            if row > first and total + n > TEXT_IN_WORK:
                parts.append(range(first, row))
                first, total = row, 0
            total += n
        return [*parts, range(first, window.stop)]

    @cached_property
    def _owners(self) -> np.ndarray:
        return self._column.owners()

    def _owners_of(self, row: int) -> list[int]:
        """Return all samples of a row."""
        shared = self._column.rows
        return [int(self._owners[row])] if shared is None else np.flatnonzero(shared == row).tolist()

    def _row_name(self, row: int) -> str:
        """Return the sample and file of a row, for messages."""
        name = getattr(self.sources[row], "name", "")
        return f"sample {self.dataset.ids[self._owners[row]]}{f' ({name})' if name else ''}"

    def _note_bad(self, rows: range, items: Sequence[object]) -> None:
        """List the unusable samples. Raises CacheError if they are too many by now."""
        modality = self.tower.modality
        bad = [
            BadSample(self.dataset.ids[sample], modality, getattr(self.sources[row], "name", ""), str(item))
            for row, item in zip(rows, items, strict=True)
            if is_bad(item)
            for sample in self._owners_of(row)
        ]
        if not bad:
            return
        self.store.mark_bad(bad)
        n_bad = self.store.n_bad[modality]
        if n_bad > self.max_bad * len(self.dataset):
            last = bad[-1]
            source = f"{last.source}: " if last.source else ""
            raise CacheError(
                f"{n_bad:,} of {len(self.dataset):,} samples have no usable {modality}, over the limit of "
                f"{self.max_bad:.0%} (--max-bad); the last, {last.id}: {source}{last.reason}"
            )
