"""A run: a directory that holds everything prediction needs. JSON and safetensors only: opening one runs no code.

run.json              settings, classes, members with the features used and their keys, thresholds, metrics, versions
model.safetensors     each member's weights and the statistics of its training rows
history.json          loss and score of each epoch
held_out.safetensors  scores of the rows that the metrics are of, by models that have not seen them
README.md             the model card
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
import torch
from pydantic import TypeAdapter
from safetensors.torch import save
from torch import Tensor

from cachefuse.cache.store import FeatureStore
from cachefuse.data.manifest import Manifest
from cachefuse.errors import RunError
from cachefuse.fusion import FUSIONS
from cachefuse.fusion.base import modalities_of, split_name
from cachefuse.fusion.model import FusionModel
from cachefuse.metrics import TaskSlice, decide_tasks
from cachefuse.registry import HEADS, lookup
from cachefuse.runtime import to_json, write_atomically
from cachefuse.training.batches import FeatureTable
from cachefuse.training.card import model_card
from cachefuse.training.config import TrainConfig
from cachefuse.training.loop import History, predict_scores
from cachefuse.training.measure import HeldOut, Result
from cachefuse.training.run_files import (
    FORMATS,
    HEAD,
    HELD_ARRAYS,
    HELD_OUT,
    WEIGHTS,
    describe,
    describing,
    load_held_out,
    load_weights,
    read_json,
    write_run,
)
from cachefuse.training.used import UsedByName, UsedFeatures, widths_of

VERSIONS = ("cachefuse", "torch", "numpy", "scikit-learn", "zarr")


@dataclass(frozen=True)
class Member:
    """One model of a run: its settings, what it reads, and how much its scores weigh in the run's.

    ``fold`` is the part of the rows held out that it has not seen, where each model has one of its own.
    """

    config: TrainConfig
    features: UsedByName
    model: FusionModel
    weight: float
    fold: int | None = None


@dataclass
class Run:
    """A trained model, or several whose scores are averaged, with what it was trained on and how well it did.

    ``thresholds`` (C,) are what a label's score must reach. ``results`` are by split; "oof" is train and val, out of
    fold. ``histories`` are those of the models that ``held`` was measured by. ``sources`` names the runs that an
    ensemble was made of.
    """

    name: str
    dataset: str
    manifest: Manifest
    classes: tuple[str, ...]
    config: TrainConfig
    members: list[Member]
    thresholds: np.ndarray
    histories: list[History]
    held: HeldOut | None
    split_digest: str
    results: dict[str, Result] = field(default_factory=dict)
    sources: tuple[str, ...] = ()
    seconds: float = 0.0
    created: str = ""
    path: Path | None = None

    @property
    def task(self) -> str:
        return self.manifest.task

    @property
    def tasks(self) -> tuple[TaskSlice, ...]:
        """What its columns of scores are of."""
        return self.manifest.task_slices(self.classes)

    @property
    def several(self) -> bool:
        """Whether the dataset declares tasks, each with classes and metrics of its own."""
        return bool(self.manifest.tasks)

    @property
    def features(self) -> UsedByName:
        """What its members read, each once, by name."""
        union: dict[str, dict[UsedFeatures, None]] = {}
        for member in self.members:
            for name, group in member.features.items():
                union.setdefault(name, {}).update(dict.fromkeys(group))
        return {name: tuple(group) for name, group in sorted(union.items())}

    @property
    def modalities(self) -> tuple[str, ...]:
        """The modalities that its members read."""
        return modalities_of(self.features)

    @property
    def encoders(self) -> tuple[tuple[str, str], ...]:
        """The encoders that its features are of, each with its modality, once."""
        named = ((used.encoder, split_name(name)[0]) for name, group in self.features.items() for used in group)
        return tuple(dict.fromkeys(named))

    @property
    def metrics(self) -> dict[str, dict[str, float]]:
        return {split: result.metrics for split, result in self.results.items()}

    @property
    def interrupted(self) -> bool:
        return any(history.interrupted for history in self.histories)

    @property
    def n_parameters(self) -> int:
        return sum(member.model.n_parameters for member in self.members)

    @property
    def size_mb(self) -> float:
        """The models' size in MB (10^6 bytes), statistics included."""
        return sum(member.model.size_mb for member in self.members)

    def scores(self, table_of: Callable[[Member], FeatureTable], rows: Tensor) -> np.ndarray:
        """Return the members' mean probabilities (n, C) float32 of some rows of the tables that they read."""
        return self._mean(self.members, table_of, rows)

    def held_out_scores(self, table_of: Callable[[Member], FeatureTable]) -> np.ndarray:
        """Return what the members say (n, C) of the rows held out, each of those that it has not seen.

        Raises RunError if there are no such rows, or the members were trained on them since.
        """
        held, folds = self.held, [member.fold for member in self.members]
        if held is None:
            raise RunError(f"run {self.name} has no rows held out; train with --folds, or name a labelled --split")
        if self.config.refit or (self.sources and self.config.folds):
            raise RunError(f"the models of run {self.name} have seen the rows held out; name another labelled --split")
        rows = torch.from_numpy(held.rows)
        if None in folds:
            return self.scores(table_of, rows)
        scores = np.zeros((len(rows), len(self.classes)), np.float32)
        for fold in set(folds):
            mine = held.parts == fold
            blind = [member for member in self.members if member.fold == fold]
            scores[mine] = self._mean(blind, table_of, rows[mine])
        return scores

    def _mean(self, members: Sequence[Member], table_of: Callable[[Member], FeatureTable], rows: Tensor) -> np.ndarray:
        def scores(member: Member) -> np.ndarray:
            table = table_of(member)
            model = member.model.to(table.targets.device)
            return predict_scores(model, table, rows, member.config.resolve_loss(self.task), self.tasks)

        if len(members) == 1:
            return scores(members[0])
        total = np.zeros((len(rows), len(self.classes)))
        weights = sum(member.weight for member in members)
        for member in members:
            total += member.weight / weights * scores(member).astype(np.float64)
        return total.astype(np.float32)

    def decide(self, scores: np.ndarray) -> np.ndarray:
        """Return the labels (n, C) bool that scores (n, C) come to."""
        return decide_tasks(scores, self.tasks, self.thresholds)

    def save(self, runs: Path) -> Path:
        """Write the run under ``runs`` in a new directory that is whole or not there at all; its card comes last."""
        self.created = datetime.now(UTC).isoformat(timespec="milliseconds")
        tensors = {
            f"{i}.{name}": tensor.cpu().contiguous()
            for i, member in enumerate(self.members)
            for name, tensor in member.model.state_dict().items()
        }
        files = {WEIGHTS: save(tensors)}
        if self.held is not None:
            arrays = {name: getattr(self.held, name) for name in HELD_ARRAYS}
            files[HELD_OUT] = safetensors.numpy.save(arrays, {"split": self.held.split})
        files["history.json"] = to_json({"histories": [asdict(history) for history in self.histories]}).encode()
        files["run.json"] = to_json(self._to_dict()).encode()
        self.path = write_run(runs, self.name, files)
        self.name = self.path.name
        write_atomically(self.path / "README.md", model_card(self).encode())
        return self.path

    def _to_dict(self) -> dict[str, Any]:
        return {
            "kind": HEAD,
            "format": FORMATS[HEAD],
            "created": self.created,
            "dataset": self.dataset,
            "manifest": self.manifest.model_dump(mode="json", by_alias=True, exclude_defaults=True),
            "classes": list(self.classes),
            "config": self.config.to_dict(),
            "members": [
                {
                    "config": member.config.to_dict(),
                    "features": {name: [asdict(used) for used in group] for name, group in member.features.items()},
                    "weight": member.weight,
                    "fold": member.fold,
                }
                for member in self.members
            ],
            "sources": list(self.sources),
            "thresholds": self.thresholds.tolist(),
            "split_digest": self.split_digest,
            "interrupted": self.interrupted,
            "results": {split: asdict(result) for split, result in self.results.items()},
            "seconds": round(self.seconds, 3),
            "parameters": self.n_parameters,
            "size_mb": round(self.size_mb, 6),
            "versions": {name: version(name) for name in VERSIONS},
        }

    @classmethod
    def load(cls, path: Path) -> "Run":
        """Open a run directory. Raises RunError, naming the file, if it is incomplete or was edited into nonsense."""
        about = describe(path)
        with describing(path / "run.json"):
            config = TrainConfig.from_dict(about.config)
            tasks = about.manifest.task_slices(about.classes)
            members = []
            for member in about.members:
                settings = TrainConfig.from_dict(member.config)
                settings.resolve_loss(about.manifest.task)
                widths = widths_of(member.features)
                with torch.device("meta"):  # shapes only: no memory is taken before the weights' file shows its own
                    model = build_model(settings, widths, len(about.classes), tasks)
                members.append(Member(settings, member.features, model, member.weight, member.fold))
        values = read_json(path / "history.json")
        with describing(path / "history.json"):
            histories = TypeAdapter(list[History]).validate_python(values["histories"])
        load_weights([member.model for member in members], path / WEIGHTS)
        return cls(
            name=path.resolve().name,
            dataset=about.dataset,
            manifest=about.manifest,
            classes=about.classes,
            config=config,
            members=members,
            thresholds=np.array(about.thresholds),
            histories=histories,
            held=load_held_out(path / HELD_OUT, len(about.classes), [member.fold for member in members]),
            split_digest=about.split_digest,
            results={split: Result(**result.model_dump()) for split, result in about.results.items()},
            sources=about.sources,
            seconds=about.seconds,
            created=about.created,
            path=path,
        )


def build_model(
    config: TrainConfig, widths: Mapping[str, int], n_classes: int, tasks: Sequence[TaskSlice] = ()
) -> FusionModel:
    """Build the untrained model that the settings describe, for features of the given widths by name.

    Its logits are those of ``n_classes``; a fusion that has parts for each of several ``tasks`` is told of them.
    """
    head = partial(lookup(HEADS, config.head, "head"), **config.head_options())
    fusion, options = lookup(FUSIONS, config.fusion, "fusion"), config.own_options()
    named = {task.name: task.n_classes for task in tasks if task.name}
    if named and fusion.per_task:
        options["tasks"] = named
    return FusionModel(fusion(dict(widths), n_classes, head, **options))


def split_digest(store: FeatureStore) -> str:
    """Hash which sample, by id and content, is in which split: whether two runs were measured on the same rows."""
    digest = hashlib.blake2b(digest_size=8)
    for row in zip(store.ids, store.splits, store.digests, strict=True):
        digest.update(("\0".join(row) + "\n").encode("utf-8", "surrogatepass"))
    return digest.hexdigest()
