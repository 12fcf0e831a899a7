"""Folds for cross-validation with every label spread evenly, and the groups of rows that they keep together."""

from collections.abc import Sequence

import numpy as np

from cachefuse.errors import ConfigError


def stratified_folds(targets: np.ndarray, k: int, seed: int | np.random.Generator) -> np.ndarray:
    """Return each row's fold (N,) int64, from 0 to k - 1, for targets (N, C): values above 0 are labels.

    Iterative stratification: Sechidis, Tsoumakas and Vlahavas, "On the stratification of multi-label data" (2011),
    algorithm 1. The rarest label comes first. Each of its rows goes to the fold with the fewest of that label, then the
    fewest rows, then a random one. Rows without labels come last. Raises ConfigError unless k is from 2 to N.
    """
    n, classes = targets.shape
    if not 2 <= k <= n:
        raise ConfigError(f"folds must be from 2 to the number of rows, {n}. Got {k} instead.")
    rng = np.random.default_rng(seed)
    targets = targets > 0
    folds = np.full(n, -1)
    sizes = np.zeros(k, np.int64)
    counts = np.zeros((k, classes), np.int64)  # of each label in each fold

    def distribute(rows: np.ndarray, label_counts: np.ndarray) -> None:
        # For folds of equal size, the largest desired count (the paper's c_j) is the smallest present count.
        for row, lots in zip(rng.permutation(rows), rng.random((len(rows), k)), strict=True):
            fold = np.lexsort((lots, sizes, label_counts))[0]
            folds[row] = fold
            sizes[fold] += 1
            counts[fold] += targets[row]

    remaining = targets.sum(axis=0)
    while remaining.any():
        rarest = np.where(remaining > 0, remaining, n + 1).argmin()
        rows = np.flatnonzero(targets[:, rarest] & (folds < 0))
        distribute(rows, counts[:, rarest])
        remaining -= targets[rows].sum(axis=0)
    distribute(np.flatnonzero(folds < 0), sizes)
    return folds


def join_groups(partitions: Sequence[np.ndarray]) -> np.ndarray:
    """Return the group number of each row (N,) int64: rows that share a number in any of the partitions are together.

    Each partition (N,) has a number per row. Groups are numbered in the order of their first rows.
    """
    rows = np.arange(len(partitions[0]))
    groups = rows
    for partition in partitions:
        _, first, number = np.unique(partition, return_index=True, return_inverse=True)
        groups = link_groups(groups, rows, first[number])
    return groups


def link_groups(groups: np.ndarray, first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Return groups (N,) int64 in which each pair's rows, ``first`` (P,) and ``second`` (P,), are in one group.

    The given ``groups`` (N,) are numbered in the order of their first rows, and so is the result.
    """
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    ends = groups[first], groups[second]
    apart = ends[0] != ends[1]
    if not apart.any():
        return groups
    n = int(groups.max()) + 1
    graph = coo_array((np.ones(apart.sum(), bool), (ends[0][apart], ends[1][apart])), shape=(n, n))
    linked: np.ndarray = connected_components(graph, directed=False)[1].astype(np.int64)[groups]
    return linked
