"""One view's rows, read lazily. Callers see neither blocks nor how values are stored."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cachefuse.store.blocks import Blocks, MappedBlocks

RowKey = int | slice | np.ndarray  # a row's number, a slice, a mask (N,), or numbers
SHUFFLE_BYTES = 256 << 20  # of the blocks whose rows are shuffled together


class Rows:
    """N rows (N, D) or (N, T, D), indexed like an array or, by ``index_select``, like a tensor.

    Quantised rows come back as float16: int8 values times their row's scale. Rows are read lazily. Each block's
    checksum is verified before its first row is returned: CacheError names a damaged block.
    """

    device = torch.device("cpu")

    def __init__(self, values: Blocks, n_rows: int, block_rows: int, scales: Blocks | None = None) -> None:
        self.shape = (n_rows, *values.row_shape)
        self.block_rows = block_rows  # a power of two
        self._block_bits = block_rows.bit_length() - 1
        self._values = values
        self._scales = scales
        self._dtype = values.dtype if scales is None else scales.dtype
        self.dtype: torch.dtype = torch.from_numpy(np.empty(0, self._dtype)).dtype

    def __len__(self) -> int:
        return self.shape[0]

    @property
    def mapped(self) -> bool:
        """Whether the rows are memory-mapped. zarr-python reads other programs' layouts, slower."""
        return isinstance(self._values, MappedBlocks)

    @property
    def nbytes(self) -> int:
        """The bytes that all rows take in memory."""
        return int(np.prod(self.shape)) * self.dtype.itemsize

    def index_select(self, dim: int, index: Tensor, *, out: Tensor | None = None) -> Tensor:
        """Return the rows (B, ...) at ``index``, int64 (B,), in its order; written to ``out`` if given."""
        if dim != 0:
            raise ValueError(f"rows are selected along dimension 0. Got {dim} instead")
        block, row = self._locate(index)
        if self._scales is None:
            return self._values.take(block, row, out)
        return dequantise(self._values.take(block, row), self._scales.take(block, row), out)

    def __getitem__(self, key: RowKey) -> np.ndarray:
        """Return a copy of one row, a slice, the rows where a mask (N,) is true, or rows by number."""
        if isinstance(key, slice) and key.step in (None, 1):
            return self._span(*key.indices(len(self))[:2])
        index = _row_numbers(key, len(self))
        rows = self.index_select(0, torch.from_numpy(np.atleast_1d(index))).numpy()
        return rows if index.ndim else rows[0]

    def shuffled(
        self, batch_size: int, generator: torch.Generator, rows: Tensor | None = None
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield (index (B,), rows (B, ...)) over all rows, or the given ones, in the order of ``block_shuffle``."""
        rows = torch.arange(len(self)) if rows is None else rows
        for index in block_shuffle(rows, self.block_rows, self.blocks_at_once, generator).split(batch_size):
            yield index, self.index_select(0, index)

    def in_order(self, size: int) -> Iterator[tuple[int, Tensor]]:
        """Yield (number of the first row, rows (n, ...)) over all rows: at most ``size`` rows of one block at a time.

        Mapped rows are not copied: do not write to them.
        """
        for start in range(0, len(self), self.block_rows):
            block = start // self.block_rows
            values = self._values.tensor(block)
            scales = None if self._scales is None else self._scales.tensor(block)
            for first in range(0, len(values), size):
                chunk = slice(first, first + size)
                yield start + first, values[chunk] if scales is None else dequantise(values[chunk], scales[chunk])

    @property
    def blocks_at_once(self) -> int:
        """How many blocks to shuffle together: about ``SHUFFLE_BYTES`` of rows."""
        return max(1, SHUFFLE_BYTES * len(self) // max(1, self.nbytes * self.block_rows))

    def to(self, device: torch.device | str) -> "Rows | Tensor":
        """Return these rows themselves for the CPU; for another device a tensor there, copied block by block."""
        if torch.device(device).type == "cpu":
            return self
        copy = torch.empty(self.shape, dtype=self.dtype, device=device)
        for start in range(0, len(self), self.block_rows):
            index = torch.arange(start, min(start + self.block_rows, len(self)))
            copy[start : start + len(index)] = self.index_select(0, index).to(device)
        return copy

    def _locate(self, index: Tensor) -> tuple[np.ndarray, np.ndarray]:
        """Return each row's block and its number in the block, (B,) int64 each."""
        if index.dtype not in (torch.int64, torch.int32):
            raise IndexError(f"row numbers must be int64. Got {index.dtype} instead")
        rows = index.numpy().astype(np.int64, copy=False)  # NumPy takes half of torch's time on so few numbers
        if len(rows):
            low, high = rows.min(), rows.max()
            if low < 0 or high >= len(self):  # the gaps between files are not mapped
                raise IndexError(f"row {low if low < 0 else high} is not one of {len(self):,} rows")
        return rows >> self._block_bits, rows & (self.block_rows - 1)

    def _span(self, start: int, stop: int) -> np.ndarray:
        """Return a copy of the rows [start, stop), block by block."""
        size, copy = self.block_rows, np.empty((max(0, stop - start), *self.shape[1:]), self._dtype)
        for block in range(start // size, -(-stop // size) if stop > start else 0):
            inside = slice(max(0, start - block * size), stop - block * size)
            out = copy[max(0, block * size - start) :][: size - inside.start]
            values = self._values.data(block)[inside]
            if self._scales is None:
                out[:] = values
            else:
                scales = torch.from_numpy(np.array(self._scales.data(block)[inside]))
                dequantise(torch.from_numpy(np.array(values)), scales, torch.from_numpy(out))
        return copy


class RaggedRows(Rows):
    """N rows of (T_i, D) tokens each, or (T_i,) ids: ``shape`` is (N, D), or (N,).

    Indexing returns lists of arrays; ``padded`` returns tensors.
    """

    def __init__(
        self, values: Blocks, offsets: np.ndarray, n_rows: int, block_rows: int, scales: Blocks | None = None
    ) -> None:
        """``offsets`` (n_blocks, block_rows + 1): where each row begins among its block's tokens."""
        super().__init__(values, n_rows, block_rows, scales)
        self._offsets = offsets

    @property
    def lengths(self) -> np.ndarray:
        """The number of tokens of each row, (N,)."""
        return np.diff(self._offsets, axis=1).reshape(-1)[: len(self)]

    @property
    def nbytes(self) -> int:
        return int(self.lengths.sum()) * int(np.prod(self.shape[1:])) * self.dtype.itemsize

    def index_select(self, dim: int, index: Tensor, *, out: Tensor | None = None) -> Tensor:
        raise TypeError("rows differ in their number of tokens; take them with padded() or as a list")

    def padded(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """Return tokens (B, T_max, D), padded with zeros, and the mask (B, T_max) bool of real tokens.

        Ids are (B, T_max) int32. Zero is an id too: only the mask shows padding.
        """
        flat, lengths = self._flat(index)
        mask = torch.arange(int(lengths.max(initial=0))) < torch.from_numpy(lengths)[:, None]
        tokens = torch.zeros(*mask.shape, *self.shape[1:], dtype=self.dtype)
        tokens[mask] = flat
        return tokens, mask

    def __getitem__(self, key: RowKey) -> Any:
        """Return one row's tokens (T_i, D), or a list of such arrays."""
        index = _row_numbers(key, len(self))
        flat, lengths = self._flat(torch.from_numpy(np.atleast_1d(index)))
        rows = [tokens.numpy() for tokens in flat.split(lengths.tolist())]
        return rows if index.ndim else rows[0]

    def shuffled(
        self, batch_size: int, generator: torch.Generator, rows: Tensor | None = None
    ) -> Iterator[tuple[Tensor, Any]]:
        """Yield (index (B,), (tokens (B, T_max, D), mask (B, T_max))), block-shuffled."""
        rows = torch.arange(len(self)) if rows is None else rows
        for index in block_shuffle(rows, self.block_rows, self.blocks_at_once, generator).split(batch_size):
            yield index, self.padded(index)

    def _flat(self, index: Tensor) -> tuple[Tensor, np.ndarray]:
        """Return the tokens of some rows one after the other, (sum T_i, D), and the rows' lengths (B,)."""
        block, row = self._locate(index)
        self._values.check(block)  # offsets of a missing block are meaningless
        begin = self._offsets[block, row]
        lengths = self._offsets[block, row + 1] - begin
        first = lengths.cumsum() - lengths  # where each row's tokens begin in the result
        block = block.repeat(lengths)
        position = np.arange(len(block)) + (begin - first).repeat(lengths)
        values = self._values.take(block, position)
        return (values if self._scales is None else dequantise(values, self._scales.take(block, position))), lengths


class JoinedRows:
    """The features of several encoders, concatenated: rows (N, D_1) and (N, D_2) as (N, D_1 + D_2)."""

    device = torch.device("cpu")

    def __init__(self, encoder_rows: Sequence[Rows]) -> None:
        self.encoder_rows = encoder_rows
        self.shape = (len(encoder_rows[0]), sum(rows.shape[1] for rows in encoder_rows))
        self.block_rows = encoder_rows[0].block_rows
        self.nbytes = sum(rows.nbytes for rows in encoder_rows)

    def index_select(self, dim: int, index: Tensor) -> Tensor:
        """Return the rows (B, D) at ``index`` (B,)."""
        return torch.cat([rows.index_select(dim, index) for rows in self.encoder_rows], dim=1)

    def to(self, device: torch.device | str) -> "JoinedRows | Tensor":
        """Return these rows themselves for the CPU; for another device a tensor there."""
        if torch.device(device).type == "cpu":
            return self
        return torch.cat([torch.as_tensor(rows.to(device)) for rows in self.encoder_rows], dim=1)


class FlatTokens:
    """The tokens of each sample, concatenated: rows (N, T, D), or ragged ones, as (N, T * D), padded with zeros.

    T is the longest sample's number of tokens, or ``n_tokens``: later tokens are dropped.
    """

    device = torch.device("cpu")

    def __init__(self, rows: Rows, n_tokens: int = 0) -> None:
        self._rows = rows
        longest = int(rows.lengths.max(initial=1)) if isinstance(rows, RaggedRows) else rows.shape[1]
        self.n_tokens = n_tokens or longest
        self.shape = (len(rows), self.n_tokens * rows.shape[-1])
        self.block_rows = rows.block_rows
        self.nbytes = self.shape[0] * self.shape[1] * rows.dtype.itemsize

    def index_select(self, dim: int, index: Tensor) -> Tensor:
        """Return the rows (B, T * D) at ``index`` (B,)."""
        if isinstance(self._rows, RaggedRows):
            tokens = self._rows.padded(index)[0]  # (B, T', D)
        else:
            tokens = self._rows.index_select(dim, index)
        missing = self.n_tokens - tokens.shape[1]  # padded where there are too few, cut where there are too many
        return torch.nn.functional.pad(tokens, (0, 0, 0, missing)).flatten(1)

    def to(self, device: torch.device | str) -> "FlatTokens":
        """Return these rows themselves: tokens are large, so that each batch is copied to another device alone."""
        return self


FeatureRows = Tensor | Rows | JoinedRows | FlatTokens  # (N, D), with index_select along the rows


def block_shuffle(rows: Tensor, block_rows: int, blocks_at_once: int, generator: torch.Generator) -> Tensor:
    """Return row numbers (n,) in a random order that reads few blocks at a time.

    Blocks come in a random order; the rows of ``blocks_at_once`` blocks are shuffled together. So data larger than
    memory is read once, in large pieces. A full shuffle would read a page from disk for each row.
    """
    if not len(rows):
        return rows
    rows = rows[torch.randperm(len(rows), generator=generator)]
    order = torch.randperm(int(rows.max()) // block_rows + 1, generator=generator)  # position of each block
    return rows[(order[rows // block_rows] // blocks_at_once).argsort(stable=True)]


def quantise(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return int8 values (..., D) and each row's float16 scale (...). Their product approximates ``values``."""
    exact = np.abs(values).max(axis=-1, initial=0).astype(np.float32) / 127
    scales = exact.astype("<f2")
    scales = np.where(scales < exact, np.nextafter(scales, np.float16(np.inf)), scales)  # so that nothing is clipped
    scales = np.minimum(scales, np.float16(65504 / 127 - 0.5))  # so that 127 * scale stays finite
    divisor = np.where(scales > 0, scales, 1).astype(np.float32)[..., None]
    return np.rint(values / divisor).astype("|i1"), scales


def dequantise(values: Tensor, scales: Tensor, out: Tensor | None = None) -> Tensor:
    return torch.mul(values.to(scales.dtype), scales.unsqueeze(-1), out=out)


def _row_numbers(key: RowKey, n_rows: int) -> np.ndarray:
    """Return a key's row numbers: () for one row, else (n,). Negative numbers count from the end."""
    if isinstance(key, slice):
        return np.arange(*key.indices(n_rows))
    if isinstance(key, tuple):
        raise IndexError(f"rows have one number each; index the result for parts of a row. Got {key} instead")
    key = np.asarray(key)
    if key.dtype == bool:
        if key.shape != (n_rows,):
            raise IndexError(f"a mask must have shape ({n_rows},). Got {key.shape} instead")
        return np.flatnonzero(key)
    if key.size and key.dtype.kind not in "iu":
        raise IndexError(f"row numbers must be integers. Got {key.dtype} instead")
    key = key.astype(np.int64)
    wrong = (key < -n_rows) | (key >= n_rows)
    if wrong.any():
        raise IndexError(f"row {key[wrong].flat[0]} is not one of {n_rows:,} rows")
    return np.where(key < 0, key + n_rows, key)
