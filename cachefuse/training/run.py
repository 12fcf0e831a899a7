"""A run: a directory that holds everything prediction needs. JSON and safetensors only: opening one runs no code.

run.json              settings, classes, members with the features used and their keys, thresholds, metrics, versions
model.safetensors     each member's weights and the statistics of its training rows
history.json          loss and score of each epoch
held_out.safetensors  scores of the rows that the metrics are of, by models that have not seen them
README.md             the model card
"""

import hashlib
import json
import logging
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import safetensors.numpy
import torch
from pydantic import BaseModel, BeforeValidator, TypeAdapter, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from cachefuse.cache.features import Features
from cachefuse.cache.rows import TokenWidth
from cachefuse.cache.store import FeatureStore
from cachefuse.data.manifest import Manifest
from cachefuse.errors import RunError
from cachefuse.fusion import FUSIONS
from cachefuse.fusion.model import FusionModel
from cachefuse.metrics import decide
from cachefuse.registry import HEADS, lookup
from cachefuse.runtime import slug, to_json, write_atomically
from cachefuse.training.batches import FeatureTable, load_table
from cachefuse.training.card import model_card
from cachefuse.training.config import TrainConfig
from cachefuse.training.loop import History, predict_scores
from cachefuse.training.measure import HeldOut, Result

logger = logging.getLogger(__name__)

FORMAT = 2
WEIGHTS, HELD_OUT = "model.safetensors", "held_out.safetensors"
FILES = ("run.json", "history.json", WEIGHTS)  # that every run has
HELD_ARRAYS = ("rows", "parts", "scores")
VERSIONS = ("cachefuse", "torch", "numpy", "scikit-learn", "zarr")


@dataclass(frozen=True)
class UsedFeatures:
    """One encoder's features that a run was trained on; ``source`` opens the encoder again.

    ``tokens`` is the number of tokens that lie side by side in their width, 0 for pooled features.
    """

    encoder: str
    source: str
    key: str
    dtype: str
    width: int
    tokens: int = 0

    @property
    def view(self) -> str:
        return "tokens" if self.tokens else "pooled"


UsedByModality = dict[str, tuple[UsedFeatures, ...]]


@dataclass(frozen=True)
class Member:
    """One model of a run: its settings, what it reads, and how much its scores weigh in the run's.

    ``fold`` is the part of the rows held out that it has not seen, where each model has one of its own.
    """

    config: TrainConfig
    features: UsedByModality
    model: FusionModel
    weight: float
    fold: int | None = None


# JSON has no NaN: a figure that is not defined is null there.
Figure = Annotated[float, BeforeValidator(lambda value: float("nan") if value is None else value)]


class _Result(BaseModel):
    n_rows: int
    metrics: dict[str, Figure]
    per_class: dict[str, list[Figure]]


class _Member(BaseModel):
    config: dict[str, Any]
    features: UsedByModality
    weight: float
    fold: int | None


