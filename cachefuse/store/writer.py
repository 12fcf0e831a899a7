"""Writing a view as a stream: rows go to a shard's temporary file at once, and the journal lists each full block."""

import math
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from types import MappingProxyType, TracebackType
from typing import Self

import numpy as np

from cachefuse.errors import CacheError
from cachefuse.feature_spec import NUMBERED
from cachefuse.files import clear_place, make_folder, write_atomically
from cachefuse.store.features import Features
from cachefuse.store.format import DTYPES, checksum
from cachefuse.store.rows import quantise
from cachefuse.store.shard import ShardWriter
from cachefuse.store.views import View, Written, block_name, declare_shards

Values = Sequence[np.ndarray | None]


class ViewWriter:
    """Takes the missing rows of one view, in order, and finishes each block after its last missing row.

    Existing rows of a block are copied, with the new rows between or after them. Use it as a context manager: an
    unfinished block leaves no file. ``vocabulary`` is the number of ids or columns. ``count_long`` notes texts over the
    limit.
    """

    def __init__(
        self,
        features: Features,
        view: str,
        *,
        ragged: bool,
        dtype: str,
        vocabulary: int = 0,
        count_long: bool = False,
    ) -> None:
        self.features = features
        self.view = view
        self._ragged = ragged
        self._dtype = dtype
        self._vocabulary = vocabulary
        self._count_long = count_long
        self._long: dict[int, int] = {}
        self._unshaped: list[tuple[int, np.ndarray | None]] = []  # bad samples before the first row with a shape
        self._block: _BlockWriter | None = None
        if view in features.views:
            features.views[view].declare(features.path, features.n_rows)

    def add(self, rows: np.ndarray, values: Values, long: Mapping[int, int] = MappingProxyType({})) -> None:
        """Take ``rows``, ascending, with values (D,), (T, D), (T,) of ids or (T, 2) of n-grams each.

        None, for a bad sample, means zeros. ``long`` has the tokens of texts that are longer than the encoder's limit,
        by row.
        Raises CacheError, naming the sample, for values that are not finite in the view's dtype, and for ids or n-grams
        outside the vocabulary.
        """
        self._long |= long
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
        mean_shape = tuple(max(1, round(length)) for length in np.mean(shapes, axis=0).tolist())
        view = self.features.new_view(
            self.view, mean_shape, ragged=self._ragged, dtype=self._dtype, vocabulary=self._vocabulary
        )
        view.declare(self.features.path, self.features.n_rows)
        self.features.begin(view)

    def _add_to(self, block: int, pairs: list[tuple[int, np.ndarray | None]]) -> None:
        if self._block is None:
            self._block = _BlockWriter(self.features, self.features.views[self.view], block)
        self._block.add([row for row, _ in pairs], [value for _, value in pairs])
        if self._block.is_complete:
            rows = self.features.rows_of(self.view, block)
            long = {row: n for row, n in self._long.items() if row in rows}
            self._block.finish(long if self._count_long else None)
            self._long = {row: n for row, n in self._long.items() if row >= rows.stop}
            self._block = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._block is not None:
            self._block.close()


