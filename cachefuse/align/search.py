"""Exact search: the nearest stored rows by cosine, in one pass over the mapped store, in memory that does not grow."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from cachefuse.cache.rows import Rows
from cachefuse.errors import ConfigError
from cachefuse.losses import TINY_NORM

PIECE = 1024  # rows converted and multiplied at a time: what a processor's cache holds
MERGE = 1 << 16  # rows whose scores are looked through at a time


@dataclass(frozen=True)
class Hits:
    """The best rows for each of Q queries, best first: row numbers (Q, k) int64 and cosines (Q, k) float32."""

    rows: np.ndarray
    scores: np.ndarray


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

    Every row is compared, in float32. ``unit`` says that rows have length 1 already; ``keep`` (N,) bool leaves rows
    out. Raises ConfigError for another width, or a k below 1.
    """
    if k < 1:
        raise ConfigError(f"k must be at least 1. Got {k} instead")
    if queries.ndim != 2 or queries.shape[1] != rows.shape[1]:
        raise ConfigError(f"queries must have shape (Q, {rows.shape[1]}). Got {tuple(queries.shape)} instead")
    queries = torch.nn.functional.normalize(queries.float(), dim=1, eps=TINY_NORM)
    best_scores = torch.empty(len(queries), 0)
    best_rows = torch.empty(len(queries), 0, dtype=torch.int64)
    converted = torch.empty(PIECE, rows.shape[1])
    scores = torch.empty(MERGE, len(queries))
    first, filled = 0, 0  # the rows [first, first + filled) have scores that are not looked through yet
    keep_rows = None if keep is None else torch.from_numpy(keep)

    def merge() -> None:
        nonlocal best_scores, best_rows, first, filled
        found = scores[:filled].T  # (Q, filled)
        if keep_rows is not None:
            found = found.masked_fill(~keep_rows[first : first + filled], -torch.inf)
        top = found.topk(min(k, filled), dim=1)
        joined = torch.cat([best_scores, top.values], dim=1)
        # Stable, so that of equal scores the first row comes first, however the rows are divided.
        order = joined.sort(dim=1, descending=True, stable=True).indices[:, :k]
        best_rows = torch.cat([best_rows, top.indices + first], dim=1).gather(1, order)
        best_scores = joined.gather(1, order)
        first, filled = first + filled, 0
        on_rows(first, len(rows))

    for _, part in rows.in_order(PIECE):
        if filled + len(part) > MERGE:
            merge()
        here = converted[: len(part)].copy_(part)
        out = scores[filled : filled + len(part)]
        torch.mm(here, queries.T, out=out)
        if not unit:
            out.div_(here.norm(dim=1, keepdim=True).clamp_(min=TINY_NORM))
        filled += len(part)
    if filled:
        merge()
    n = min(k, int(best_scores.isfinite().sum(1).min())) if len(queries) else 0
    return Hits(best_rows[:, :n].numpy(), best_scores[:, :n].numpy())
