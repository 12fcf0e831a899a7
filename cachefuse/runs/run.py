"""A run: one trained model, or several with averaged scores, with its features and figures."""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from cachefuse.data.manifest import Manifest
from cachefuse.errors import RunError
from cachefuse.fusion.model import FusionModel
from cachefuse.metrics.calibrators import Calibration
from cachefuse.metrics.tasks import TaskSlice, decide_tasks
from cachefuse.runs.features import RunFeatures, RunFeaturesByName
from cachefuse.runs.leaderboard import Leaderboard
from cachefuse.store.store import FeatureStore
from cachefuse.training.feature_table import FeatureTable
from cachefuse.training.held_out import HeldOut, Result
from cachefuse.training.inference import predict_scores
from cachefuse.training.loop import History
from cachefuse.training.resolved import ResolvedConfig

CHOSE_EPOCH = (
    "the val rows also chose the epoch (--patience), so their figures may be too high; "
    "--folds 5 measures rows that chose nothing"
)


@dataclass(frozen=True)
class Member:
    """One model of a run: its settings, its features, and the weight of its scores in the run's mean.

    ``fold`` is the part of the held-out rows that it has not seen; None if all models held out the same rows.
    ``calibration`` makes its scores probabilities before they are averaged; None if they stay as they are.
    """

    config: ResolvedConfig
    features: RunFeaturesByName
    model: FusionModel
    weight: float
    fold: int | None = None
    calibration: Calibration | None = None


def named(config: ResolvedConfig) -> str:
    """Return the name of a model: its fusion, head and loss."""
    return f"{config.fusion}-{config.head_name}-{config.loss}"


