"""Training data: features, targets and metrics, opened once for many trainings."""

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from cachefuse.data.dataset import dataset_options
from cachefuse.data.folds import join_groups, stratified_folds
from cachefuse.data.splits import ordered_splits
from cachefuse.device import resolve_device
from cachefuse.encoders.base import Origin
from cachefuse.errors import CacheError, ConfigError, DataError
from cachefuse.feature_spec import FeatureSpec
from cachefuse.fusion.base import Model
from cachefuse.fusion.model import FusionModel
from cachefuse.metrics import main_metric
from cachefuse.metrics.tasks import BoundMetric, TaskSlice, bind_metrics
from cachefuse.printable import listed
from cachefuse.store.features import Features
from cachefuse.store.samples import StoredSamples
from cachefuse.store.store import FeatureStore
from cachefuse.training.config import TrainConfig
from cachefuse.training.feature_table import LOAD_ROWS, FeatureTable
from cachefuse.training.resolved import TASK_LOSS, ResolvedConfig, resolve, why_no_head
from cachefuse.training.selection import Views, load_table, pooled, select_features
from cachefuse.training.tasks import check_stages, resolve_tasks

logger = logging.getLogger(__name__)


TRAIN, VAL = "train", "val"
OUT_OF_FOLD = "oof"  # train and val, each row measured by a model that has not seen it


@dataclass(frozen=True)
class TrainingData:
    """A table of features and targets (N, C) on a device, with the metrics to report.

    ``stored`` are the features in the store, by modality. Each of the ``tasks`` has its columns of the targets.
    ``groups`` (N,) are group numbers: rows of one group, such as questions about one image, are in the same fold, and
    are drawn together for intervals.
    ``measures_answers`` is False for answers to questions in a store that lacks what their accuracy needs.
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
    measures_answers: bool = True

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
        """Return data of a single task, such as "multilabel"."""
        tasks = (TaskSlice("", task, slice(0, len(classes)), min_labels),)
        return cls(name, table, classes, task, metrics, tasks, min_labels)

    @classmethod
    def of(
        cls, store: FeatureStore, table: FeatureTable, stored: Mapping[str, Sequence[Features]] | None = None
    ) -> "TrainingData":
        """Return the data of a store, with a table opened from its ``stored`` features by modality."""
        manifest = store.manifest
        return cls(
            name=store.dataset,
            table=table,
            classes=store.classes,
            task=manifest.task,
            metrics=manifest.reported_metrics,
            tasks=manifest.task_slices(store.classes),
            min_labels=manifest.min_labels,
            stored=stored or {},
            groups=groups_of(store),
            measures_answers=store.measures_answers,
        )

    @property
    def specs(self) -> Mapping[str, FeatureSpec]:
        """The specs of the features, by name."""
        return self.table.specs

    @property
    def origins(self) -> dict[str, Origin]:
        """The encoder of the first features of each modality."""
        return {modality: Origin(group[0].source, group[0].provenance) for modality, group in self.stored.items()}

    @property
    def samples(self) -> list[StoredSamples]:
        """The samples of the store; none if the data has no store."""
        return [group[0].samples for group in self.stored.values()][:1]

    @property
    def metric(self) -> str:
        """The main metric, which compares models."""
        return main_metric(self.metrics)

    def bind(self, names: Iterable[str]) -> dict[str, BoundMetric]:
        """Return the named metrics, bound to the tasks of these targets."""
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
        """Return the labelled rows of the splits, (n,) int64, in the table's order."""
        return torch.cat([self.table.rows(split) for split in splits]).sort().values

    def targets(self, rows: Tensor) -> np.ndarray:
        """Return the targets (n, C) of rows (n,) for figures: 0 or 1, and -1 where a row lacks a task's label.

        For answers to questions they are accuracies in [0, 1], as in the VQA evaluation. Raises CacheError if the store
        is too old for these.
        """
        if not self.measures_answers:
            raise old_answers(self.name)
        return self.table.measured_targets(rows.to(self.device)).cpu().numpy()

    def learnt(self, rows: Tensor) -> np.ndarray:
        """Return which classes training can learn from each of the rows (n,), (n, C) bool."""
        learnt: np.ndarray = (self.table.targets[rows.to(self.device)] > 0).cpu().numpy()
        return learnt

    def folds(self, rows: Tensor, k: int, seed: int) -> Tensor:
        """Return the fold of each row, (n,) int64, by ``stratified_folds``; a group is never divided.

        Raises ConfigError if there are fewer rows, or groups, than folds.
        """
        if (n := self.n_groups(rows)) < k:
            what = "rows" if self.groups is None else "groups of rows that stay together"
            few = f"give --folds from 2 to {n}" if n > 1 else "no folds are possible"
            raise ConfigError(f"{self.name} has {n:,} labelled {what} for {k} folds; {few}")
        if self.groups is None:
            return torch.from_numpy(stratified_folds(self.learnt(rows), k, seed))
        _, group = torch.from_numpy(self.groups)[rows.cpu()].unique(return_inverse=True)  # (n,)
        labels = torch.zeros(int(group.max()) + 1, len(self.classes), dtype=torch.bool)
        for piece, piece_groups in zip(rows.split(LOAD_ROWS), group.split(LOAD_ROWS), strict=True):
            row, label = np.nonzero(self.learnt(piece))
            labels[piece_groups[row], label] = True  # a group has all the labels of its rows
        return torch.from_numpy(stratified_folds(labels.numpy(), k, seed))[group]

    def n_groups(self, rows: Tensor) -> int:
        """Return the maximum number of folds for rows (n,): the number of groups, or of rows without groups."""
        groups = self.groups_of(rows)
        return len(rows) if groups is None else len(np.unique(groups))

    def groups_of(self, rows: Tensor) -> np.ndarray | None:
        """Return the group number of each row, (n,), if the rows have groups."""
        return None if self.groups is None else self.groups[rows.cpu()]

    def resolve(self, config: TrainConfig) -> ResolvedConfig:
        """Return the settings with every None resolved.

        Raises ConfigError for a loss that does not fit the task, and as ``resolve_tasks`` and ``check_stages`` do.
        """
        check_stages(config)
        config = resolve_tasks(config, self.tasks)
        return resolve(config, self.task, len(self.train_rows()), self.origins, self.classes)

    def shuffled(self, config: TrainConfig) -> "TrainingData":
        """Return the same data with the settings' ``shuffle`` applied."""
        return replace(self, table=self.table.shuffled(config.shuffle, config.seed)) if config.shuffle else self

    def only(self, names: Sequence[str]) -> "TrainingData":
        """Return the same data with only the named features."""
        return replace(self, table=self.table.only(names))

    def train_rows(self) -> Tensor:
        """Return the rows to train on. Raises DataError if there are none."""
        rows = self.rows(TRAIN)
        if not len(rows):
            splits = ordered_splits(self.table.splits)
            have = listed(f"{split} has {len(self.rows(split)):,} labelled rows" for split in splits)
            raise DataError(f"{self.name} has no labelled rows in split {TRAIN!r} ({have})")
        return rows


