"""What is learnt from: features, targets and the metrics that judge a model; opened once, for many trainings."""

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from cachefuse.data.folds import stratified_folds
from cachefuse.data.splits import ordered_splits
from cachefuse.device import resolve_device
from cachefuse.encoders.base import Origin
from cachefuse.errors import ConfigError, DataError
from cachefuse.feature_spec import FeatureSpec
from cachefuse.fusion.base import Model
from cachefuse.fusion.model import FusionModel
from cachefuse.metrics import main_metric
from cachefuse.metrics.tasks import BoundMetric, TaskSlice, bind_metrics
from cachefuse.store.features import Features
from cachefuse.store.store import FeatureStore
from cachefuse.training.config import TrainConfig
from cachefuse.training.feature_table import LOAD_ROWS, FeatureTable
from cachefuse.training.resolved import TASK_LOSS, ResolvedConfig, resolve, why_no_head
from cachefuse.training.selection import Views, load_table, pooled, select_features
from cachefuse.training.tasks import check_stages, resolve_tasks

logger = logging.getLogger(__name__)


TRAIN, VAL = "train", "val"
OUT_OF_FOLD = "oof"  # train and val together, each row measured by a model that has not seen it


@dataclass(frozen=True)
class TrainingData:
    """A table of features and targets (N, C) on a device; ``metrics`` are those to report.

    ``stored`` are the features of a store, by modality, that the table was opened from. ``tasks`` are what the columns
    are of. Rows of one of the ``groups`` (N,), as those about one image, are always in the same fold.
    """

    name: str
    table: FeatureTable
    classes: tuple[str, ...]
    task: str
    metrics: tuple[str, ...]
    tasks: tuple[TaskSlice, ...]
    min_labels: int = 0
    stored: Mapping[str, Sequence[Features]] = field(default_factory=dict)
    groups: np.ndarray | None = None

    @classmethod
    def of_one_task(
        cls,
        name: str,
        table: FeatureTable,
        classes: tuple[str, ...],
        task: str,
        metrics: tuple[str, ...],
        min_labels: int = 0,
    ) -> "TrainingData":
        """Return data whose columns are all of one task, such as "multilabel"."""
        tasks = (TaskSlice("", task, slice(0, len(classes)), min_labels),)
        return cls(name, table, classes, task, metrics, tasks, min_labels)

    @classmethod
    def of(
        cls, store: FeatureStore, table: FeatureTable, stored: Mapping[str, Sequence[Features]] | None = None
    ) -> "TrainingData":
        """Return what a store's dataset asks of a table, which was opened from its ``stored`` features by modality."""
        about = store.manifest
        groups = None
        for modality in store.modalities:
            shared = store.shared_rows(modality)
            if shared is not None:  # rows without what others share are each by themselves
                groups = np.where(store.present(modality), shared, len(store) + np.arange(len(store)))
        return cls(
            name=store.dataset,
            table=table,
            classes=store.classes,
            task=about.task,
            metrics=about.reported_metrics,
            tasks=about.task_slices(store.classes),
            min_labels=about.min_labels,
            stored=stored or {},
            groups=groups,
        )

    @property
    def specs(self) -> Mapping[str, FeatureSpec]:
        """What the features at hand are, by name."""
        return self.table.specs

    @property
    def origins(self) -> dict[str, Origin]:
        """Where the first features of each modality are from."""
        return {modality: Origin(group[0].source, group[0].provenance) for modality, group in self.stored.items()}

    @property
    def metric(self) -> str:
        """The metric to prefer a model by."""
        return main_metric(self.metrics)

    def bind(self, names: Iterable[str]) -> dict[str, BoundMetric]:
        """Return metrics of its targets by name: those to report, or others."""
        names = list(names)
        bound = bind_metrics(dict.fromkeys((*self.metrics, *names)), self.tasks)
        return {name: bound[name] for name in names}

    @property
    def device(self) -> torch.device:
        return self.table.targets.device

    @property
    def splits(self) -> list[str]:
        """The splits that have labelled rows: train and val first."""
        return [split for split in ordered_splits(self.table.splits) if len(self.table.rows(split))]

    def rows(self, *splits: str) -> Tensor:
        """Return the labelled rows of some splits, (n,) int64, in the table's order."""
        return torch.cat([self.table.rows(split) for split in splits]).sort().values

    def targets(self, rows: Tensor) -> np.ndarray:
        """Return the targets (n, C) of some rows, 0 or 1, or -1 where a row lacks the label of one of several tasks.

        Of answers to questions they are from 0 to 1.
        """
        return self.table.targets[rows.to(self.device)].cpu().numpy()

    def folds(self, rows: Tensor, k: int, seed: int) -> Tensor:
        """Return the fold of each of some rows, (n,) int64, as ``stratified_folds`` shares them out, one group in one.

        Raises ConfigError unless there are as many rows, or groups, as folds.
        """
        if self.groups is None:
            return torch.from_numpy(stratified_folds(self.targets(rows), k, seed))
        _, group = torch.from_numpy(self.groups)[rows.cpu()].unique(return_inverse=True)  # (n,)
        labels = torch.zeros(int(group.max()) + 1, len(self.classes), dtype=torch.bool)
        for row, of in zip(rows.split(LOAD_ROWS), group.split(LOAD_ROWS), strict=True):
            have, label = np.nonzero(self.targets(row))
            labels[of[have], label] = True  # a group has all the labels of its rows
        return torch.from_numpy(stratified_folds(labels.numpy(), k, seed))[group]

    def n_groups(self, rows: Tensor) -> int:
        """Return how many folds some rows can be divided into at most."""
        return len(rows) if self.groups is None else len(np.unique(self.groups[rows.cpu()]))

    def resolve(self, config: TrainConfig) -> ResolvedConfig:
        """Return settings with none left open.

        Raises ConfigError for a loss that is not the task's, and as ``resolve_tasks`` and ``check_stages`` do.
        """
        check_stages(config)
        config = resolve_tasks(config, self.tasks)
        return resolve(config, self.task, len(self.train_rows()), self.origins, self.classes)

    def shuffled(self, config: TrainConfig) -> "TrainingData":
        """Return the same data with modalities shuffled as the settings ask for."""
        return replace(self, table=self.table.shuffled(config.shuffle, config.seed)) if config.shuffle else self

    def only(self, names: Sequence[str]) -> "TrainingData":
        """Return the same data with some of its features."""
        return replace(self, table=self.table.only(names))

    def train_rows(self) -> Tensor:
        """Return the rows to train on. Raises DataError if there are none."""
        rows = self.rows(TRAIN)
        if not len(rows):
            splits = ordered_splits(self.table.splits)
            have = ", ".join(f"{split} has {len(self.rows(split)):,} labelled rows" for split in splits)
            raise DataError(f"{self.name} has no labelled rows in its {TRAIN!r} split ({have})")
        return rows


