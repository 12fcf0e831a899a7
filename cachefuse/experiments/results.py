"""What a sweep came to: trials by setting and seed, their means and spreads."""

import math
from dataclasses import dataclass, field

import numpy as np

from cachefuse.errors import TrainingError
from cachefuse.experiments.costs import Costs
from cachefuse.registry import Options
from cachefuse.runs.files import Figure
from cachefuse.settings import settings_of
from cachefuse.training.config import TrainConfig
from cachefuse.training.resolved import ResolvedConfig

Published = tuple[float, float]  # mean and standard deviation; NaN for a training that diverged


@dataclass(frozen=True)
class Trial:
    """One training: the figures of the rows held out, and the epoch that its weights are of; or why it diverged.

    ``weights`` are how much each modality counts, on average, in a fusion that weighs them. Where that was asked for,
    ``interval`` is the 95% interval of the metric to go by, and ``costs`` the model's.
    """

    key: str
    seed: int
    metrics: dict[str, Figure]
    epoch: Figure
    seconds: float
    diverged: str = ""
    interval: tuple[float, float] | None = None
    costs: Costs | None = None
    weights: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Curve:
    """Where a setting lies in a plot: on the curve of a name, at ``x``, which is ``what``."""

    name: str
    what: str
    x: float


@dataclass(frozen=True)
class SettingResult:
    """What one setting came to: its finished trials, by seed, and what was published of it.

    ``values`` are all its settings by name, those left open filled in; ``config`` is that of its first seed. ``label``
    names it in words, where it has such a name.
    """

    values: Options
    config: ResolvedConfig
    trials: tuple[Trial, ...]
    published: Published | None = None
    label: str = ""
    curve: Curve | None = None

    @property
    def n_diverged(self) -> int:
        return sum(bool(trial.diverged) for trial in self.trials)

    @property
    def seconds(self) -> float:
        """The mean time of a trial."""
        return float(np.mean([trial.seconds for trial in self.trials])) if self.trials else math.nan

    @property
    def costs(self) -> Costs | None:
        """What a model of the setting costs, where that was measured."""
        return next((trial.costs for trial in self.trials if trial.costs), None)

    @property
    def interval(self) -> tuple[float, float] | None:
        """The 95% interval of the metric to go by over the rows, of its only trial; None if there are more."""
        return self.trials[0].interval if len(self.trials) == 1 else None

    def weight(self, modality: str) -> float:
        """Return how much a modality counts, on average over the trials; NaN where the fusion does not weigh them."""
        return float(np.mean([trial.weights.get(modality, math.nan) for trial in self.trials]))

    def mean(self, metric: str) -> float:
        """Return the mean over the seeds; NaN if there is none yet, or one diverged."""
        return float(np.mean(self._figures(metric))) if self.trials else math.nan

    def std(self, metric: str) -> float:
        """Return the standard deviation of a sample; NaN for a single seed, and where the mean is."""
        return float(np.std(self._figures(metric), ddof=1)) if len(self.trials) > 1 else math.nan

    def named(self, fields: tuple[str, ...]) -> str:
        """Return its name: its label, or the values of some fields."""
        return self.label or ", ".join(text for name in fields if (text := self.text(name)))

    def text(self, name: str) -> str:
        """Return a setting's value as it is given on the command line; of a fusion's options those not its own."""
        value = self.config.changed_options() if name == "fusion_options" else self.values[name]
        return settings_of(TrainConfig)[name].text(value)

    def _figures(self, metric: str) -> list[float]:
        return [trial.metrics.get(metric, math.nan) for trial in self.trials]


@dataclass(frozen=True)
class SweepResult:
    """Settings in the order given, with what each came to so far; ``fields`` are what they differ in.

    ``metrics``, the one to go by first, are of the ``n_rows`` of a ``split``: val, or oof for train and val.
    """

    title: str
    fields: tuple[str, ...]
    metrics: tuple[str, ...]
    split: str
    n_rows: int
    seeds: tuple[int, ...]
    settings: tuple[SettingResult, ...]
    paper: str = ""  # what published figures are of
    shown: tuple[str, ...] = ()  # the metrics of a table, where not the first

    @property
    def n_trials(self) -> int:
        return len(self.settings) * len(self.seeds)

    @property
    def n_done(self) -> int:
        return sum(len(setting.trials) for setting in self.settings)

    @property
    def best(self) -> SettingResult:
        """The setting with the highest mean. Raises TrainingError if none has one."""
        metric = self.metrics[0]
        whole = [setting for setting in self.settings if not math.isnan(setting.mean(metric))]
        if not whole:
            raise TrainingError(f"{self.title}: trials of every setting diverged; take a lower lr")
        return max(whole, key=lambda setting: setting.mean(metric))
