"""Writing a view as a stream: rows go to a shard's temporary file as they come, and a full block to the journal."""

import math
from collections.abc import Sequence
from contextlib import ExitStack
from types import TracebackType
from typing import Self

import numpy as np

from cachefuse.errors import CacheError
from cachefuse.feature_spec import IDS
from cachefuse.files import make_folder, write_atomically
from cachefuse.store.features import Features
from cachefuse.store.format import DTYPES, checksum
from cachefuse.store.rows import quantise
from cachefuse.store.shard import ShardWriter
from cachefuse.store.views import View, Written, block_name, declare_shards

Values = Sequence[np.ndarray | None]


class ViewWriter:
    """Takes the missing rows of one view, in order, and finishes each block as its last one comes.

    Rows of a block that are there already are kept: they are copied, and the new ones put between or after them.
    Use it as a context manager: a block that is not finished leaves nothing behind. ``vocabulary`` is that of ids.
    """

    def __init__(self, features: Features, view: str, *, ragged: bool, dtype: str, vocabulary: int = 0) -> None:
        self.features = features
        self.view = view
        self._ragged = ragged
        self._dtype = dtype
        self._vocabulary = vocabulary
        self._unshaped: list[tuple[int, np.ndarray | None]] = []  # rows before the first that shows its width
        self._block: _BlockWriter | None = None
        if view in features.views:
            features.views[view].declare(features.path, features.n_rows)

    def add(self, rows: np.ndarray, values: Values) -> None:
        """Take rows (D,), (T, D), or (T,) of ids by number, ascending; None, for a bad sample, becomes zeros.

        Raises CacheError, naming the sample, for values that are not finite in the view's dtype, and for ids that are
        not of the vocabulary.
        """
        pairs = [*self._unshaped, *zip(rows.tolist(), values, strict=True)]
        if self.view not in self.features.views:
            shapes = [value.shape for _, value in pairs if value is not None]
            if not shapes:
                self._unshaped = pairs
                return
            self._begin(shapes)
        self._unshaped = []
        size = self.features.views[self.view].block_rows
        while pairs:
            block = pairs[0][0] // size
            n = sum(row // size == block for row, _ in pairs)
            self._add_to(block, pairs[:n])
            del pairs[:n]

    def _begin(self, shapes: list[tuple[int, ...]]) -> None:
        mean = tuple(max(1, round(length)) for length in np.mean(shapes, axis=0).tolist())
        view = self.features.new_view(
            self.view, mean, ragged=self._ragged, dtype=self._dtype, vocabulary=self._vocabulary
        )
        view.declare(self.features.path, self.features.n_rows)
        self.features.begin(view)

    def _add_to(self, block: int, pairs: list[tuple[int, np.ndarray | None]]) -> None:
        if self._block is None:
            self._block = _BlockWriter(self.features, self.features.views[self.view], block)
        self._block.add([row for row, _ in pairs], [value for _, value in pairs])
        if self._block.is_complete:
            self._block.finish()
            self._block = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._block is not None:
            self._block.close()


class _BlockWriter:
    """One block on its way to the disk: a stream for each of its arrays."""

    def __init__(self, features: Features, view: View, block: int) -> None:
        self.features, self.view, self.block = features, view, block
        self._rows = features.rows_of(view.name, block)
        missing, self._kept = features.missing_and_stored(view.name, block)
        self._missing, self._n_new = set(missing.tolist()), len(missing)
        self._next = self._rows.start
        self._lengths: list[int] = []
        self._cosines: list[np.ndarray] = []
        with ExitStack() as opened:  # if the second can't be opened, the first is closed
            self._shards = {
                name: opened.enter_context(ShardWriter(features.path / name / f".{block_name(block)}.partial"))
                for name in view.arrays
            }
            self._open = opened.pop_all()

    @property
    def is_complete(self) -> bool:
        """Whether every row that was missing has come."""
        return not self._missing

    def add(self, rows: list[int], values: Values) -> None:
        """Take rows of this block, ascending."""
        start = 0
        for i, row in enumerate(rows):
            if row != self._next + i - start:  # rows that are kept lie between
                self._append(rows[start:i], values[start:i])
                self._keep(row)
                start = i
        self._append(rows[start:], values[start:])
        self._missing.difference_update(rows)

    def finish(self) -> None:
        """Keep the rest, have every file on the disk, and note the block in the journal."""
        self._keep(self._rows.stop)
        files, paths = {}, self.features.files(self.view.name, self.block)
        for name, (shape, dtype) in self.view.arrays.items():
            shard, row_bytes = self._shards[name], math.prod(shape) * dtype.itemsize
            if self.view.ragged:
                folder = self.features.path / name / block_name(self.block)
                declare_shards(folder, shard.n_rows, shard.n_rows, shape, dtype)
            rows = shard.n_rows if self.view.ragged else self.view.block_rows
            files[name] = shard.finish(paths[name], rows, row_bytes), shard.crc
        if self.view.ragged:
            offsets = np.full(self.view.block_rows + 1, sum(self._lengths), np.int64)
            offsets[: len(self._lengths) + 1] = np.cumsum([0, *self._lengths])
            place = paths[self.view.offsets]
            make_folder(place.parent)
            write_atomically(place, offsets.astype("<i8").tobytes())
            files[self.view.offsets] = offsets.nbytes, checksum(offsets.astype("<i8"))
        self._open.close()
        self.features.note_written(self.view.name, self.block, Written(len(self._rows), files, cosine=self._cosine()))

    def close(self) -> None:
        """Remove what was not finished."""
        self._open.close()

    def _cosine(self) -> tuple[float, float] | None:
        """Mean and least over all rows of the block: the new ones, and those that were kept by what the journal has."""
        cosines = np.concatenate([*self._cosines, np.empty(0)])
        parts = [(self._n_new, float(cosines.mean()), float(cosines.min()))] if len(cosines) else []
        written = self.features.written(self.view.name, self.block)
        if self._kept is not None and written is not None and written.cosine is not None:
            parts.append((len(self._rows) - self._n_new, *written.cosine))
        if not parts:
            return None
        rows = sum(n for n, _, _ in parts)
        return sum(n * mean for n, mean, _ in parts) / rows, min(least for *_, least in parts)

    def _append(self, rows: list[int], values: Values) -> None:
        """Append the next rows, computed now, in the dtype they are kept in."""
        if not rows:
            return
        given = [self.view.empty if value is None else value for value in values]
        flat = np.concatenate(given) if self.view.ragged else np.stack(given)
        if self.view.name == IDS:
            self._check_ids(rows, given)
        dtype = "float16" if self.view.dtype == "int8" else self.view.dtype
        with np.errstate(over="ignore"):
            data = np.ascontiguousarray(flat, dtype=DTYPES[dtype])
        if self.view.name != IDS and not np.isfinite(data).all():
            raise CacheError(self._not_finite(rows, given, dtype))
        self._lengths += [len(value) for value in given] if self.view.ragged else []
        self._next = rows[-1] + 1
        if self.view.dtype == "int8":
            quantised, scales = quantise(data)
            self._cosines.append(_cosines(data, quantised))
            self._shards["scales"].append(scales)
            data = quantised
        self._shards[self.view.name].append(data)

    def _keep(self, stop: int) -> None:
        """Append the rows from the next up to ``stop`` as they were."""
        if stop <= self._next:
            return
        assert self._kept is not None, "rows come in order, and none is left out"
        here = slice(self._next - self._rows.start, stop - self._rows.start)
        if self.view.ragged:
            offsets = self._kept[self.view.offsets][here.start : here.stop + 1]
            self._lengths += np.diff(offsets).tolist()
            here = slice(int(offsets[0]), int(offsets[-1]))
        for name, shard in self._shards.items():
            shard.append(np.ascontiguousarray(self._kept[name][here]))
        self._next = stop

    def _not_finite(self, rows: list[int], values: list[np.ndarray], dtype: str) -> str:
        """Say which sample has features that can't be stored, and why."""
        with np.errstate(over="ignore"):
            whole = [bool(np.isfinite(value.astype(DTYPES[dtype])).all()) for value in values]
        row, value = rows[whole.index(False)], values[whole.index(False)]
        overflow = bool(np.isfinite(value).all())
        cause = "overflow float16; use --dtype float32" if overflow else "are NaN or infinite; try --device cpu"
        sample = self.features.samples.sample_of(self.features.modality, row)
        return f"{self.features.encoder}: {self.features.modality} {self.view.name} features of sample {sample} {cause}"

    def _check_ids(self, rows: list[int], values: list[np.ndarray]) -> None:
        """Raise CacheError, naming the sample, for ids that an embedding of the vocabulary has no row for."""
        for row, ids in zip(rows, values, strict=True):
            wrong = ids[(ids < 0) | (ids >= self.view.vocabulary)]
            if len(wrong):
                sample = self.features.samples.sample_of(self.features.modality, row)
                raise CacheError(
                    f"{self.features.encoder}: sample {sample} has the token id {wrong[0]}; "
                    f"the vocabulary has {self.view.vocabulary:,}"
                )


def _cosines(values: np.ndarray, quantised: np.ndarray) -> np.ndarray:
    """Return each row's cosine to its quantised self, of those that are not zero; the scale plays no part in it."""
    x, y = values.astype(np.float32), quantised.astype(np.float32)
    norms = np.linalg.norm(x, axis=-1) * np.linalg.norm(y, axis=-1)
    return ((x * y).sum(-1) / np.where(norms > 0, norms, 1))[x.any(-1)]