def open_training_data(
    store: FeatureStore, encoders: Sequence[str] = (), device: str = "auto", views: Views = pooled
) -> TrainingData:
    """Open the views that are read of a store's features, by default of all that are complete.

    A modality of which samples have several items (captions) is left out where there is another. Raises CacheError or
    ConfigError if the features are not there, and ConfigError if the dataset's task has no head, or one class alone.
    """
    manifest = store.manifest
    if manifest.task not in TASK_LOSS:
        raise ConfigError(why_no_head(manifest.task))
    for task in manifest.task_slices(store.classes):
        if task.one_label and task.n_classes < 2:
            one = f"{task.name or store.dataset} has one class only, {store.classes[task.columns][0]!r}"
            raise ConfigError(f"{one}: there is nothing to tell apart")
    features = select_features(store, encoders, views)
    single = {modality: group for modality, group in features.items() if not store.has_several(modality)}
    for modality in features.keys() - single.keys() if single else ():
        logger.warning("%s has several %ss a sample, and a head reads one; they are left out", store.dataset, modality)
    features = single or features
    return TrainingData.of(store, load_table(store, features, views).to(resolve_device(device)), features)


@dataclass(frozen=True)
class TrainingSet:
    """What models of one split are trained on: rows (n,) of a table.

    The table is standardised already where memory allows; elsewhere ``standardize`` is still to be applied.
    """

    table: FeatureTable
    rows: Tensor
    standardize: nn.ModuleDict | None

    @classmethod
    def prepare(cls, data: TrainingData, model: FusionModel, rows: Tensor) -> "TrainingSet":
        """Take the model's statistics from its rows (n,), and bring the table into memory where that is allowed."""
        table, rows = data.table.only(model.specs), rows.to(data.device)
        model.fit_statistics(table.features, table.present, rows, table.feature_rows)
        at_hand = table.at_hand(model.standardize)
        return cls(at_hand or table, rows, model.standardize if at_hand is None else None)

    @property
    def targets(self) -> Tensor:
        """The rows' targets (n, C)."""
        return self.table.targets[self.rows]

    def only(self, names: Iterable[str]) -> "TrainingSet":
        """Return some of the features, by name, and the rows that have any of them."""
        table = self.table.only(names)
        here = table.any_present(self.rows)
        return replace(self, table=table, rows=self.rows[here])

    def reading(self, module: Any) -> Model:
        """Return a fusion, or a head of one, as it takes the table's features."""
        return module if self.standardize is None else FusionModel(module, self.standardize)
