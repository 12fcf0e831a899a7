"""Exact search: the nearest stored rows by cosine, in one pass over the mapped store, in memory that does not grow."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from cachefuse.cache.rows import Rows
from cachefuse.errors import ConfigError
from cachefuse.losses import TINY_NORM

PIECE = 1024  # rows converted and multiplied at a time: what a processor's cache holds
SPAN = 1 << 16  # rows whose scores are looked through at a time
# How far a product in float16 may be from the cosine: the query's rounding and the result's, 2^-11 each, and a margin.
ROUNDING = 2**-9

Scored = tuple[int, Tensor, Tensor]  # rows seen so far, their numbers (n,) where they may be among the best, cosines


@dataclass(frozen=True)
class Hits:
    """The best rows for each of Q queries, best first: row numbers (Q, k) int64 and cosines (Q, k) float32."""

    rows: np.ndarray
    scores: np.ndarray


class _Best:
    """The k best so far of each query; of equal scores the first row comes first."""

    def __init__(self, n_queries: int, k: int):
        self.k = k
        self.scores = torch.empty(n_queries, 0)
        self.rows = torch.empty(n_queries, 0, dtype=torch.int64)

    def add(self, numbers: Tensor, scores: Tensor) -> None:
        """Take in rows by number (n,), ascending, and their scores (Q, n)."""
        if scores.shape[1] > 4 * self.k:  # what can't be among the best; of those equal to the last all are kept
            least = scores.topk(self.k, dim=1).values[:, -1:]
            near = (scores >= least).any(0)
            numbers, scores = numbers[near], scores[:, near]
        joined = torch.cat([self.scores, scores], dim=1)
        order = joined.sort(dim=1, descending=True, stable=True).indices[:, : self.k]
        self.rows = torch.cat([self.rows, numbers.expand(len(scores), -1)], dim=1).gather(1, order)
        self.scores = joined.gather(1, order)


@torch.inference_mode()
def nearest(
    rows: Rows,
    queries: Tensor,
    k: int,
    *,
    unit: bool = False,
    keep: np.ndarray | None = None,
    on_rows: Callable[[int, int], None] = lambda done, total: None,
) -> Hits:
    """Return the ``k`` rows (N, W) with the highest cosine to each query (Q, W); fewer if there are fewer.

    Every row is compared, and scores are those of float32. ``unit`` says that rows have length 1 already; ``keep`` (N,)
    bool leaves rows out. Raises ConfigError for another width, or a k below 1.
    """
    if k < 1:
        raise ConfigError(f"k must be at least 1. Got {k} instead")
    if queries.ndim != 2 or queries.shape[1] != rows.shape[1]:
        raise ConfigError(f"queries must have shape (Q, {rows.shape[1]}). Got {tuple(queries.shape)} instead")
    queries = torch.nn.functional.normalize(queries.float(), dim=1, eps=TINY_NORM)
    best = _Best(len(queries), min(k, len(rows)))
    kept = None if keep is None else torch.from_numpy(keep)
    half = unit and len(queries) == 1 and rows.dtype == torch.float16
    for seen, numbers, scores in _near(rows, queries, best, kept) if half else _all(rows, queries, unit, kept):
        best.add(numbers, scores)
        on_rows(seen, len(rows))
    n = int(best.scores.isfinite().sum(1).min()) if len(queries) else 0
    return Hits(best.rows[:, :n].numpy(), best.scores[:, :n].numpy())


def _all(rows: Rows, queries: Tensor, unit: bool, keep: Tensor | None) -> Iterator[Scored]:
    """Score every row in float32, converted a piece at a time."""
    converted = torch.empty(PIECE, rows.shape[1])
    scores = torch.empty(SPAN, len(queries))
    for first, parts in _spans(rows, PIECE):
        filled = 0
        for part in parts:
            here = converted[: len(part)].copy_(part)
            out = scores[filled : filled + len(part)]
            torch.mm(here, queries.T, out=out)
            if not unit:
                out.div_(here.norm(dim=1, keepdim=True).clamp_(min=TINY_NORM))
            filled += len(part)
        found = scores[:filled].T  # (Q, n)
        if keep is not None:
            found = found.masked_fill(~keep[first : first + filled], -torch.inf)
        yield first + filled, torch.arange(first, first + filled), found


def _near(rows: Rows, query: Tensor, best: _Best, keep: Tensor | None) -> Iterator[Scored]:
    """Score every row of length 1 in float16, as it lies there; and in float32 those that may be among the best.

    A product in float16 reads half the bytes, and is known to within ``ROUNDING``: whatever is further than that from
    the best is not among them.
    """
    coarse = torch.empty(SPAN, dtype=torch.float16)
    for first, parts in _spans(rows, rows.block_rows):
        filled = 0
        for part in parts:
            torch.mv(part, query[0].half(), out=coarse[filled : filled + len(part)])
            filled += len(part)
        scores = coarse[:filled].float()
        if keep is not None:
            scores = scores.masked_fill_(~keep[first : first + filled], -torch.inf)
        least = float(scores.topk(min(best.k, filled)).values[-1]) - 2 * ROUNDING
        if best.scores.shape[1] == best.k:
            least = max(least, float(best.scores[0, -1]) - ROUNDING)
        numbers = ((scores >= least) & scores.isfinite()).nonzero()[:, 0] + first
        exact = [rows.index_select(0, part).float() @ query[0] for part in numbers.split(PIECE)]
        yield first + filled, numbers, torch.cat([*exact, torch.empty(0)])[None]


def _spans(rows: Rows, piece: int) -> Iterator[tuple[int, list[Tensor]]]:
    """Yield (number of the first row, pieces of rows) of at most ``SPAN`` rows together; nothing is copied."""
    first, parts, n = 0, list[Tensor](), 0
    for start, part in rows.in_order(min(piece, SPAN)):
        if n + len(part) > SPAN:
            yield first, parts
            first, parts, n = start, [], 0
        parts.append(part)
        n += len(part)
    if parts:
        yield first, parts
