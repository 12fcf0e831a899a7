"""Retrieval metrics: ranks of the right items, recall at k, the modality gap."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from cachefuse.threads import idle_threads

BLOCK_FLOATS = 1 << 24  # scores in memory at a time


@dataclass(frozen=True)
class Embedded:
    """Unit vectors (n, W) of items, and the sample of each item (n,).

    ``items`` (n,) numbers the items if both sides have the same ones: an item is then no answer to itself.
    """

    vectors: Tensor
    owners: np.ndarray
    items: np.ndarray | None = None


@torch.inference_mode()
@idle_threads()
def best_ranks(queries: Embedded, gallery: Embedded) -> np.ndarray:
    """Return the rank (q,) of the first item of each query's own sample; 1 is the best.

    Items of other samples with the same score, or with NaN, rank before it. So a model whose vectors are all equal or
    NaN gets the worst ranks. Scores are compared in float64: in float32 the scores of equal vectors may differ in the
    last digit. If both sides have the same items, the query's item is left out, unless its sample has no other.
    """
    ranks = []
    vectors, owner = gallery.vectors.double().T, torch.from_numpy(gallery.owners)
    tolerance = (len(vectors) + 8) * 2**-53  # scores of equal vectors differ by at most this
    step = max(1, BLOCK_FLOATS // max(1, len(owner)))
    for start in range(0, len(queries.owners), step):
        block = slice(start, start + step)
        scores = queries.vectors[block].double() @ vectors  # (b, g)
        right = torch.from_numpy(queries.owners[block])[:, None] == owner
        if queries.items is not None and gallery.items is not None:
            itself = torch.from_numpy(queries.items[block])[:, None] == torch.from_numpy(gallery.items)
            itself &= right.sum(1, keepdim=True) > 1
            scores[itself] = -torch.inf
        best = scores.masked_fill(~right, -torch.inf).amax(1, keepdim=True)
        ranks.append(1 + (~right & ~(scores < best - tolerance)).sum(1))
    return torch.cat(ranks).numpy() if ranks else np.zeros(0, np.int64)


def recall_at(ranks: np.ndarray, k: int) -> float:
    """Return the share of queries with an item of their own sample among the first k; NaN without queries."""
    return float((ranks <= k).mean()) if len(ranks) else float("nan")


def chance_at(k: int, queries: Embedded, gallery: Embedded) -> float:
    """Return the recall at k of a random order: 1 - (g - r choose k) / (g choose k), for r right items among g."""
    n_queries = len(queries.owners)
    if not n_queries:
        return float("nan")
    counts = np.bincount(gallery.owners, minlength=int(queries.owners.max()) + 1)
    n_right, total = counts[queries.owners].astype(np.float64), np.full(n_queries, float(len(gallery.owners)))
    if queries.items is not None:
        without_itself = (n_right > 1).astype(np.float64)
        n_right, total = n_right - without_itself, total - without_itself
    missed = np.ones(n_queries)
    for i in range(k):
        missed *= np.clip((total - n_right - i) / np.maximum(total - i, 1), 0, 1)
    return float(1 - missed.mean())


def modality_gap(x: Tensor, y: Tensor) -> float:
    """Return the distance between the means of unit vectors (n, W) and (m, W) (arXiv 2203.02053, section 2)."""
    return float((x.double().mean(0) - y.double().mean(0)).norm())