def groups_of(store: FeatureStore) -> np.ndarray | None:
    """Return the group number of each row (N,): rows that share an input, such as an image, or the name of their group.

    A row with neither is alone. None if the store has no such rows.
    """
    alone, partitions = len(store) + np.arange(len(store)), []
    for modality in store.modalities:
        if (shared := store.shared_rows(modality)) is not None:
            partitions.append(np.where(store.present(modality), shared, alone))
    if (names := store.groups) is not None:
        partitions.append(np.where(names == "", alone, np.unique(names, return_inverse=True)[1]))
    return join_groups(partitions) if len(partitions) > 1 else next(iter(partitions), None)


def old_answers(dataset: str) -> CacheError:
    """Return the error for a store that does not tell how people spelt an answer on which all of them agree."""
    return CacheError(
        f"the store of {dataset} is too old to measure VQA accuracy: it lacks how answers were spelt; "
        f"run cachefuse extract {dataset_options(dataset)} again, which keeps the features"
    )


def open_training_data(
    store: FeatureStore, encoders: Sequence[str] = (), device: str = "auto", views: Views = pooled
) -> TrainingData:
    """Open the ``views`` of a store's features, by default of all encoders with complete features.

    A modality with several items per sample (captions) is left out if there is another modality. Raises CacheError or
    ConfigError if the features are missing, and ConfigError if the task has no head or only one class.
    """
    manifest = store.manifest
    if manifest.task not in TASK_LOSS:
        raise ConfigError(why_no_head(manifest.task))
    for task in manifest.task_slices(store.classes):
        if task.one_label and task.n_classes < 2:
            name = store.classes[task.columns][0]
            raise ConfigError(f"{task.name or store.dataset} has only the class {name!r}; a head needs at least 2")
    if not store.measures_answers:
        raise old_answers(store.dataset)  # now, not after the training
    features = select_features(store, encoders, views)
    single = {modality: group for modality, group in features.items() if not store.has_several(modality)}
    for modality in features.keys() - single.keys() if single else ():
        logger.warning(
            "%s has several %ss per sample and a head reads only one: they are ignored", store.dataset, modality
        )
    features = single or features
    return TrainingData.of(store, load_table(store, features, views).to(resolve_device(device)), features)


@dataclass(frozen=True)
class TrainingSet:
    """The training rows (n,) of one split, with their table.

    ``standardize`` is None if the table is already standardised in memory; otherwise it must be applied to batches.
    """

    table: FeatureTable
    rows: Tensor
    standardize: nn.ModuleDict | None

    @classmethod
    def prepare(cls, data: TrainingData, model: FusionModel, rows: Tensor) -> "TrainingSet":
        """Fit the model's statistics to rows (n,), and standardise the table in memory if it is small enough."""
        table, rows = data.table.only(model.specs), rows.to(data.device)
        model.fit_statistics(table.features, table.present, rows, table.feature_rows)
        in_memory = table.in_memory(model.standardize)
        return cls(in_memory or table, rows, model.standardize if in_memory is None else None)

    @property
    def targets(self) -> Tensor:
        """The rows' targets (n, C)."""
        return self.table.targets[self.rows]

    def only(self, names: Iterable[str]) -> "TrainingSet":
        """Return only the named features, and the rows that have at least one of them."""
        table = self.table.only(names)
        return replace(self, table=table, rows=self.rows[table.any_present(self.rows)])

    def read(self, name: str, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Return a feature of rows (B,), standardised, and its presence: see ``FeatureTable.batch``."""
        features, present = self.table.only([name]).batch(rows)
        x = features[name]
        if self.standardize is not None and name in self.standardize:
            x = self.standardize[name](x)
        return x, present[name]

    def reading(self, module: Any) -> Model:
        """Return a fusion, or one of its heads, as a model of the table's features."""
        return module if self.standardize is None else FusionModel(module, self.standardize)