class _BlockWriter:
    """Writes one block: a stream for each of its arrays."""

    def __init__(self, features: Features, view: View, block: int) -> None:
        self.features, self.view, self.block = features, view, block
        self._rows = features.rows_of(view.name, block)
        missing, self._kept = features.missing_and_stored(view.name, block)
        self._new = missing.tolist()
        self._missing, self._n_new = set(self._new), len(missing)
        self._next = self._rows.start
        self._lengths: list[int] = []
        self._cosines: list[np.ndarray] = []
        with ExitStack() as opened:  # closes the first shard if the second fails to open
            self._shards = {
                name: opened.enter_context(ShardWriter(features.path / name / f".{block_name(block)}.partial"))
                for name in view.arrays
            }
            self._open = opened.pop_all()

    @property
    def is_complete(self) -> bool:
        """Whether all missing rows were added."""
        return not self._missing

    def add(self, rows: list[int], values: Values) -> None:
        """Take rows of this block, ascending."""
        start = 0
        for i, row in enumerate(rows):
            if row != self._next + i - start:  # kept rows lie between
                self._append(rows[start:i], values[start:i])
                self._keep(row)
                start = i
        self._append(rows[start:], values[start:])
        self._missing.difference_update(rows)

    def finish(self, long: Mapping[int, int] | None) -> None:
        """Copy the remaining rows, flush every file to disk, and add the block to the journal with its long texts."""
        before = self.features.written(self.view.name, self.block)
        if self._kept is not None and long is not None:
            kept = before.long if before is not None else None
            new = set(self._new)
            long = None if kept is None else {row: n for row, n in kept.items() if row not in new} | dict(long)
        self._keep(self._rows.stop)
        files, paths = {}, self.features.files(self.view.name, self.block)
        for path in paths.values():
            clear_place(path)
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
            offsets_file = paths[self.view.offsets]
            make_folder(offsets_file.parent)
            write_atomically(offsets_file, offsets.astype("<i8").tobytes())
            files[self.view.offsets] = offsets.nbytes, checksum(offsets.astype("<i8"))
        self._open.close()
        written = Written(len(self._rows), files, cosine=self._cosine(), long=long)
        self.features.note_written(self.view.name, self.block, written)

    def close(self) -> None:
        """Remove unfinished files."""
        self._open.close()

    def _cosine(self) -> tuple[float, float] | None:
        """Mean and minimum over all rows of the block: new rows, and kept rows by their entry in the journal."""
        cosines = np.concatenate([*self._cosines, np.empty(0)])
        summaries = [(self._n_new, float(cosines.mean()), float(cosines.min()))] if len(cosines) else []
        written = self.features.written(self.view.name, self.block)
        if self._kept is not None and written is not None and written.cosine is not None:
            summaries.append((len(self._rows) - self._n_new, *written.cosine))
        if not summaries:
            return None
        n_rows = sum(n for n, _, _ in summaries)
        return sum(n * mean for n, mean, _ in summaries) / n_rows, min(minimum for *_, minimum in summaries)

    def _append(self, rows: list[int], values: Values) -> None:
        """Append the next rows, new ones, in the view's dtype."""
        if not rows:
            return
        arrays = [self.view.empty if value is None else value for value in values]
        flat = np.concatenate(arrays) if self.view.ragged else np.stack(arrays)
        numbered = self.view.name in NUMBERED
        if numbered:
            self._check_numbers(rows, arrays)
        dtype = "float16" if self.view.dtype == "int8" else self.view.dtype
        with np.errstate(over="ignore"):
            data = np.ascontiguousarray(flat, dtype=DTYPES[dtype])
        if not numbered and not np.isfinite(data).all():
            raise CacheError(self._not_finite(rows, arrays, dtype))
        self._lengths += [len(array) for array in arrays] if self.view.ragged else []
        self._next = rows[-1] + 1
        if self.view.dtype == "int8":
            quantised, scales = quantise(data)
            self._cosines.append(_cosines(data, quantised))
            self._shards["scales"].append(scales)
            data = quantised
        self._shards[self.view.name].append(data)

    def _keep(self, stop: int) -> None:
        """Copy the stored rows from the next one up to ``stop``."""
        if stop <= self._next:
            return
        assert self._kept is not None, "missing rows come in order, without gaps"
        span = slice(self._next - self._rows.start, stop - self._rows.start)
        if self.view.ragged:
            offsets = self._kept[self.view.offsets][span.start : span.stop + 1]
            self._lengths += np.diff(offsets).tolist()
            span = slice(int(offsets[0]), int(offsets[-1]))
        for name, shard in self._shards.items():
            shard.append(np.ascontiguousarray(self._kept[name][span]))
        self._next = stop

    def _not_finite(self, rows: list[int], values: list[np.ndarray], dtype: str) -> str:
        """Return a message with the first sample whose features cannot be stored, and the reason."""
        with np.errstate(over="ignore"):
            finite = [bool(np.isfinite(value.astype(DTYPES[dtype])).all()) for value in values]
        row, value = rows[finite.index(False)], values[finite.index(False)]
        overflow = bool(np.isfinite(value).all())
        cause = "overflow float16; use --dtype float32" if overflow else "are NaN or infinite; try --device cpu"
        sample = self.features.samples.sample_of(self.features.modality, row)
        return f"{self.features.encoder}: {self.features.modality} {self.view.name} features of sample {sample} {cause}"

    def _check_numbers(self, rows: list[int], values: list[np.ndarray]) -> None:
        """Raise CacheError, naming the sample, for ids or n-grams outside the vocabulary."""
        for row, value in zip(rows, values, strict=True):
            unknown = value[self.view.unknown(value)]
            if len(unknown):
                sample = self.features.samples.sample_of(self.features.modality, row)
                raise CacheError(
                    f"{self.features.encoder}: sample {sample} has {unknown[0]} among its {self.view.name}; "
                    f"the vocabulary has {self.view.vocabulary:,}"
                )


def _cosines(values: np.ndarray, quantised: np.ndarray) -> np.ndarray:
    """Return the cosine of each non-zero row to its quantised values; the scale does not change it."""
    x, y = values.astype(np.float32), quantised.astype(np.float32)
    norms = np.linalg.norm(x, axis=-1) * np.linalg.norm(y, axis=-1)
    cosines: np.ndarray = (x * y).sum(-1) / np.where(norms > 0, norms, 1)
    return cosines[x.any(-1)]
