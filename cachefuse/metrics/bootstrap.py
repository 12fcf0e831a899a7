"""Bootstrap intervals of metrics: how much they would vary on other samples of the same kind."""

from collections.abc import Callable, Mapping

import numpy as np

from cachefuse.errors import ConfigError
from cachefuse.metrics.tasks import BoundMetric

CHUNK = 1 << 23  # numbers in the largest array of a bootstrap
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

    ``metrics`` is what ``bind_metrics`` returns. Every metric sees the same resamples, independently of the others.
    Resamples in which a metric is NaN are left out. Its interval is NaN if none is left, or with fewer than two rows.
    ``on_progress`` gets the number of figures done and their total.

    Repeated rows make rankings look better. With few positives, recall_at_p90 and, less so, average precision tend to
    be higher on resamples: the interval may lie above the metric itself.

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
            chunk = figures[first : first + together]
            chunk[:] = weighted(_resamples(n, len(chunk), generator))
            on_progress(i * n_resamples + first + len(chunk), len(metrics) * n_resamples)
        defined = figures[~np.isnan(figures)]
        low, high = np.quantile(defined, [(1 - level) / 2, (1 + level) / 2]) if len(defined) else (np.nan, np.nan)
        intervals[name] = float(low), float(high)
    return intervals


def _resamples(n: int, resamples: int, generator: np.random.Generator) -> np.ndarray:
    """Return how often each of n rows is drawn in each of R resamples, (n, R) float64."""
    draws = [np.bincount(generator.integers(n, size=n), minlength=n) for _ in range(resamples)]
    return np.stack(draws, axis=1).astype(np.float64)
