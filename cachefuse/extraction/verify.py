"""Verify all checksums of a store, and compute damaged blocks again."""

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
from cachefuse.feature_spec import NUMBERED
from cachefuse.files import read_bounded
from cachefuse.store.blocks import DamagedBlockError
from cachefuse.store.columns import BAD_SAMPLES, IDENTITY, read_about, read_columns
from cachefuse.store.features import JOURNAL, Features
from cachefuse.store.format import FEATURE_DTYPES, MAX_METADATA, rewrite_lines
from cachefuse.store.lock import only_writer
from cachefuse.store.rows import Rows
from cachefuse.store.store import FeatureStore
from cachefuse.store.views import block_name, declare_group


@dataclass(frozen=True)
class Damage:
    """A block that is not whole. ``block`` is None for a whole view, an array of the samples, or metadata.

    It is damaged, or ``missing``: rows that were asked for are not computed yet, or must be computed again.
    """

    encoder: str
    modality: str
    view: str
    block: int | None
    reason: str
    missing: bool = False


@dataclass(frozen=True)
class VerifiedView:
    """The finished blocks of a view: counts of NaN, infinite values, and rows of zeros of present samples.

    ``cosine``: mean and minimum of the cosine between quantised and float16 rows, noted when they were written.
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
    """All views of a store, and all that is damaged or missing in it."""

    path: Path
    views: tuple[VerifiedView, ...]
    damage: tuple[Damage, ...]


def verify(store: FeatureStore, *, on_progress: Callable[[int, int], None] = lambda done, total: None) -> Verification:
    """Check that a store holds, undamaged, all that it ever held or was asked for.

    This reads every block: checksums, shard indexes, offsets, NaN and infinite values, rows of zeros. ``on_progress``
    gets the number of blocks done and their total.
    """
    damage = [*_check_samples(store), *_check_groups(store)]
    opened, missing = [], [Damage(*names, "", None, why, missing=True) for names, why in store.lost_features().items()]
    for path in store.feature_paths():
        try:
            if (features := store.open_group(path)) is not None:
                missing += _check_journal(features)
                opened.append(features)
        except CacheError as error:
            damage.append(Damage("", "", str(path.relative_to(store.path)), None, str(error)))
    groups = [(features, view) for features in opened for view in features.views]
    total, done, views = sum(features.n_blocks(view) for features, view in groups), 0, []
    for features, view in groups:
        check = _Check(features, view)
        for block in range(features.n_blocks(view)):
            check.add(block)
            done += 1
            on_progress(done, total)
        views.append(check.result())
        damage += check.damage
    return Verification(store.path, tuple(views), (*damage, *missing))


def repair(
    store: FeatureStore,
    verification: Verification,
    dataset: Dataset,
    *,
    device: str = "auto",
    on_progress: OnProgress = lambda progress: None,
) -> None:
    """Compute only the damaged and missing blocks, from raw data, with the encoders that made the others.

    Raises CacheError where this is impossible: the ids of the samples are damaged, or an encoder has changed.
    """
    with only_writer(store.path):
        store = open_store(store.path, dataset)
        for damage in _check_groups(store):
            declare_group(store.path / damage.view)
        for damage in verification.damage:
            features = store.open_features(damage.encoder, damage.modality) if damage.encoder else None
            if features is not None and not damage.missing:
                _prepare(features, damage)
        groups = [features for path in store.feature_paths() if (features := _open_or_none(store, path)) is not None]
        for features in sorted(groups, key=lambda group: is_derived(group.encoder)):  # derived features come last
            dtypes = {**{name: view.dtype for name, view in features.views.items()}, **features.asked}
            for view, dtype in dtypes.items():
                if not features.is_complete(view):
                    request = open_request(dataset, [features.source], [view], device, None, _feature_dtype(dtype))
                    towers = [(spec, tower) for spec, tower in request.towers if tower.modality == features.modality]
                    # A limit of 1.0: all bad samples are listed already.
                    extract_into(store, replace(request, towers=tuple(towers)), 1.0, on_progress)


def _prepare(features: Features, damage: Damage) -> None:
    """Mark a damaged block as outdated, or write damaged metadata again."""
    if damage.view == JOURNAL:
        rewrite_lines(features.path / JOURNAL)
        return
    features.views[damage.view].declare(features.path, features.n_rows)
    if damage.block is not None:
        features.forget(damage.view, features.rows_of(damage.view, damage.block))


def _open_or_none(store: FeatureStore, path: Path) -> Features | None:
    with suppress(CacheError):  # damaged for good, as the next verification says again
        return store.open_group(path)
    return None


def _feature_dtype(dtype: str) -> str:
    return dtype if dtype in FEATURE_DTYPES else "float16"  # whole numbers ignore it


def _check_journal(features: Features) -> list[Damage]:
    """Return the views of which nothing is written yet, and damaged lines of the journal."""
    names = features.encoder, features.modality
    found = [Damage(*names, view, None, "it is not computed yet", missing=True) for view in features.asked]
    if features.n_damaged_lines:
        found.append(Damage(*names, JOURNAL, None, f"damaged lines: {features.n_damaged_lines:,}"))
    return found


class _Check:
    """Checks one view, block by block."""

    def __init__(self, features: Features, view: str) -> None:
        self.features, self.view = features, view
        self.damage: list[Damage] = []
        self.finished = self.n_bytes = self.nan = self.inf = self.zero = 0
        self._cosines: list[tuple[int, float, float]] = []
        self._present = _present_rows(features)
        self._rows: Rows | None = None  # None if an index is damaged: then each block is opened alone
        whole = [block for block in range(features.n_blocks(view)) if features.is_whole(view, block)]
        with suppress(DamagedBlockError):
            self._rows = features.open_blocks(view, whole)
        for name in features.views[view].arrays:
            self._check_metadata(name, None)

    def add(self, block: int) -> None:
        """Check one block."""
        if (fault := self.features.fault(self.view, block)) is not None:
            self._note(block, fault.reason, missing=not fault.is_damage)
            return
        for name in self.features.views[self.view].arrays if self.features.views[self.view].ragged else ():
            self._check_metadata(f"{name}/{block_name(block)}", block)
        try:
            values = self._read(block)
        except DamagedBlockError as error:
            self._note(block, error.why)
            return
        self._count(block, values)
        self.finished += 1
        written = self.features.written(self.view, block)
        self.n_bytes += sum(size for size, _ in written.files.values()) if written else 0
        if written and written.cosine:
            self._cosines.append((written.rows, *written.cosine))

    def result(self) -> VerifiedView:
        """Return the summary of all checked blocks."""
        cosine = None
        if self._cosines:
            n_rows = sum(n for n, _, _ in self._cosines)
            cosine = (
                sum(n * mean for n, mean, _ in self._cosines) / n_rows,
                min(minimum for *_, minimum in self._cosines),
            )
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
        numbers = self.features.rows_of(self.view, block)
        return rows[numbers.start : numbers.stop]

    def _count(self, block: int, values: np.ndarray | list[np.ndarray]) -> None:
        flat = np.concatenate(values) if isinstance(values, list) else values
        if self.view in NUMBERED:
            n_unknown = int(self.features.views[self.view].unknown(flat).sum())
            if n_unknown:
                self._note(block, f"it holds {n_unknown:,} {self.view} outside the vocabulary")
        else:
            nan, inf = int(np.isnan(flat).sum()), int(np.isinf(flat).sum())
            self.nan, self.inf = self.nan + nan, self.inf + inf
            if nan or inf:
                self._note(block, f"it holds {nan:,} NaN and {inf:,} infinite values")
        rows = self.features.rows_of(self.view, block)
        if isinstance(values, list):  # 0 is a valid id
            empty = np.array([not len(row) if self.view in NUMBERED else not row.any() for row in values])
        else:
            empty = np.asarray(~values.reshape(len(values), -1).any(axis=1))
        self.zero += int((empty & self._present[rows.start : rows.stop]).sum())

    def _check_metadata(self, name: str, block: int | None) -> None:
        try:
            read_bounded(self.features.path / name / "zarr.json", MAX_METADATA)  # no pipe, no device
            zarr.open(self.features.path / name, mode="r", zarr_format=3)
        except Exception as error:  # zarr-python raises many kinds of errors on changed metadata
            self._note(block, f"Zarr cannot read {name}/zarr.json: {str(error) or type(error).__name__}")

    def _note(self, block: int | None, reason: str, *, missing: bool = False) -> None:
        if not any(damage.block == block for damage in self.damage):
            names = self.features.encoder, self.features.modality, self.view
            self.damage.append(Damage(*names, block, reason, missing))


def _check_groups(store: FeatureStore) -> Iterator[Damage]:
    """Check the groups that only hold others; cachefuse does not read them, but other programs do."""
    features = store.path / "features"
    folders = {features, *(path.parent for path in store.feature_paths())} if features.is_dir() else set()
    samples = {path.parents[1] for path in store.path.glob("samples/*/*/zarr.json") if path.parent.name != "c"}
    for folder in sorted(folders | samples):
        try:
            read_bounded(folder / "zarr.json", MAX_METADATA)  # no pipe, no device
            zarr.open_group(folder, mode="r", zarr_format=3)
        except Exception as error:  # zarr-python raises many kinds of errors on changed metadata
            reason = str(error) or type(error).__name__
            yield Damage("", "", str(folder.relative_to(store.path)), None, f"Zarr cannot read its zarr.json: {reason}")


def _check_samples(store: FeatureStore) -> Iterator[Damage]:
    """Check every array of the samples: each chunk has a checksum, and each array needs one row per sample."""
    readable, _ = read_columns(store.path)
    with suppress(CacheError):
        if (lost := store.lost_lines()) is not None:
            yield Damage("", "", f"samples/{BAD_SAMPLES}", None, lost)
    try:
        names = set(read_about(store.path)["columns"])
    except CacheError:
        yield Damage("", "", "samples", None, "its zarr.json cannot be read, or its checksum does not fit")
        names = {*IDENTITY, "split", "target"}
    for name in sorted(names - readable.keys()):
        yield Damage("", "", f"samples/{name}", None, "it cannot be read, or its checksum does not fit")
    lengths = {name: len(values) - name.startswith("items/") for name, values in readable.items()}
    for name, n in sorted(lengths.items()):
        if n != lengths.get("id", n):
            yield Damage("", "", f"samples/{name}", None, f"it has {n:,} rows, but there are {lengths['id']:,} ids")


def _present_rows(features: Features) -> np.ndarray:
    """Return which rows have a sample with this modality; all rows if the samples are damaged."""
    try:
        return features.samples.present_rows(features.modality)
    except CacheError:
        return np.ones(features.n_rows, bool)