class _Description(BaseModel):
    """The part of run.json that is read back."""

    dataset: str
    created: str
    manifest: Manifest
    classes: tuple[str, ...]
    config: dict[str, Any]
    members: list[_Member]
    sources: tuple[str, ...]
    thresholds: list[float]
    results: dict[str, _Result]
    split_digest: str
    seconds: float
    size_mb: float


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
    def features(self) -> UsedByModality:
        """What its members read, each once."""
        union: dict[str, dict[UsedFeatures, None]] = {}
        for member in self.members:
            for modality, group in member.features.items():
                union.setdefault(modality, {}).update(dict.fromkeys(group))
        return {modality: tuple(group) for modality, group in sorted(union.items())}

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
        if self.config.refit or self.sources:
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
        total = np.zeros((len(rows), len(self.classes)))
        weights = sum(member.weight for member in members)
        for member in members:
            table = table_of(member)
            model = member.model.to(table.targets.device)
            loss = member.config.resolve_loss(self.task)
            total += member.weight / weights * predict_scores(model, table, rows, loss).astype(np.float64)
        return total.astype(np.float32)

    def decide(self, scores: np.ndarray) -> np.ndarray:
        """Return the labels (n, C) bool that scores (n, C) come to."""
        return decide(scores, self.task, self.thresholds, self.manifest.min_labels)

    def save(self, runs: Path) -> Path:
        """Write the run under ``runs`` in a new directory that is whole or not there at all."""
        self.created = datetime.now(UTC).isoformat(timespec="milliseconds")
        runs.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=runs, prefix=".new-") as temporary:
            folder = Path(temporary) / "run"
            folder.mkdir()
            tensors = {
                f"{i}.{name}": tensor.cpu().contiguous()
                for i, member in enumerate(self.members)
                for name, tensor in member.model.state_dict().items()
            }
            save_file(tensors, folder / WEIGHTS)
            if self.held is not None:
                arrays = {name: getattr(self.held, name) for name in HELD_ARRAYS}
                safetensors.numpy.save_file(arrays, folder / HELD_OUT, {"split": self.held.split})
            histories = {"histories": [asdict(history) for history in self.histories]}
            write_atomically(folder / "history.json", to_json(histories).encode())
            write_atomically(folder / "run.json", to_json(self._to_dict()).encode())
            self.path = _move_to_free(folder, runs / slug(self.name))
        self.name = self.path.name
        write_atomically(self.path / "README.md", model_card(self).encode())
        return self.path

    def _to_dict(self) -> dict[str, Any]:
        return {
            "format": FORMAT,
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
        about = _describe(path)
        with _describing(path / "run.json"):
            config = TrainConfig.from_dict(about.config)
            _check_shapes(about)
            members = []
            for member in about.members:
                settings = TrainConfig.from_dict(member.config)
                settings.resolve_loss(about.manifest.task)
                widths = {modality: _width(group) for modality, group in member.features.items()}
                with torch.device("meta"):  # shapes only: no memory is taken before the weights' file shows its own
                    model = build_model(settings, widths, len(about.classes))
                members.append(Member(settings, member.features, model, member.weight, member.fold))
        values = _read_json(path / "history.json")
        with _describing(path / "history.json"):
            histories = TypeAdapter(list[History]).validate_python(values["histories"])
        _load_weights(members, path / WEIGHTS)
        return cls(
            name=path.resolve().name,
            dataset=about.dataset,
            manifest=about.manifest,
            classes=about.classes,
            config=config,
            members=members,
            thresholds=np.array(about.thresholds),
            histories=histories,
            held=_load_held_out(path / HELD_OUT, len(about.classes)),
            split_digest=about.split_digest,
            results={split: Result(**result.model_dump()) for split, result in about.results.items()},
            sources=about.sources,
            seconds=about.seconds,
            created=about.created,
            path=path,
        )


@dataclass(frozen=True)
class RunSummary:
    """What run.json says of a run: ``metrics`` are those of the ``n_rows`` held out, ``split`` says which those were.

    Without such rows ``split`` is None.
    """

    name: str
    path: Path
    created: str
    dataset: str
    n_models: int
    split: str | None
    n_rows: int
    metrics: dict[str, float]
    size_mb: float


def build_model(config: TrainConfig, widths: Mapping[str, int], n_classes: int) -> FusionModel:
    """Build the untrained model that the settings describe, for features of the given widths by modality."""
    head = partial(lookup(HEADS, config.head, "head"), **config.head_options())
    return FusionModel(lookup(FUSIONS, config.fusion, "fusion")(dict(widths), n_classes, head))


def used_features(chosen: Mapping[str, Sequence[Features]], widths: Mapping[str, int]) -> UsedByModality:
    """Describe the features that a run is trained on, of the given widths by modality."""

    def describe(f: Features, width: int) -> UsedFeatures:
        tokens = width.n_tokens if isinstance(width, TokenWidth) else 0
        return UsedFeatures(
            encoder=f.encoder,
            source=f.source,
            key=f.key,
            dtype=f.provenance["dtype"],
            width=int(width) if tokens else f.views["pooled"].row_shape[0],
            tokens=tokens,
        )

    return {modality: tuple(describe(f, widths[modality]) for f in group) for modality, group in chosen.items()}


def _width(group: Sequence[UsedFeatures]) -> int:
    """Return the width of features side by side. Raises RunError for tokens of several encoders, or not whole ones."""
    width, tokens = sum(used.width for used in group), group[0].tokens if group else 0
    if tokens and (len(group) > 1 or tokens < 0 or width % tokens):
        raise RunError(f"{width} numbers a sample are not {tokens} tokens of one encoder")
    return TokenWidth(width, tokens) if tokens else width


def open_table(run: Run, used: UsedByModality, store: FeatureStore) -> FeatureTable:
    """Open a store's features as a run's member reads them. Raises RunError if the store has others or none."""
    chosen = match_features(run, used, store)
    n_tokens = {modality: group[0].tokens for modality, group in used.items()}
    return load_table(store, chosen, "tokens" if any(n_tokens.values()) else "pooled", n_tokens)


def match_features(run: Run, used: UsedByModality, store: FeatureStore) -> dict[str, list[Features]]:
    """Return a store's features that a run's member reads. Raises RunError if the store has others or none."""
    if store.classes != run.classes:
        raise RunError(f"run {run.name} was trained on other classes than {store.path} has now; train again")
    matched: dict[str, list[Features]] = {}
    for modality, group in used.items():
        for one in group:
            features = store.open_features(one.encoder, modality)
            if features is None:
                raise RunError(f"run {run.name} was trained on {one.encoder} ({modality}), which {store.path} lacks")
            if features.key != one.key:
                raise RunError(
                    f"run {run.name} was trained on another store: its {one.encoder} ({modality}) features were made "
                    f"differently from those in {store.path}; train again, or take the store it was trained on"
                )
            matched.setdefault(modality, []).append(features)
    return matched


def split_digest(store: FeatureStore) -> str:
    """Hash which id is in which split, so that two runs can tell whether they were measured on the same rows."""
    digest = hashlib.blake2b(digest_size=8)
    for sample, split in zip(store.ids, store.splits, strict=True):
        digest.update(f"{sample}\0{split}\n".encode("utf-8", "surrogatepass"))
    return digest.hexdigest()


def find_run(runs: Path, name: str | None = None) -> Path:
    """Return a run's directory: by name or path, or the one made last. Raises RunError if there is none."""
    if name is not None:
        for path in (runs / name, Path(name)):
            if (path / "run.json").is_file():
                return path
        known = ", ".join(sorted(path.parent.name for path in runs.glob("*/run.json"))) or "none yet"
        raise RunError(f"no run {name!r} in {runs}; the runs are: {known}")
    made = []
    for path in runs.glob("*/run.json"):
        try:
            made.append((str(_read_json(path).get("created", "")), path.parent))
        except RunError as error:
            logger.warning("passed over: %s", error)
    if not made:
        raise RunError(f"no runs in {runs}; train one with cachefuse train-head")
    return max(made)[1]


def list_runs(runs: Path) -> list[RunSummary]:
    """Return the runs in a directory, the one made last first. Damaged ones are passed over, with a warning.

    Reads no weights.
    """
    found = []
    for path in sorted({path.parent for name in FILES for path in runs.glob(f"*/{name}")}):
        try:
            found.append(_summarize(path))
        except RunError as error:
            logger.warning("passed over: %s", error)
    return sorted(found, key=lambda run: (run.created, run.name), reverse=True)


def _summarize(path: Path) -> RunSummary:
    about = _describe(path)
    for name in FILES:
        if not (path / name).is_file():
            raise RunError(f"{path / name} is not there: {path} is not a whole run")
    split = next((split for split in ("oof", "val") if split in about.results), None)
    return RunSummary(
        name=path.name,
        path=path,
        created=about.created,
        dataset=about.dataset,
        n_models=len(about.members),
        split=split,
        n_rows=about.results[split].n_rows if split else 0,
        metrics=about.results[split].metrics if split else {},
        size_mb=about.size_mb,
    )


def _describe(path: Path) -> _Description:
    values = _read_json(path / "run.json")
    if values.get("format") != FORMAT:
        raise RunError(f"{path}: run of another version (format {values.get('format')}, not {FORMAT})")
    with _describing(path / "run.json"):
        return _Description.model_validate(values)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise RunError(f"{path} is not there: {path.parent} is not a run, or not a whole one") from None
    except (ValueError, OSError, RecursionError) as error:
        raise RunError(f"{path}: can't be read: {error}") from error
    if not isinstance(values, dict):
        raise RunError(f"{path}: must hold a JSON object. Got {type(values).__name__} instead")
    return values


@contextmanager
def _describing(path: Path) -> Iterator[None]:
    """Turn whatever an edited file leads to, in torch as well, into one line that names it."""
    try:
        yield
    except ValidationError as error:
        problem = error.errors()[0]
        key = ".".join(str(part) for part in problem["loc"])
        raise RunError(f"{path}: not a run's description: {key}: {problem['msg']}") from error
    except Exception as error:
        raise RunError(f"{path}: not a run's description: {error}") from error


def _check_shapes(about: _Description) -> None:
    if len(about.thresholds) != len(about.classes):
        raise RunError(f"{len(about.thresholds)} thresholds for {len(about.classes)} classes")
    if not about.members or not sum(member.weight for member in about.members) > 0:
        raise RunError("members: there are none")


def _load_weights(members: Sequence[Member], path: Path) -> None:
    try:
        tensors = load_file(path)
        for i, member in enumerate(members):
            mine = {name: tensors.pop(name) for name in list(tensors) if name.startswith(f"{i}.")}
            member.model.load_state_dict({name.partition(".")[2]: x for name, x in mine.items()}, assign=True)
            member.model.float()
        if tensors:
            raise RuntimeError(f"unexpected weights: {', '.join(sorted(tensors)[:3])}")
    except FileNotFoundError:
        raise RunError(f"{path} is not there: {path.parent} is not a whole run") from None
    except (SafetensorError, RuntimeError, OSError) as error:
        reason = str(error).splitlines()[-1].strip()
        raise RunError(f"{path}: the weights don't fit the run's settings: {reason}") from error


def _load_held_out(path: Path, n_classes: int) -> HeldOut | None:
    """Return the scores of the rows held out, or None where none were. Raises RunError if they don't fit together."""
    if not path.is_file():
        return None
    try:
        with safetensors.safe_open(path, "np") as file:
            split = (file.metadata() or {}).get("split", "")
            rows, parts, scores = (file.get_tensor(name) for name in HELD_ARRAYS)
    except (SafetensorError, OSError, ValueError) as error:
        raise RunError(f"{path}: can't be read: {error}") from error
    if rows.ndim != 1 or rows.shape != parts.shape or scores.shape != (len(rows), n_classes):
        raise RunError(f"{path}: rows, parts and scores don't fit together, or the run's {n_classes} classes")
    return HeldOut(split, rows, parts, scores)


def _move_to_free(folder: Path, name: Path) -> Path:
    """Move a folder to the first of name-1, name-2, ... that is free; another process may take one at any moment."""
    number = 1
    while True:
        path = name.with_name(f"{name.name}-{number}")
        try:
            if not path.exists():
                return folder.rename(path)
        except OSError:
            if not path.exists():
                raise
        number += 1
