"""Token features as sequences: fixed or ragged rows of a store, read in batches padded to the longest row."""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from cachefuse.store.rows import RaggedRows, Rows

CHUNK_TOKENS = 1 << 16  # read into memory at a time
WINDOW = 32  # batches whose rows are sorted by length together


class Tokens:
    """N samples of (T_i, D) tokens, (T_i,) token ids, or (T_i, 2) n-grams: stored rows, or N tensors in memory.

    ``shape`` is (N, D), of ids (N,), of n-grams (N, 2); ``n_tokens`` is the most tokens that a sample has, at least 1.
    Ids and n-grams have a ``vocabulary``, of tokens it is 0.
    """

    device = torch.device("cpu")

    def __init__(self, rows: Rows | Sequence[Tensor], vocabulary: int = 0) -> None:
        self._rows = rows
        if isinstance(rows, RaggedRows):
            self.lengths, token_shape = rows.lengths, rows.shape[1:]
        elif isinstance(rows, Rows):
            self.lengths, token_shape = np.full(len(rows), rows.shape[1], np.int64), rows.shape[2:]
        else:
            self.lengths, token_shape = np.array([len(row) for row in rows], np.int64), rows[0].shape[1:]
        self.n_tokens = int(self.lengths.max(initial=1))
        self.vocabulary = vocabulary
        self.shape: tuple[int, ...] = (len(rows), *token_shape)
        self.ragged = bool((self.lengths != self.n_tokens).any())
        self.block_rows = rows.block_rows if isinstance(rows, Rows) else 1
        self.nbytes = rows.nbytes if isinstance(rows, Rows) else sum(row.nbytes for row in rows)

    def read(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """Return the tokens (B, T, D) of rows ``index`` (B,), and the mask (B, T) of real tokens.

        Ids are (B, T) int64, n-grams (B, T, 2) int64. T is the length of the longest of these rows, and at least 1.
        """
        x, mask = padded(self._rows, index)
        if not x.shape[1]:
            x, mask = x.new_zeros(len(x), 1, *x.shape[2:]), mask.new_zeros(len(x), 1)
        return (x.long() if self.vocabulary else x), mask

    def chunks(self, rows: Tensor) -> Iterator[Tensor]:
        """Yield the real tokens of ``rows`` (n,) in order, in chunks (n_tokens, D) of several rows."""
        for chunk in rows.cpu().split(max(1, CHUNK_TOKENS // self.n_tokens)):
            x, mask = self.read(chunk)
            yield x[mask]

    def to(self, device: torch.device | str) -> "Tokens":
        """Return these tokens themselves: they are large, so that each batch is copied to another device alone."""
        return self


def padded(rows: Rows | Tensor | Sequence[Tensor], index: Tensor) -> tuple[Tensor, Tensor]:
    """Return the tokens (B, T, D), or ids (B, T), of rows ``index`` (B,), and the mask (B, T) of real tokens."""
    if isinstance(rows, RaggedRows):
        return rows.padded(index)
    if isinstance(rows, Rows | Tensor):
        x = rows.index_select(0, index)
        return x, torch.ones(x.shape[:2], dtype=torch.bool)
    chosen = [rows[i] for i in index.tolist()]
    x = pad_sequence(chosen, batch_first=True)
    return x, torch.arange(x.shape[1]) < torch.tensor([[len(row)] for row in chosen])


def length_grouped(order: Tensor, lengths: np.ndarray, size: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Cut shuffled row numbers ``order`` (n,) into batches of rows of similar length (N,), with little padding.

    Rows are sorted by length within windows of ``WINDOW`` batches. The batches of a window come in a random order, and
    each reads its rows in stored order. The number of batches stays the same.
    """
    for window in order.split(WINDOW * size):
        rows = window.cpu()
        batches = rows[torch.from_numpy(lengths)[rows].argsort(stable=True)].split(size)
        for i in torch.randperm(len(batches), generator=generator).tolist():
            yield batches[i].sort().values.to(order.device)
