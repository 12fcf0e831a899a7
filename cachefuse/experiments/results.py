"""The results of a sweep: trials by setting and seed, their means and standard deviations."""

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
    """One training: the figures of the held-out rows and the epoch of the kept weights, or why it ``diverged``.

    ``weights`` are the mean weights of the modalities, if the fusion weighs them. ``interval`` is the 95% interval of
    the main metric; it and the model's ``costs`` are None if not measured. ``scores`` is the SHA-256, in hex, of
    the file of its kept scores.
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
    scores: str = ""


@dataclass(frozen=True)
class Curve:
    """The point of a setting in a plot of curves: at ``x`` on the curve ``name``; the x axis is ``what``."""

    name: str
    what: str
    x: float


@dataclass(frozen=True)
class SettingResult:
    """The results of one setting: its finished trials, by seed, and its published figures.

    ``values`` are all resolved settings by name; ``config`` is the configuration of the first seed. ``label`` is the
    setting's name in words, or "".
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
        """The costs of a model of the setting; None if not measured."""
        return next((trial.costs for trial in self.trials if trial.costs), None)

    @property
    def interval(self) -> tuple[float, float] | None:
        """The 95% interval of the main metric in the only trial; None if there are more trials."""
        return self.trials[0].interval if len(self.trials) == 1 else None

    def weight(self, modality: str) -> float:
        """Return a modality's mean weight over the trials; NaN if the fusion does not weigh modalities."""
        return float(np.mean([trial.weights.get(modality, math.nan) for trial in self.trials]))

    def mean(self, metric: str) -> float:
        """Return the mean over the seeds; NaN without trials, or if one diverged."""
        return float(np.mean(self._figures(metric))) if self.trials else math.nan

    def std(self, metric: str) -> float:
        """Return the sample standard deviation; NaN for a single seed, or if the mean is NaN."""
        return float(np.std(self._figures(metric), ddof=1)) if len(self.trials) > 1 else math.nan

    def named(self, fields: tuple[str, ...]) -> str:
        """Return the setting's name: its label, or the values of ``fields``."""
        return self.label or ", ".join(text for name in fields if (text := self.text(name)))

    def text(self, name: str) -> str:
        """Return a field's value in the command line's spelling; of fusion options only those that were changed."""
        value = self.config.changed_options() if name == "fusion_options" else self.values[name]
        return settings_of(TrainConfig)[name].text(value)

    def _figures(self, metric: str) -> list[float]:
        return [trial.metrics.get(metric, math.nan) for trial in self.trials]


@dataclass(frozen=True)
class SweepResult:
    """The results of each setting so far, in the given order; the settings differ in ``fields``.

    ``metrics``, the main one first, are of ``n_rows`` rows of ``split``: "val", or "oof" for train and val.
    """

    title: str
    fields: tuple[str, ...]
    metrics: tuple[str, ...]
    split: str
    n_rows: int
    seeds: tuple[int, ...]
    settings: tuple[SettingResult, ...]
    paper: str = ""  # describes the published figures
    shown: tuple[str, ...] = ()  # the metrics of a table; by default the first ones

    @property
    def n_trials(self) -> int:
        return len(self.settings) * len(self.seeds)

    @property
    def n_done(self) -> int:
        return sum(len(setting.trials) for setting in self.settings)

    @property
    def best(self) -> SettingResult:
        """The setting with the highest mean. Raises TrainingError if no setting has a mean."""
        metric = self.metrics[0]
        finished = [setting for setting in self.settings if not math.isnan(setting.mean(metric))]
        if not finished:
            raise TrainingError(f"{self.title}: trials of every setting diverged; use a lower lr")
        return max(finished, key=lambda setting: setting.mean(metric))
