"""Exact search: the nearest stored rows by cosine, in one pass over the mapped store, in constant memory.

Every row is first compared in float16 or float32, with a known error bound. Rows that may be among the best within
that bound are compared again in float64. So the order is that of the exact cosines on any processor.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from torch import Tensor

from cachefuse.errors import ConfigError
from cachefuse.nn.losses import TINY_NORM
from cachefuse.store.rows import Rows
from cachefuse.threads import idle_threads

PIECE = 1024  # rows converted and multiplied at a time: they fit a processor's cache
SPAN = 1 << 16  # rows whose scores are compared with the best at a time
# The error bound of a product in float16: the rounding of the query and of the result, 2^-11 each, and a margin.
ROUNDING = 2**-9

Coarse = tuple[int, Tensor]  # the number of the first row, and scores (Q, n) within an error bound


@dataclass(frozen=True)
class Hits:
    """The best rows for each of Q queries, best first: row numbers (Q, k) int64 and cosines (Q, k) float32."""

    rows: np.ndarray
    scores: np.ndarray


class _Best:
    """The k best rows so far of each query (Q, W) float64; of equal scores the first row comes first."""

    def __init__(self, rows: Rows, queries: Tensor, k: int, unit: bool, bound: float):
        self.source, self.queries, self.k, self.unit, self.bound = rows, queries, k, unit, bound
        self.scores = torch.full((len(queries), k), -torch.inf, dtype=torch.float64)
        self.rows = torch.full((len(queries), k), -1)

    def add(self, first: int, coarse: Tensor) -> None:
        """Add rows from number ``first`` on; ``coarse`` (Q, n) are their scores within ``bound``.

        -inf leaves a row out; inf means that its score is unknown.
        """
        unsure = coarse == torch.inf
        known = coarse.masked_fill(unsure, -torch.inf)
        least = self.scores[:, -1] - self.bound
        if known.shape[1] > self.k:
            least = least.maximum(known.topk(self.k, dim=1).values[:, -1].double() - 2 * self.bound)
        near = (known >= least.float().nextafter(torch.tensor(-torch.inf, dtype=torch.float32))[:, None]) & (
            known > -torch.inf
        ) | unsure
        query, places = near.nonzero(as_tuple=True)  # (P,) pairs of a query and a row, in the rows' order
        if not len(query):
            return
        exact = torch.cat(
            [self._score(*pairs) for pairs in zip(query.split(PIECE), (places + first).split(PIECE), strict=True)]
        )
        counts = near.sum(1)
        column = torch.arange(len(query)) - (counts.cumsum(0) - counts)[query]
        shape = len(self.queries), int(counts.max())
        scores = exact.new_full(shape, -torch.inf).index_put_((query, column), exact)
        numbers = places.new_full(shape, -1).index_put_((query, column), places + first)
        joined = torch.cat([self.scores, scores], dim=1)
        order = joined.sort(dim=1, descending=True, stable=True).indices[:, : self.k]
        self.rows = torch.cat([self.rows, numbers], dim=1).gather(1, order)
        self.scores = joined.gather(1, order)

    def _score(self, query: Tensor, numbers: Tensor) -> Tensor:
        """Return the cosines (P,) float64 of queries and rows, both by number (P,).

        The cosine of a row that is not finite is -inf.
        """
        x = self.source.index_select(0, numbers).double()
        scores = _sum(x * self.queries[query])
        if not self.unit:
            scores = scores / _sum(x * x).sqrt().clamp(min=TINY_NORM)
        return scores.masked_fill(~scores.isfinite(), -torch.inf)


def _sum(x: Tensor) -> Tensor:
    """Return the sum of each row of x (P, W), by halves: equal rows have equal sums on any processor."""
    while x.shape[1] > 1:
        half = x.shape[1] // 2
        added = x[:, :half] + x[:, half : 2 * half]
        x = added if x.shape[1] % 2 == 0 else torch.cat([added, x[:, -1:]], dim=1)
    return x[:, 0]


@torch.inference_mode()
@idle_threads()
def nearest(
    rows: Rows,
    queries: Tensor,
    k: int,
    *,
    unit: bool = False,
    keep: np.ndarray | None = None,
    on_rows: Callable[[int, int], None] = lambda done, total: None,
) -> Hits:
    """Return the ``k`` rows (N, W) with the highest cosine to each query (Q, W), or fewer if there are fewer.

    Every row is compared; the order is that of the cosines in float64. ``unit`` means that all rows have length 1.
    ``keep`` (N,) bool selects the rows to search; rows that are not finite are left out. Raises ConfigError for another
    width, queries that are not finite, a ``keep`` of another shape or dtype, or a k below 1.
    """
    if k < 1:
        raise ConfigError(f"k must be at least 1. Got {k} instead")
    if queries.ndim != 2 or queries.shape[1] != rows.shape[1]:
        raise ConfigError(f"queries must have shape (Q, {rows.shape[1]}). Got {tuple(queries.shape)} instead")
    queries = queries.double()
    if not queries.isfinite().all():
        raise ConfigError("queries must be finite. Got NaN or infinity instead")
    if keep is not None and (keep.dtype != bool or keep.shape != (len(rows),)):
        raise ConfigError(f"keep must be ({len(rows)},) bool. Got {keep.shape} {keep.dtype} instead")
    queries = queries / queries.abs().amax(1, keepdim=True).clamp(min=torch.finfo(queries.dtype).tiny)
    queries = torch.nn.functional.normalize(queries, dim=1, eps=TINY_NORM)
    half = unit and len(queries) == 1 and rows.dtype == torch.float16 and _float16_adds_up()
    best = _Best(rows, queries, min(k, len(rows)), unit, ROUNDING if half else _float32_bound(rows.shape[1]))
    kept = None if keep is None else torch.from_numpy(keep)
    for first, coarse in _in_float16(rows, queries) if half else _in_float32(rows, queries, unit):
        seen = first + coarse.shape[1]
        coarse = coarse.nan_to_num(nan=torch.inf, posinf=torch.inf, neginf=torch.inf)
        if kept is not None:
            coarse = coarse.masked_fill(~kept[first:seen], -torch.inf)
        best.add(first, coarse)
        on_rows(seen, len(rows))
    n = int(best.scores.isfinite().sum(1).min()) if len(queries) else 0
    return Hits(best.rows[:, :n].numpy(), best.scores[:, :n].float().numpy())


def _float32_bound(width: int) -> float:
    """Return the error bound of the product of two unit rows in float32, added up in any order."""
    return (width + 8) * 2**-24


@cache
def _float16_adds_up() -> bool:
    """Whether this processor adds up products of float16 in float32, as ``ROUNDING`` assumes.

    In float16 the sum below would stop at 0.5.
    """
    x = torch.full((1, 4096), 2**-6, dtype=torch.float16)
    return abs(float(torch.mv(x, x[0])) - 1) < ROUNDING


def _in_float32(rows: Rows, queries: Tensor, unit: bool) -> Iterator[Coarse]:
    """Yield scores of every row in float32, converted a piece at a time."""
    queries = queries.float()
    converted = torch.empty(PIECE, rows.shape[1], dtype=torch.float32)
    scores = torch.empty(SPAN, len(queries), dtype=torch.float32)
    for first, blocks in _spans(rows, PIECE):
        filled = 0
        for block in blocks:
            x = converted[: len(block)].copy_(block)
            out = scores[filled : filled + len(block)]
            torch.mm(x, queries.T, out=out)
            if not unit:
                lengths = torch.linalg.vector_norm(x, dim=1, keepdim=True, dtype=torch.float64)
                out.copy_(out / lengths.clamp_(min=TINY_NORM))  # float32 lengths of large values have no error bound
            filled += len(block)
        yield first, scores[:filled].T


def _in_float16(rows: Rows, query: Tensor) -> Iterator[Coarse]:
    """Yield scores of every stored float16 row for one query, without conversion, which reads half the bytes."""
    half = query[0].half()
    coarse = torch.empty(SPAN, dtype=torch.float16)
    for first, blocks in _spans(rows, rows.block_rows):
        filled = 0
        for block in blocks:
            torch.mv(block, half, out=coarse[filled : filled + len(block)])
            filled += len(block)
        yield first, coarse[None, :filled].float()


def _spans(rows: Rows, piece: int) -> Iterator[tuple[int, list[Tensor]]]:
    """Yield (number of the first row, blocks of rows) with at most ``SPAN`` rows in total; nothing is copied."""
    first, blocks, n = 0, list[Tensor](), 0
    for start, block in rows.in_order(min(piece, SPAN)):
        if n + len(block) > SPAN:
            yield first, blocks
            first, blocks, n = start, [], 0
        blocks.append(block)
        n += len(block)
    if blocks:
        yield first, blocks
