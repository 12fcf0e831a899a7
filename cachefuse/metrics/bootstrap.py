"""Bootstrap intervals of metrics: how much they would vary on other samples of the same kind."""

from collections.abc import Callable, Mapping

import numpy as np

from cachefuse.errors import ConfigError
from cachefuse.metrics.base import Weighted
from cachefuse.metrics.tasks import BoundMetric

CHUNK = 1 << 23  # numbers in the largest array of a bootstrap
MAX_TOGETHER = 64  # resamples
Progress = Callable[[int, int], None]  # gets the number of figures done, and their total


def bootstrap_intervals(
    targets: np.ndarray,
    scores: np.ndarray,
    predictions: np.ndarray,
    metrics: Mapping[str, BoundMetric],
    n_resamples: int = 1000,
    seed: int = 0,
    level: float = 0.95,
    on_progress: Progress = lambda done, total: None,
    groups: np.ndarray | None = None,
) -> dict[str, tuple[float, float]]:
    """Return the interval (low, high) of each metric by the percentile bootstrap: N rows drawn with replacement.

    ``metrics`` is what ``bind_metrics`` returns. Every metric sees the same resamples, independently of the others.
    Resamples in which a metric is NaN are left out. Its interval is NaN if none is left, or with fewer than two rows.
    ``on_progress`` gets the number of figures done and their total. ``groups`` (N,) are drawn whole: see ``resample``.

    Repeated rows make rankings look better. With few positives, recall_at_p90 and, less so, average precision tend to
    be higher on resamples. An interval that would lie beside the metric itself is extended to it.

    Raises ConfigError for a level outside (0, 1) or no resamples, DataError as the metrics do.
    """
    check_level(n_resamples, level)
    if len(targets) < 2:
        return dict.fromkeys(metrics, (float("nan"), float("nan")))
    together, total = at_once(targets), len(metrics) * n_resamples
    intervals = {}
    for i, (name, metric) in enumerate(metrics.items()):
        figures = resample(
            metric.weighted(targets, scores, predictions),
            len(targets),
            n_resamples,
            seed,
            together,
            groups,
            counted_from(on_progress, i * n_resamples, total),
        )
        intervals[name] = interval(metric(targets, scores, predictions), figures, level)
    return intervals


def counted_from(on_progress: Progress, begun: int, total: int) -> Callable[[int], None]:
    """Return what counts the figures of one metric, after ``begun`` of the ``total`` were done before."""
    return lambda done: on_progress(begun + done, total)


def check_level(n_resamples: int, level: float) -> None:
    """Raise ConfigError for a level outside (0, 1) or no resamples."""
    if n_resamples < 1:
        raise ConfigError(f"n_resamples must be at least 1. Got {n_resamples} instead.")
    if not 0 < level < 1:
        raise ConfigError(f"level must lie between 0 and 1. Got {level} instead.")


def at_once(targets: np.ndarray) -> int:
    """Return how many resamples of targets (N, C) fit in memory at once."""
    return min(MAX_TOGETHER, max(1, CHUNK // max(len(targets), int(targets.sum()))))


def resample(
    weighted: Weighted,
    n: int,
    n_resamples: int,
    seed: int,
    together: int,
    groups: np.ndarray | None = None,
    on_progress: Callable[[int], None] = lambda done: None,
) -> np.ndarray:
    """Return the figures of R resamples of n rows, (..., R); the same seed gives the same resamples.

    ``weighted`` turns weights (n, r) into figures (..., r). Rows of one group, such as questions about one image, are
    not independent. With ``groups`` (n,), groups are drawn with replacement, each with all its rows: the cluster
    bootstrap (Davison and Hinkley, "Bootstrap Methods and their Application", 1997, section 3.8).
    """
    generator = np.random.default_rng(seed)
    group_of = None if groups is None else np.unique(groups, return_inverse=True)[1]
    n_units = n if group_of is None else int(group_of.max()) + 1
    pieces = []
    for first in range(0, n_resamples, together):
        weights = _draw(n_units, min(together, n_resamples - first), generator)
        pieces.append(weighted(weights if group_of is None else weights[group_of]))
        on_progress(first + weights.shape[1])
    return np.concatenate(pieces, axis=-1)


def interval(value: float, figures: np.ndarray, level: float) -> tuple[float, float]:
    """Return the interval of a value: the middle ``level`` of its resampled figures (R,), extended to the value.

    Figures that are NaN do not count. The interval is NaN if all are.
    """
    defined = figures[~np.isnan(figures)]
    if not len(defined):
        return float("nan"), float("nan")
    low, high = np.quantile(defined, [(1 - level) / 2, (1 + level) / 2])
    return float(np.fmin(low, value)), float(np.fmax(high, value))


def _draw(n: int, resamples: int, generator: np.random.Generator) -> np.ndarray:
    """Return how often each of n rows is drawn in each of R resamples, (n, R) float64."""
    draws = [np.bincount(generator.integers(n, size=n), minlength=n) for _ in range(resamples)]
    return np.stack(draws, axis=1).astype(np.float64)
