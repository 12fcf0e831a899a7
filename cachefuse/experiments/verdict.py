"""The verdict of a comparison: which methods are shown to be as good as every other, up to a margin.

All methods are measured on the same rows, and every pair of them is compared on the same resamples. The best method is
chosen on these rows too, so a comparison with it alone would favour it. A method is therefore "enough" only if it is
shown to be not worse than *any* other by the margin or more: an intersection-union test, which needs no correction for
the others (Berger, "Multiparameter hypothesis testing and acceptance sampling", 1982). Holm's method corrects for the
number of methods that are tested so.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from torch import Tensor

from cachefuse.experiments.results import SettingResult, SweepResult
from cachefuse.metrics.bootstrap import at_once, resample
from cachefuse.metrics.paired import ALPHA, MCNEMAR, Difference, difference, holm, mcnemar, not_worse, right_rows, worse
from cachefuse.training.data import TrainingData
from cachefuse.training.held_out import HeldOut

MARGIN = 0.01  # of the main metric
RESAMPLES = 4000  # the smallest p must stay small after a correction for 28 pairs
CORRECTION = "Holm"
ENOUGH, UNDECIDED, WORSE = "yes", "undecided", "no"  # is a method within the margin of every other?


@dataclass(frozen=True)
class Standing:
    """One method beside the best: ``behind`` is the best's figure minus its own, and p has no correction.

    ``p_corrected`` is corrected for all pairs of methods. ``p_worse`` is the corrected p of "worse than another by the
    margin or more". ``within`` says whether it is shown to be within the margin of every other: yes, no or undecided.
    """

    method: str
    behind: Difference
    p_corrected: float
    p_worse: float
    within: str


@dataclass(frozen=True)
class Comparison(SweepResult):
    """Compared methods: their trials, and the ``standings`` of those that did not diverge, on the same held-out rows.

    ``margin`` is the largest loss of the main metric that is accepted. ``n_groups`` is the number of rows or, where
    rows share an input, of groups that are resampled whole.
    """

    margin: float = MARGIN
    n_groups: int = 0
    standings: tuple[Standing, ...] = ()

    @property
    def enough(self) -> SettingResult | None:
        """The method with the fastest predictions among those within the margin of every other; None if none is."""
        within = {standing.method for standing in self.standings if standing.within == ENOUGH}
        shown = [setting for setting in self.settings if setting.config.fusion in within]
        return min(shown, key=_time, default=None)

    @property
    def undecided(self) -> list[SettingResult]:
        """The methods of which the rows do not show whether they are enough, the fastest first.

        Only those that predict faster than ``enough``.
        """
        open_ = {standing.method for standing in self.standings if standing.within == UNDECIDED}
        limit = _time(self.enough) if self.enough else np.inf
        settings = [setting for setting in self.settings if setting.config.fusion in open_ and _time(setting) < limit]
        return sorted(settings, key=_time)


def judge(
    result: SweepResult,
    data: TrainingData,
    rows: Tensor,
    scores_of: Callable[[SettingResult], HeldOut],
    margin: float,
    seed: int = 0,
) -> Comparison:
    """Compare each pair of methods on their scores of the held-out rows (n,), with the main metric of the result.

    p is McNemar's where the metric is the share of rows that are right and rows are independent, else the bootstrap's.
    """
    name = result.metrics[0]
    settings = [setting for setting in result.settings if not np.isnan(setting.mean(name))]
    targets, groups, metric = data.targets(rows), data.groups_of(rows), data.bind([name])[name]
    figures: list[np.ndarray] = []
    right: list[np.ndarray | None] = []
    for setting in settings:
        arrays = targets, *scores_of(setting).decided(data, setting.config)
        weighted = metric.weighted(*arrays)
        figures.append(resample(weighted, len(rows), RESAMPLES, seed, at_once(targets), groups))
        right.append(right_rows(metric, *arrays) if groups is None else None)
    n_groups = data.n_groups(rows)
    fewest = min(n_groups, *(int(task.labelled(targets).sum()) for task in data.tasks))
    names = [setting.config.fusion for setting in settings]
    values = np.array([setting.mean(name) for setting in settings])
    standings = _standings(names, values, figures, right, margin, fewest) if settings else ()
    return Comparison(**vars(result), margin=margin, n_groups=n_groups, standings=standings)


def _standings(
    names: Sequence[str],
    values: np.ndarray,
    figures: Sequence[np.ndarray],
    right: Sequence[np.ndarray | None],
    margin: float,
    n: int,
) -> tuple[Standing, ...]:
    """Return the standing of K methods with values (K,), resampled figures (K, R) and right rows, on n rows."""
    k = len(names)
    pairs = [(i, j) for i in range(k) for j in range(k) if i != j]
    ordered = [(i, j) for i, j in pairs if i < j]
    apart = {(i, j): _difference(i, j, values, figures, right) for i, j in pairs}
    p_pairs = dict(zip(ordered, holm(np.array([apart[pair].p for pair in ordered])), strict=True))
    p_not_worse = {(i, j): not_worse(figures[j] - figures[i], margin, n) for i, j in pairs}
    p_enough = holm(np.array([max((p_not_worse[i, j] for j in range(k) if j != i), default=1.0) for i in range(k)]))
    p_worse = holm(np.array([worse(figures[j] - figures[i], margin, n) for i, j in pairs]))
    is_worse = {i for (i, _), p in zip(pairs, p_worse, strict=True) if p <= ALPHA / 2}
    best = int(values.argmax())
    standings = []
    for i, name in enumerate(names):
        behind = apart[best, i] if i != best else Difference(0.0, 0.0, 0.0, 1.0)
        within = ENOUGH if p_enough[i] <= ALPHA / 2 else WORSE if i in is_worse else UNDECIDED
        p_corrected = float(p_pairs.get((min(i, best), max(i, best)), 1.0))
        standings.append(Standing(name, behind, p_corrected, float(p_enough[i]), within))
    return tuple(standings)


def _difference(
    i: int, j: int, values: np.ndarray, figures: Sequence[np.ndarray], right: Sequence[np.ndarray | None]
) -> Difference:
    """Return the difference of method i from method j."""
    found = difference(float(values[i] - values[j]), figures[i] - figures[j])
    first, second = right[i], right[j]
    if first is None or second is None:
        return found
    return replace(found, p=mcnemar(first, second), test=MCNEMAR)


def _time(setting: SettingResult) -> float:
    return setting.costs.ms_per_item if setting.costs else np.inf
