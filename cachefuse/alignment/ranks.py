"""Who finds whom: ranks of the right items among all, recall at k, the modality gap."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from cachefuse.threads import idle_threads

BLOCK_FLOATS = 1 << 24  # of scores at a time


@dataclass(frozen=True)
class Embedded:
    """Unit vectors (n, W) of items, and the sample that each belongs to (n,).

    ``items`` (n,) numbers them where both sides are of the same items: one is then no answer to itself.
    """

    vectors: Tensor
    owners: np.ndarray
    items: np.ndarray | None = None


@torch.inference_mode()
@idle_threads()
def best_ranks(queries: Embedded, gallery: Embedded) -> np.ndarray:
    """Return the rank (q,) at which each query finds the first item of its own sample; 1 is the best.

    Items of other samples with the same score, or with none (NaN), come before it, so that vectors that are all alike,
    or broken, find nothing. What is the same is decided in float64: in float32 the scores of equal vectors may differ
    in their last digit, by their places in the product. Where both sides are of the same items, an item itself is left
    out, unless its sample has no other.
    """
    ranks = []
    vectors, owner = gallery.vectors.double().T, torch.from_numpy(gallery.owners)
    same = (len(vectors) + 8) * 2**-53  # as far as scores of equal vectors may be apart
    step = max(1, BLOCK_FLOATS // max(1, len(owner)))
    for start in range(0, len(queries.owners), step):
        here = slice(start, start + step)
        scores = queries.vectors[here].double() @ vectors  # (b, g)
        own = torch.from_numpy(queries.owners[here])[:, None] == owner
        if queries.items is not None and gallery.items is not None:
            itself = torch.from_numpy(queries.items[here])[:, None] == torch.from_numpy(gallery.items)
            itself &= own.sum(1, keepdim=True) > 1
            scores[itself] = -torch.inf
        best = scores.masked_fill(~own, -torch.inf).amax(1, keepdim=True)
        ranks.append(1 + (~own & ~(scores < best - same)).sum(1))
    return torch.cat(ranks).numpy() if ranks else np.zeros(0, np.int64)


def recall_at(ranks: np.ndarray, k: int) -> float:
    """Return the share of queries that find an item of their own among the first k; NaN without queries."""
    return float((ranks <= k).mean()) if len(ranks) else float("nan")


def chance_at(k: int, queries: Embedded, gallery: Embedded) -> float:
    """Return the recall at k that a random order gives: 1 - (g - o choose k) / (g choose k), for o of g items."""
    n_queries = len(queries.owners)
    if not n_queries:
        return float("nan")
    counts = np.bincount(gallery.owners, minlength=int(queries.owners.max()) + 1)
    own, total = counts[queries.owners].astype(np.float64), np.full(n_queries, float(len(gallery.owners)))
    if queries.items is not None:
        without_itself = (own > 1).astype(np.float64)
        own, total = own - without_itself, total - without_itself
    missed = np.ones(n_queries)
    for i in range(k):
        missed *= np.clip((total - own - i) / np.maximum(total - i, 1), 0, 1)
    return float(1 - missed.mean())


def modality_gap(x: Tensor, y: Tensor) -> float:
    """Return the distance of the means of two sets of unit vectors (n, W) and (m, W) (arXiv 2203.02053, section 2)."""
    return float((x.double().mean(0) - y.double().mean(0)).norm())
