"""Reading all of a store against its checksums, and computing again the blocks that are not what was written."""

from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import zarr

from cachefuse.data.dataset import Dataset
from cachefuse.encoders.base import is_derived
from cachefuse.errors import CacheError
from cachefuse.extraction.extract import OnProgress, extract_into
from cachefuse.extraction.open_store import open_store
from cachefuse.extraction.request import open_request
from cachefuse.feature_spec import IDS
from cachefuse.store.blocks import DamagedBlockError
from cachefuse.store.columns import IDENTITY, read_about, read_columns
from cachefuse.store.features import Features
from cachefuse.store.format import FEATURE_DTYPES
from cachefuse.store.lock import only_writer
from cachefuse.store.rows import Rows
from cachefuse.store.store import FeatureStore
from cachefuse.store.views import block_name


@dataclass(frozen=True)
class Damage:
    """A block that is not what was written; ``block`` is None for an array of the samples, or for metadata."""

    encoder: str
    modality: str
    view: str
    block: int | None
    reason: str


@dataclass(frozen=True)
class VerifiedView:
    """What all finished blocks of a view hold: NaN and infinite values, rows of zeros though their sample is present.

    ``cosine`` of quantised rows to those in float16: mean and least, as they were when they were written.
    """

    encoder: str
    modality: str
    view: str
    blocks: int
    finished: int
    n_bytes: int
    nan: int
    inf: int
    zero: int
    cosine: tuple[float, float] | None


@dataclass(frozen=True)
class Verification:
    """The views that were read, and all damage found."""

    path: Path
    views: tuple[VerifiedView, ...]
    damage: tuple[Damage, ...]


def verify(store: FeatureStore, *, on_progress: Callable[[int, int], None] = lambda done, total: None) -> Verification:
    """Read every finished block: checksums, shard indexes, offsets, NaN and infinite values, rows of zeros.

    ``on_progress`` hears of the blocks done, of all. Blocks that were never finished are no damage.
    """
    damage = list(_check_samples(store))
    opened = []
    for path in store.feature_paths():
        try:
            opened.append(store.open_group(path))
        except CacheError as error:
            damage.append(Damage("", "", str(path.relative_to(store.path)), None, str(error)))
    groups = [(features, view) for features in opened if features is not None for view in features.views]
    total, done, views = sum(features.n_blocks(view) for features, view in groups), 0, []
    for features, view in groups:
        check = _Check(features, view)
        for block in range(features.n_blocks(view)):
            check.add(block)
            done += 1
            on_progress(done, total)
        views.append(check.result())
        damage += check.damage
    return Verification(store.path, tuple(views), tuple(damage))


def repair(
    store: FeatureStore,
    found: Verification,
    dataset: Dataset,
    *,
    device: str = "auto",
    on_progress: OnProgress = lambda progress: None,
) -> None:
    """Compute damaged blocks again, and only those, with the encoders that made them, from the dataset's raw data.

    Raises CacheError where that can't be: samples whose ids are damaged, encoders that are not what they were.
    """
    with only_writer(store.path):
        store = open_store(store.path, dataset)
        damaged = {(damage.encoder, damage.modality, damage.view) for damage in found.damage}
        for path in sorted(damaged, key=lambda path: (is_derived(path[0]), path)):  # what is made of others comes last
            features = store.open_features(*path[:2]) if path[0] else None
            if features is None:
                continue
            view = features.views[path[2]]
            dtype = view.dtype if view.dtype in FEATURE_DTYPES else "float16"  # of ids it plays no part
            request = open_request(dataset, [features.source], [view.name], device, None, dtype)
            towers = tuple(place for place in request.towers if place[1].modality == features.modality)
            view.declare(features.path, features.n_rows)
            for damage in found.damage:
                if (damage.encoder, damage.modality, damage.view) == path and damage.block is not None:
                    features.forget(view.name, features.rows_of(view.name, damage.block))
            # However many samples are bad, the ledger has them already.
            extract_into(store, replace(request, towers=towers), 1.0, on_progress)


