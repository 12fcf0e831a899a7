"""Successive halving over folds: many candidates on one fold, the better half on more, the best on all.

Folds are the resource (Jamieson and Talwalkar, "Non-stochastic best arm identification and hyperparameter
optimization", 2016). Candidates are compared by the log loss of their calibrated scores on the rows that the same folds
hold out, each row scored by a model that has not seen it.
"""

import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from cachefuse.errors import ConfigError, TrainingError
from cachefuse.experiments.candidates import Candidate, candidates, opened
from cachefuse.experiments.costs import Costs
from cachefuse.experiments.files import append_trials, read_scores, read_trials, write_scores
from cachefuse.experiments.results import Trial
from cachefuse.experiments.sweep import data_digest, trial_key
from cachefuse.fusion.model import FusionModel
from cachefuse.metrics.calibrators import Calibration
from cachefuse.store.store import FeatureStore
from cachefuse.training.blend import calibrated, log_loss
from cachefuse.training.build import build_model
from cachefuse.training.config import TrainConfig
from cachefuse.training.data import OUT_OF_FOLD, TRAIN, VAL, TrainingData
from cachefuse.training.duplicates import keep_together
from cachefuse.training.held_out import HeldOut
from cachefuse.training.inference import predict_scores, spread
from cachefuse.training.resolved import ResolvedConfig
from cachefuse.training.split import Split
from cachefuse.training.train import TrainedModel, member_settings, train_model, warned_splits

DEFAULT = 2  # candidates: the first ones, which train-head trains by itself, are trained on all folds if there is time
MEASURED_ROWS = 512  # to measure the time of a prediction
MARGIN = 1.05  # of a size that is estimated


@dataclass
class Tried:
    """A candidate with what it reads, its trials by fold, and their scores of the rows held out.

    ``held_out`` are the calibrated scores of the folds so far, each part by a calibration of the others; ``loss`` is
    their log loss, and ``calibration`` that of all these rows.
    """

    candidate: Candidate
    data: TrainingData
    config: ResolvedConfig
    digest: str
    trials: list[Trial] = field(default_factory=list)
    scores: list[np.ndarray] = field(default_factory=list)
    calibration: Calibration | None = None
    held_out: HeldOut | None = None
    loss: float = math.inf

    @property
    def name(self) -> str:
        return self.candidate.name(self.config)

    @property
    def problem(self) -> str:
        return next((trial.diverged for trial in self.trials if trial.diverged), "")

    @property
    def seconds(self) -> float:
        return sum(trial.seconds for trial in self.trials)

    @property
    def least_mb(self) -> float:
        """The size of its untrained models, 10^6 bytes: one that is solved directly gets larger."""
        with torch.device("meta"):
            model = build_model(self.config, self.data.specs, len(self.data.classes), self.data.tasks)
        return self.config.members * model.size_mb

    @property
    def costs(self) -> Costs:
        """The largest costs of its models."""
        known = [trial.costs for trial in self.trials if trial.costs]
        return Costs(*(max(values) for values in zip(*(asdict(costs).values() for costs in known), strict=True)))

    def train(self, split: Split) -> list[TrainedModel]:
        """Train the candidate on a split: one model for each of its members."""
        members = []
        for i in range(self.config.members):
            settings = member_settings(self.config, i)
            model, _ = train_model(self.data, settings, split)
            members.append(TrainedModel(settings.with_sizes(model.fusion), model, None))
        return members


@dataclass(frozen=True)
class Bounds:
    """The most that the models of a result may take: MB, and ms an item. None for no limit."""

    max_size_mb: float | None = None
    max_ms: float | None = None

    def __bool__(self) -> bool:
        return self.max_size_mb is not None or self.max_ms is not None

    def __str__(self) -> str:
        size = "" if self.max_size_mb is None else f"{self.max_size_mb:g} MB"
        time = "" if self.max_ms is None else f"{self.max_ms:g} ms an item"
        return " and ".join(filter(None, [f"within {size or time}", time if size else ""])) if self else ""

    def allow(self, costs: Iterable[tuple[float, float]]) -> bool:
        """Whether models that take these (MB, ms) fit together."""
        size, ms = (sum(each) for each in zip((0.0, 0.0), *costs, strict=True))
        return bool(size <= (self.max_size_mb or math.inf) and ms <= (self.max_ms or math.inf))