@dataclass
class Run:
    """A trained model, or several with averaged scores, with its training and its figures.

    A label is predicted if its score, after ``calibration`` if there is one, reaches its threshold in ``thresholds``
    (C,). ``results`` are by split; "oof" is
    train and val out of fold. ``histories`` belong to the models that scored ``held_out``. ``sources`` are the names of
    an ensemble's runs. ``calibration_errors`` of the held-out rows are (before, after) calibration, by metric.
    ``leaderboard`` is of the search that found the models.
    """

    name: str
    dataset: str
    manifest: Manifest
    classes: tuple[str, ...]
    config: ResolvedConfig
    members: list[Member]
    thresholds: np.ndarray
    histories: list[History]
    held_out: HeldOut | None
    split_digest: str
    results: dict[str, Result] = field(default_factory=dict)
    calibration: Calibration | None = None
    calibration_errors: dict[str, tuple[float, float]] = field(default_factory=dict)
    sources: tuple[str, ...] = ()
    leaderboard: Leaderboard | None = None
    seconds: float = 0.0
    created: str = ""
    path: Path | None = None

    @property
    def task(self) -> str:
        return self.manifest.task

    @property
    def tasks(self) -> tuple[TaskSlice, ...]:
        """The tasks, with their columns of the scores."""
        return self.manifest.task_slices(self.classes)

    @property
    def several(self) -> bool:
        """Whether the dataset declares tasks, each with its own classes and metrics."""
        return bool(self.manifest.tasks)

    @property
    def features(self) -> RunFeaturesByName:
        """The features of all members, by name, without repeats."""
        union: dict[str, dict[RunFeatures, None]] = {}
        for member in self.members:
            for name, group in member.features.items():
                union.setdefault(name, {}).update(dict.fromkeys(group))
        return {name: tuple(group) for name, group in sorted(union.items())}

    @property
    def modalities(self) -> tuple[str, ...]:
        """The modalities that the members read."""
        return tuple(sorted({features.modality for group in self.features.values() for features in group}))

    @property
    def encoders(self) -> tuple[tuple[str, str], ...]:
        """The (encoder, modality) pairs of the features, without repeats."""
        every = (features for group in self.features.values() for features in group)
        return tuple(dict.fromkeys((features.encoder, features.modality) for features in every))

    @property
    def models(self) -> dict[str, float]:
        """The weights of the kinds of models in the mean, by name, of sum 1; a blend has several kinds."""
        weights: dict[str, float] = {}
        for member in self.members:
            weights[named(member.config)] = weights.get(named(member.config), 0) + member.weight
        return {name: weight / sum(weights.values()) for name, weight in weights.items()}

    @property
    def metrics(self) -> dict[str, dict[str, float]]:
        return {split: result.metrics for split, result in self.results.items()}

    @property
    def interrupted(self) -> bool:
        return any(history.interrupted for history in self.histories)

    @property
    def caution(self) -> str | None:
        """Why figures of the rows held out may be too high: these rows chose the epoch. None if they chose nothing."""
        if self.held_out is None or not any(member.config.chooses_epoch_on_val for member in self.members):
            return None
        return CHOSE_EPOCH

    @property
    def n_parameters(self) -> int:
        return sum(member.model.n_parameters for member in self.members)

    @property
    def size_mb(self) -> float:
        """The models' size in MB (10^6 bytes), statistics included."""
        return sum(member.model.size_mb for member in self.members)

    def scores(self, table_of: Callable[[Member], FeatureTable], rows: Tensor) -> np.ndarray:
        """Return the members' mean probabilities (n, C) float32, calibrated, for rows (n,) of their tables."""
        return self.calibrated(self.raw_scores(table_of, rows))

    def raw_scores(self, table_of: Callable[[Member], FeatureTable], rows: Tensor) -> np.ndarray:
        """Return the members' mean probabilities (n, C) float32 before calibration."""
        return self._mean(self.members, table_of, rows)

    def calibrated(self, scores: np.ndarray) -> np.ndarray:
        """Return scores (n, C) after calibration: the same if the run has none."""
        return scores if self.calibration is None else self.calibration(scores, self.tasks)

    def held_out_scores(self, table_of: Callable[[Member], FeatureTable]) -> np.ndarray:
        """Return scores (n, C), before calibration, of the held-out rows, each by members that have not seen it.

        Raises RunError if there are no such rows, or if the members were trained on them afterwards.
        """
        held_out, folds = self.held_out, [member.fold for member in self.members]
        if held_out is None:
            raise RunError(f"run {self.name} has no held-out rows; train with --folds, or name a labelled --split")
        if self.config.refit or (self.sources and self.config.folds):
            raise RunError(f"the models of run {self.name} have seen the held-out rows; name another labelled --split")
        rows = torch.from_numpy(held_out.rows)
        if None in folds:
            return self.raw_scores(table_of, rows)
        scores = np.zeros((len(rows), len(self.classes)), np.float32)
        for fold in set(folds):
            unseen = held_out.parts == fold
            members = [member for member in self.members if member.fold == fold]
            scores[unseen] = self._mean(members, table_of, rows[unseen])
        return scores

    def _mean(self, members: Sequence[Member], table_of: Callable[[Member], FeatureTable], rows: Tensor) -> np.ndarray:
        def scores(member: Member) -> np.ndarray:
            table = table_of(member)
            model = member.model.to(table.targets.device)
            found = predict_scores(model, table, rows, member.config.loss, self.tasks)
            return found if member.calibration is None else member.calibration(found, self.tasks)

        if len(members) == 1:
            return scores(members[0])
        total = np.zeros((len(rows), len(self.classes)))
        weights = sum(member.weight for member in members)
        for member in members:
            total += member.weight / weights * scores(member).astype(np.float64)
        return total.astype(np.float32)

    def decide(self, scores: np.ndarray) -> np.ndarray:
        """Return the predicted labels (n, C) bool for scores (n, C)."""
        return decide_tasks(scores, self.tasks, self.thresholds)


def split_digest(store: FeatureStore) -> str:
    """Hash the id, split and content of each sample; runs with equal hashes were evaluated on the same rows."""
    digest = hashlib.blake2b(digest_size=8)
    for row in _digested(store):
        digest.update(row)
    return digest.hexdigest()


def begins_as(store: FeatureStore, digest: str) -> bool:
    """Whether the first rows of a store, or all of them, have this ``split_digest``: later ones were appended."""
    running = hashlib.blake2b(digest_size=8)
    for row in _digested(store):
        running.update(row)
        if running.hexdigest() == digest:
            return True
    return False


def _digested(store: FeatureStore) -> Iterator[bytes]:
    for row in zip(store.ids, store.splits, store.digests, strict=True):
        yield ("\0".join(row) + "\n").encode("utf-8", "surrogatepass")