class _Check:
    """One view, block by block."""

    def __init__(self, features: Features, view: str) -> None:
        self.features, self.view = features, view
        self.damage: list[Damage] = []
        self.finished = self.n_bytes = self.nan = self.inf = self.zero = 0
        self._cosines: list[tuple[int, float, float]] = []
        self._present = _present_rows(features)
        self._whole = np.array([features.is_whole(view, block) for block in range(features.n_blocks(view))], bool)
        self._rows: Rows | None = None  # where an index is damaged, each block is opened by itself, to tell which it is
        with suppress(DamagedBlockError):
            self._rows = features.open_blocks(view, np.flatnonzero(self._whole).tolist())
        for name in features.views[view].arrays:
            self._check_metadata(name, None)

    def add(self, block: int) -> None:
        """Read one block."""
        written = self.features.written(self.view, block)
        if written is None or written.stale:
            return
        for name in self.features.views[self.view].arrays if self.features.views[self.view].ragged else ():
            self._check_metadata(f"{name}/{block_name(block)}", block)
        if self._whole[block]:
            try:
                values = self._read(block)
            except DamagedBlockError as error:
                self._note(block, error.why)
                return
            self._count(block, values)
            self.finished += 1
        elif self.features.stored(self.view, block) is None:
            self._note(block, "it is gone, cut short or changed")
            return
        self.n_bytes += sum(size for size, _ in written.files.values())
        if written.cosine:
            self._cosines.append((written.rows, *written.cosine))

    def result(self) -> VerifiedView:
        """What was found in all blocks."""
        cosine = None
        if self._cosines:
            rows = sum(n for n, _, _ in self._cosines)
            cosine = sum(n * mean for n, mean, _ in self._cosines) / rows, min(least for *_, least in self._cosines)
        return VerifiedView(
            encoder=self.features.encoder,
            modality=self.features.modality,
            view=self.view,
            blocks=self.features.n_blocks(self.view),
            finished=self.finished,
            n_bytes=self.n_bytes,
            nan=self.nan,
            inf=self.inf,
            zero=self.zero,
            cosine=cosine,
        )

    def _read(self, block: int) -> np.ndarray | list[np.ndarray]:
        """Return a block's rows, (n, ...) or a list of n arrays. Raises DamagedBlockError."""
        rows = self.features.open_blocks(self.view, [block]) if self._rows is None else self._rows
        here = self.features.rows_of(self.view, block)
        return rows[here.start : here.stop]

    def _count(self, block: int, values: np.ndarray | list[np.ndarray]) -> None:
        flat = np.concatenate(values) if isinstance(values, list) else values
        if self.view == IDS:
            wrong = (flat < 0) | (flat >= self.features.views[self.view].vocabulary)
            if wrong.any():
                self._note(block, f"it holds {int(wrong.sum()):,} token ids that are not of the vocabulary")
        else:
            nan, inf = int(np.isnan(flat).sum()), int(np.isinf(flat).sum())
            self.nan, self.inf = self.nan + nan, self.inf + inf
            if nan or inf:
                self._note(block, f"it holds {nan:,} NaN and {inf:,} infinite values")
        rows = self.features.rows_of(self.view, block)
        if isinstance(values, list):  # the id 0 is a token like any other
            empty = np.array([not len(row) if self.view == IDS else not row.any() for row in values])
        else:
            empty = np.asarray(~values.reshape(len(values), -1).any(axis=1))
        self.zero += int((empty & self._present[rows.start : rows.stop]).sum())

    def _check_metadata(self, name: str, block: int | None) -> None:
        try:
            zarr.open(self.features.path / name, mode="r")
        except Exception as error:  # whatever zarr-python raises on metadata that is not its own
            self._note(block, f"{name}/zarr.json can't be read by Zarr: {str(error) or type(error).__name__}")

    def _note(self, block: int | None, reason: str) -> None:
        if not any(damage.block == block for damage in self.damage):
            self.damage.append(Damage(self.features.encoder, self.features.modality, self.view, block, reason))


def _check_samples(store: FeatureStore) -> Iterator[Damage]:
    """Read every array of the samples; each chunk has a checksum, and each array must have a row a sample."""
    there, _ = read_columns(store.path)
    try:
        names = set(read_about(store.path)["columns"])
    except CacheError:
        yield Damage("", "", "samples", None, "its zarr.json can't be read, or its checksum does not fit")
        names = {*IDENTITY, "split", "target"}
    for name in sorted(names - there.keys()):
        yield Damage("", "", f"samples/{name}", None, "it can't be read, or its checksum does not fit")
    lengths = {name: len(values) - name.startswith("items/") for name, values in there.items()}
    for name, n in sorted(lengths.items()):
        if n != lengths.get("id", n):
            yield Damage("", "", f"samples/{name}", None, f"it has {n:,} rows where there are {lengths['id']:,} ids")


def _present_rows(features: Features) -> np.ndarray:
    """Return which rows have a sample with this modality; all, where the samples can't say."""
    try:
        return features.samples.present_rows(features.modality)
    except CacheError:
        return np.ones(features.n_rows, bool)