@dataclass
class Halving:
    """A search in progress. Its clock is the time of all its trials, also of those that were ``kept`` before.

    Candidates that are over the ``bounds`` by themselves are not trained on.
    """

    all: list[Tried]
    splits: list[Split]
    n_candidates: int
    folder: Path | None
    kept: dict[str, Trial]
    bounds: Bounds
    on_trial: Callable[[], None] = lambda: None

    @classmethod
    def begin(
        cls,
        store: FeatureStore,
        base: TrainConfig,
        encoders: Sequence[str],
        device: str,
        folder: Path | None,
        trials: int | None,
        bounds: Bounds,
    ) -> "Halving":
        """Open the first ``trials`` candidates, by default all, and the trials that a folder keeps.

        Those whose size is known to be over the bounds are left out; ConfigError if all are.
        """
        tried: dict[str, Tried] = {}  # by key: two may resolve to the same
        for candidate, data, config in opened(candidates(store, base, encoders), store, device):
            first = next(iter(tried.values())).data if tried else keep_together(data, config)
            data = replace(data, groups=first.groups)
            digest = data_digest(store, data, data.metrics, base)
            tried.setdefault(trial_key(digest, config), Tried(candidate, data, config, digest))
        found = [each for each in tried.values() if bounds.allow([(each.least_mb, 0.0)])]
        if not found:
            least = min(each.least_mb for each in tried.values())
            raise ConfigError(f"no candidate is {bounds}: the smallest takes {least:.2g} MB; raise --max-size-mb")
        splits = [
            Split(split.train, split.held_out[:0], split.held_out)  # scores while training would only cost time
            for split in warned_splits(found[0].data, found[0].config)
        ]
        kept = {trial.key: trial for trial in read_trials(folder)} if folder else {}
        return cls(found[:trials], splits, len(found), folder, kept, bounds)

    @property
    def data(self) -> TrainingData:
        """The data of the first candidate: rows, targets and groups are those of all."""
        return self.all[0].data

    @property
    def seconds(self) -> float:
        return sum(tried.seconds for tried in self.all)

    @property
    def finished(self) -> list[Tried]:
        """The candidates that were trained on all folds, and fit."""
        return [tried for tried in self.all if len(tried.trials) == len(self.splits) and self.fits(tried)]

    def run(self, budget: float = math.inf) -> None:
        """Try the candidates in ``budget`` seconds of trials. Time that is left goes to those that stopped.

        The first candidate is trained whatever the time, so that there is a result.
        """
        n_folds = len(self.splits)
        for tried in self.all:
            self.train(tried, 1)
            if self.fits(tried):
                self.train(tried, n_folds)
                break
        for tried in self.all[:DEFAULT]:
            list(self.within(self.within([tried], 1, budget), n_folds, budget))
        rungs = sorted({1, (n_folds + 1) // 2, n_folds})
        going = self.all[DEFAULT:]
        for i, rung in enumerate(rungs):
            share = self.seconds + (budget - self.seconds) / (len(rungs) - i)
            if i:
                going = sorted(going, key=lambda tried: tried.loss)[: (len(going) + 1) // 2]
            going = list(self.within(going, rung, share))
        if budget < math.inf:
            stopped = sorted(self.all, key=lambda tried: (-len(tried.trials), tried.loss))
            list(self.within(stopped, n_folds, budget))

    def within(self, going: Iterable[Tried], n_folds: int, limit: float) -> Iterator[Tried]:
        """Train candidates on the first folds, and yield them; those that would pass the limit are left as they are."""
        for tried in going:
            known = [tried] if tried.trials else self.all
            per_fold = sum(other.seconds for other in known) / max(1, sum(len(other.trials) for other in known))
            if self.seconds + (n_folds - len(tried.trials)) * per_fold <= limit:
                if self.fits(tried):
                    self.train(tried, n_folds)
                if not tried.problem and self.fits(tried):
                    yield tried

    def costs(self, tried: Tried) -> tuple[float, float]:
        """Return the MB and the ms an item of a candidate that is trained on all rows; before a trial, the least."""
        if not tried.trials or tried.problem:
            return tried.least_mb, 0.0
        n_folds, known = len(self.splits), tried.costs
        growth = MARGIN * n_folds / (n_folds - 1) if tried.config.is_solved else 1.0  # with its training rows
        return growth * known.size_mb, known.ms_per_item

    def fits(self, tried: Tried) -> bool:
        """Whether a candidate is not known to be over the bounds by itself."""
        return not tried.problem and self.bounds.allow([self.costs(tried)])

    def train(self, tried: Tried, n_folds: int) -> None:
        """Train a candidate on the first folds, and measure it on the rows that these hold out."""
        if tried.problem or len(tried.trials) >= n_folds:
            return
        for fold in range(len(tried.trials), n_folds):
            trial, scores = self.trial(tried, fold)
            tried.trials.append(trial)
            tried.scores.append(scores)
            if trial.diverged:
                tried.loss, tried.held_out = math.inf, None
                self.on_trial()
                return
        held_out = self._join(range(n_folds), tried.scores)
        tried.calibration, tried.held_out = calibrated(self.data, held_out)
        tried.loss = self.loss(tried.held_out)
        self.on_trial()

    def loss(self, held_out: HeldOut) -> float:
        """Return the log loss of the scores of rows held out."""
        return log_loss(self.data.targets(torch.from_numpy(held_out.rows)), held_out.scores, self.data.tasks)

    def trial(self, tried: Tried, fold: int) -> tuple[Trial, np.ndarray]:
        """Train a candidate on one fold, or read what was kept; return it with scores (n, C) of the rows held out."""
        split, n_classes = self.splits[fold], len(self.data.classes)
        key = trial_key(f"{tried.digest} fold {fold} of {len(self.splits)}", tried.config)
        none = np.zeros((0, n_classes), np.float32)
        if self.folder and (known := self.kept.get(key)) is not None:
            if known.diverged:
                return known, none
            if (found := read_scores(self.folder, known, split.held_out.numpy(), n_classes)) is not None:
                return known, found.scores
        begun, scores, costs, problem = time.perf_counter(), none, None, ""
        try:
            models = [member.model for member in tried.train(split)]
            scores = _mean_scores(tried, models, split.held_out)
            costs = _costs(tried, models)
        except TrainingError as error:
            problem = str(error)
        trial = Trial(key, tried.config.seed, {}, math.nan, time.perf_counter() - begun, problem, costs=costs)
        if self.folder:
            if not problem:
                trial = replace(trial, scores=write_scores(self.folder, key, self._join([fold], [scores])))
            append_trials(self.folder, [(trial, {"model": tried.name, "fold": fold})])
        return trial, scores

    def _join(self, folds: Sequence[int], scores: Sequence[np.ndarray]) -> HeldOut:
        """Return the scores of the rows that some folds hold out."""
        held_out = HeldOut.join(OUT_OF_FOLD, self.data, [self.splits[fold].held_out for fold in folds], list(scores))
        assert held_out is not None, "each fold has rows"
        return held_out


def _mean_scores(tried: Tried, models: Sequence[FusionModel], rows: Tensor) -> np.ndarray:
    """Return the mean scores (n, C) of models for rows (n,)."""
    table, loss, tasks = tried.data.table, tried.config.loss, tried.data.tasks
    scores = [predict_scores(model, table.only(model.specs), rows, loss, tasks) for model in models]
    return scores[0] if len(scores) == 1 else np.stack(scores).mean(axis=0, dtype=np.float64).astype(np.float32)


def _costs(tried: Tried, models: Sequence[FusionModel]) -> Costs:
    """Return what trained models cost together; their time is the median of three predictions of many rows."""
    rows = spread(tried.data.rows(TRAIN, VAL), MEASURED_ROWS)
    seconds = []
    for _ in range(3):
        begun = time.perf_counter()
        _mean_scores(tried, models, rows)
        seconds.append(time.perf_counter() - begun)
    parameters, size_mb = sum(model.n_parameters for model in models), sum(model.size_mb for model in models)
    return Costs(parameters, size_mb, 1000 * sorted(seconds)[1] / len(rows), 0.0)
