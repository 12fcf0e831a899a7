"""Folds for cross-validation that share out every label evenly."""

import numpy as np

from cachefuse.errors import ConfigError


def stratified_folds(targets: np.ndarray, k: int, seed: int | np.random.Generator) -> np.ndarray:
    """Return each row's fold (N,) int64, from 0 to k - 1, for targets (N, C): any above 0 is a label.

    Iterative stratification: Sechidis, Tsoumakas and Vlahavas, "On the stratification of multi-label data" (2011),
    algorithm 1. The rarest label goes first, each of its rows to the fold that has the fewest of that label, then the
    fewest rows, then any; rows without labels come last. Raises ConfigError unless k is from 2 to N.
    """
    n, classes = targets.shape
    if not 2 <= k <= n:
        raise ConfigError(f"folds must be from 2 to the number of rows, {n}. Got {k} instead.")
    rng = np.random.default_rng(seed)
    targets = targets > 0
    folds = np.full(n, -1)
    sizes = np.zeros(k, np.int64)
    counts = np.zeros((k, classes), np.int64)  # of each label in each fold

    def share_out(rows: np.ndarray, held_out: np.ndarray) -> None:
        # Folds of equal share desire most what they hold least: the counts stand for the paper's c_j.
        for row, lots in zip(rng.permutation(rows), rng.random((len(rows), k)), strict=True):
            fold = np.lexsort((lots, sizes, held_out))[0]
            folds[row] = fold
            sizes[fold] += 1
            counts[fold] += targets[row]

    remaining = targets.sum(axis=0)
    while remaining.any():
        rarest = np.where(remaining > 0, remaining, n + 1).argmin()
        rows = np.flatnonzero(targets[:, rarest] & (folds < 0))
        share_out(rows, counts[:, rarest])
        remaining -= targets[rows].sum(axis=0)
    share_out(np.flatnonzero(folds < 0), sizes)
    return folds
