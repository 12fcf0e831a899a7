"""TF-IDF of hashed n-grams: rows of (column, count) to weights of length 1."""

from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from scipy.sparse import csr_array

BLOCKS = 2  # of equal numbers of columns: words, characters
LEAST = 2  # training rows that have a column: weights of rarer ones cannot help other rows


class TfIdf(nn.Module):
    """(1 + log count) * idf of each n-gram, with length 1 / sqrt(2) in each of the two blocks, words and characters.

    idf is log((1 + n) / (1 + df)) + 1, as in scikit-learn's ``TfidfTransformer``. The columns are those that at least
    ``LEAST`` training rows have; others only count for the length, as if one row had them. N-grams are (B, T, 2) with a
    mask (B, T), as ``Tokens`` reads them.
    """

    columns: Tensor
    idf: Tensor
    rare: Tensor

    def __init__(self, vocabulary: int, n_columns: int = 0):
        super().__init__()
        self.vocabulary = vocabulary
        self.register_buffer("columns", torch.zeros(n_columns, dtype=torch.int64))  # sorted
        self.register_buffer("idf", torch.zeros(n_columns))
        self.register_buffer("rare", torch.zeros(()))  # the idf of other columns

    def fit(self, pieces: Iterable[tuple[Tensor, Tensor]]) -> "TfIdf":
        """Choose the columns, and compute their idf, from the n-grams of training rows; return self."""
        df, n = torch.zeros(self.vocabulary, dtype=torch.int64), 0
        for x, mask in pieces:
            df += torch.bincount(x[..., 0][mask].cpu().long(), minlength=self.vocabulary)
            n += int(mask.any(1).sum())
        columns = torch.nonzero(df >= LEAST).flatten()
        idf = ((1 + n) / (1 + df[columns].double())).log() + 1
        self.columns, self.idf = columns.to(self.columns.device), idf.to(self.idf)
        self.rare.fill_(float(np.log((1 + n) / 2)) + 1)
        return self

    def forward(self, x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Return places in ``columns`` and weights, (B, T) each. Other columns, and padding, have weight 0."""
        column = x[..., 0].long().contiguous()
        if not len(self.columns):
            return torch.zeros_like(column), torch.zeros(column.shape, device=x.device)
        place = torch.searchsorted(self.columns, column).clamp(max=len(self.columns) - 1)
        known = mask & (self.columns[place] == column)
        weight = (1 + x[..., 1].clamp(min=1).log()) * torch.where(known, self.idf[place], self.rare)
        words = column < self.vocabulary // BLOCKS
        scaled = torch.zeros_like(weight)
        for block in (words & mask, ~words & mask):
            within = torch.where(block, weight, 0)
            scaled += within / (within.norm(dim=1, keepdim=True) * BLOCKS**0.5).clamp(min=1e-12)
        return place, torch.where(known, scaled, 0)

    def matrix(self, pieces: Iterable[tuple[Tensor, Tensor]]) -> "csr_array":
        """Return the weights of N rows as a sparse matrix (N, V), float32, of the V columns."""
        from scipy.sparse import csr_array

        data, indices, lengths = [], [], [np.zeros(1, np.int64)]
        for x, mask in pieces:
            place, weight = (y.cpu() for y in self(x, mask))
            data.append(weight[weight > 0].numpy())
            indices.append(place[weight > 0].numpy())
            lengths.append((weight > 0).sum(1).numpy())
        ends = np.concatenate(lengths).cumsum()
        return csr_array((np.concatenate(data), np.concatenate(indices), ends), (len(ends) - 1, len(self.columns)))
