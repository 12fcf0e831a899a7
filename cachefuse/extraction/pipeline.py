"""The stages of extraction, with bounded queues between: read and prepare in threads, encode, write in a thread."""

import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, TypeVar

import numpy as np

from cachefuse.data.column import TextOrSource, checked_text
from cachefuse.encoders.base import DerivedTower, Tower
from cachefuse.errors import BadSampleError, CachefuseError, EncoderError
from cachefuse.feature_spec import IDS
from cachefuse.memory import one_sample
from cachefuse.store.long_texts import LongTexts
from cachefuse.threads import idle_threads, n_cores

WRITES_AHEAD = 2  # encoded windows that wait for the writer
T = TypeVar("T")
TEXT_IN_WORK = 1 << 24  # characters of the texts that are prepared in advance, and of those that are encoded together
STAGES = ("reading", "encoding", "writing")


def is_bad(item: object) -> bool:
    """Whether ``prepare_source`` returned an error."""
    return isinstance(item, BadSampleError)


def prepare_source(tower: Tower, source: TextOrSource | None) -> Any:
    """Load and preprocess one source or text. An unusable one returns its BadSampleError."""
    try:
        if not source:
            raise BadSampleError(f"has no {tower.modality}")
        if isinstance(source, str):
            source = checked_text(source)
        if isinstance(source, str):
            return tower.prepare(source.encode("utf-8", "replace").decode())  # half a surrogate pair becomes "?"
        with one_sample(tower.prepare_bytes):
            return tower.prepare(source.load())
    except BadSampleError as error:
        return BadSampleError(str(error))  # without its traceback, which holds the image


@contextmanager
def prepare_in_order(
    tower: Tower,
    sources: Sequence[TextOrSource | None],
    rows: Iterable[int],
    ahead: int,
    row_name: Callable[[int], str] = lambda row: f"row {row}",
) -> Iterator[Iterator[Any]]:
    """Prepare the sources of ``rows`` in threads, in order, at most ``ahead`` in advance, fewer of long texts.

    An error that is not the sample's fault stops everything. It is raised with a note that names the sample.
    """

    def prepare(row: int) -> Any:
        try:
            return prepare_source(tower, sources[row])
        except (CachefuseError, OSError, MemoryError) as error:
            error.add_note(f"while preparing the {tower.modality} of {row_name(row)}")
            raise
        except Exception as error:
            if "allocate memory" in str(error):  # of torch: no fault of the sample or the encoder
                raise MemoryError(f"while preparing the {tower.modality} of {row_name(row)}") from error
            cause = f"{type(error).__name__}: {error}"
            raise EncoderError(f"cannot prepare the {tower.modality} of {row_name(row)}: {cause}") from error

    with ThreadPoolExecutor(n_cores(), thread_name_prefix="prepare") as pool:
        try:
            yield in_order(pool, prepare, rows, ahead, lambda row: text_size(sources[row]))
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def in_order(
    pool: ThreadPoolExecutor,
    function: Callable[[int], T],
    items: Iterable[int],
    ahead: int,
    size: Callable[[int], int] = lambda item: 0,
) -> Iterator[T]:
    """Yield ``function(item)`` in order. The pool computes at most ``ahead`` items in advance, of ``TEXT_IN_WORK``."""
    waiting: deque[tuple[Future[T], int]] = deque()
    total = 0
    for item in items:
        while len(waiting) >= ahead or (waiting and total + size(item) > TEXT_IN_WORK):
            future, n = waiting.popleft()
            total -= n
            yield future.result()
        waiting.append((pool.submit(function, item), size(item)))
        total += size(item)
    while waiting:
        yield waiting.popleft()[0].result()


def text_size(source: TextOrSource | None) -> int:
    """Return the characters of a text, 0 for another source."""
    return len(source) if isinstance(source, str) else 0


def views_to_encode(needed: Mapping[str, np.ndarray]) -> tuple[str, ...]:
    """Return the views to encode, given the missing rows (n,) bool of each view.

    If one view other than ids is missing, all are encoded: the set of views may change the last bits of a model's
    output, and so the bytes of a resumed run. Ids alone need no model.
    """
    missing = {view for view, rows in needed.items() if rows.any()}
    return tuple(view for view in needed if (view in missing if view == IDS else missing - {IDS}))


@idle_threads()
def encode_prepared(
    tower: Tower, prepared: Sequence[Any], views: Sequence[str], batch_size: int
) -> dict[str, list[np.ndarray | None]]:
    """Encode prepared samples in batches of similar length. Return each view in the given order; None if bad."""
    good = sorted((i for i, item in enumerate(prepared) if not is_bad(item)), key=lambda i: tower.length(prepared[i]))
    values: dict[str, list[np.ndarray | None]] = {view: [None] * len(prepared) for view in views}
    for start in range(0, len(good), batch_size):
        batch = good[start : start + batch_size]
        encoded = tower.encode([prepared[i] for i in batch], views)
        for view in views:
            for i, value in zip(batch, encoded[view], strict=True):
                values[view][i] = value
    return values


def count_long_texts(tower: Tower, prepared: Iterable[Any]) -> LongTexts | None:
    """Return how many prepared texts are longer than their encoder's limit; None for a tower without a limit."""
    reader = tower.base if isinstance(tower, DerivedTower) and tower.base is not None else tower
    if not reader.max_tokens:
        return None
    lengths = [reader.n_tokens(item) for item in prepared if not is_bad(item)]
    windows = reader.provenance.get("long_texts") == "windows"
    return LongTexts(len(lengths), reader.max_tokens, tuple(n for n in lengths if n > reader.max_tokens), windows)


@contextmanager
def in_background(function: Callable[..., None], ahead: int = WRITES_AHEAD) -> Iterator[Callable[..., None]]:
    """Yield a function that runs ``function`` in a thread, in order, and waits only if ``ahead`` calls are unfinished.

    The next call, or the end of the block, raises an error of the thread. Then waiting calls are dropped, as they are
    after an error in the block.
    """
    waiting: deque[Future[None]] = deque()
    failed = threading.Event()

    def run(*arguments: object) -> None:
        if not failed.is_set():
            try:
                function(*arguments)
            except BaseException:
                failed.set()
                raise

    def call(*arguments: object) -> None:
        while len(waiting) >= ahead or (waiting and waiting[0].done()):
            waiting.popleft().result()
        waiting.append(pool.submit(run, *arguments))

    with ThreadPoolExecutor(1, thread_name_prefix="write") as pool:
        try:
            yield call
            while waiting:
                waiting.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)


class Clock:
    """Counts the seconds that the encoding thread spends in each stage. The slowest stage is the bottleneck."""

    def __init__(self) -> None:
        self._seconds = dict.fromkeys(STAGES, 0.0)

    @contextmanager
    def spend(self, stage: str) -> Iterator[None]:
        """Count the time of a block."""
        start = time.perf_counter()
        try:
            yield
        finally:
            # Older time fades: the bottleneck is the present one.
            self._seconds[stage] = 0.9 * self._seconds[stage] + time.perf_counter() - start

    @property
    def bottleneck(self) -> str:
        """The stage that takes the most time: encoding, unless it waits for reading or writing."""
        return max(STAGES, key=lambda stage: self._seconds[stage])
