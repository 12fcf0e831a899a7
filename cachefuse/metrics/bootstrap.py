"""Intervals of metrics by the bootstrap: how much they would differ on other samples of the same kind."""

from collections.abc import Callable, Mapping

import numpy as np

from cachefuse.errors import ConfigError
from cachefuse.metrics.tasks import BoundMetric

CHUNK = 1 << 23  # numbers in the largest array that a bootstrap makes
MAX_TOGETHER = 64  # resamples


def bootstrap_intervals(
    targets: np.ndarray,
    scores: np.ndarray,
    predictions: np.ndarray,
    metrics: Mapping[str, BoundMetric],
    n_resamples: int = 1000,
    seed: int = 0,
    level: float = 0.95,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, tuple[float, float]]:
    """Return the interval (low, high) of each metric by the percentile bootstrap: N rows drawn with replacement.

    ``metrics`` are by name, as ``bind_metrics`` returns them. Every metric sees the same resamples, whichever others
    are asked for. Those in which it is NaN are left out; its interval is NaN if none is left, and with fewer than two
    rows. ``on_progress`` hears of the figures done, of all.

    Repeated rows flatter a ranking: with few positives, recall_at_p90 and, less so, average precision tend to be higher
    on resamples, and the interval may lie above the figure itself.

    Raises ConfigError for a level outside (0, 1) or no resamples, DataError as the metrics do.
    """
    if n_resamples < 1:
        raise ConfigError(f"n_resamples must be at least 1. Got {n_resamples} instead.")
    if not 0 < level < 1:
        raise ConfigError(f"level must lie between 0 and 1. Got {level} instead.")
    n = len(targets)
    if n < 2:
        return dict.fromkeys(metrics, (float("nan"), float("nan")))
    together = min(MAX_TOGETHER, max(1, CHUNK // max(n, int(targets.sum()))))
    intervals = {}
    for i, (name, metric) in enumerate(metrics.items()):
        weighted = metric.weighted(targets, scores, predictions)
        generator = np.random.default_rng(seed)
        figures = np.empty(n_resamples)
        for first in range(0, n_resamples, together):
            part = figures[first : first + together]
            part[:] = weighted(_resamples(n, len(part), generator))
            on_progress(i * n_resamples + first + len(part), len(metrics) * n_resamples)
        defined = figures[~np.isnan(figures)]
        low, high = np.quantile(defined, [(1 - level) / 2, (1 + level) / 2]) if len(defined) else (np.nan, np.nan)
        intervals[name] = float(low), float(high)
    return intervals


def _resamples(n: int, resamples: int, generator: np.random.Generator) -> np.ndarray:
    """Return how often each of n rows is drawn in each of R resamples of n, (n, R) float64."""
    draws = [np.bincount(generator.integers(n, size=n), minlength=n) for _ in range(resamples)]
    return np.stack(draws, axis=1).astype(np.float64)
