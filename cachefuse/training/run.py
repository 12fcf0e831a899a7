"""A run: a directory that holds everything prediction needs. JSON and safetensors only: opening one runs no code.

run.json            settings, classes, the features used and their keys, metrics, versions
model.safetensors   weights and the training rows' statistics
history.json        loss and score of each epoch
"""

import json
import logging
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import BaseModel, BeforeValidator, TypeAdapter, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from cachefuse.cache.store import Features, FeatureStore
from cachefuse.data.manifest import Manifest
from cachefuse.errors import RunError
from cachefuse.fusion import FUSIONS
from cachefuse.fusion.model import FusionModel
from cachefuse.registry import HEADS, lookup
from cachefuse.runtime import slug, to_json, write_atomically
from cachefuse.training.config import TrainConfig
from cachefuse.training.loop import History

logger = logging.getLogger(__name__)

FORMAT = 1
VERSIONS = ("cachefuse", "torch", "numpy", "scikit-learn", "zarr")


@dataclass(frozen=True)
class UsedFeatures:
    """One encoder's pooled features that a run was trained on; ``source`` opens the encoder again."""

    encoder: str
    source: str
    key: str
    dtype: str
    width: int


# JSON has no NaN: a figure that is not defined is null there.
Figure = Annotated[float, BeforeValidator(lambda value: float("nan") if value is None else value)]


class _Description(BaseModel):
    """The part of run.json that is read back."""

    dataset: str
    created: str
    manifest: Manifest
    classes: tuple[str, ...]
    config: dict[str, Any]
    features: dict[str, tuple[UsedFeatures, ...]]
    rows: dict[str, int]
    metrics: dict[str, dict[str, Figure]]
    per_class: dict[str, dict[str, list[Figure]]]
    split_digest: str
    seconds: float


@dataclass
class Run:
    """A trained model with what it was trained on and how well it did.

    metrics: split -> metric -> value. per_class: split -> figure -> one value a class. features: by modality.
    """

    name: str
    dataset: str
    manifest: Manifest
    classes: tuple[str, ...]
    config: TrainConfig
    features: dict[str, tuple[UsedFeatures, ...]]
    model: FusionModel
    history: History
    rows: dict[str, int]
    metrics: dict[str, dict[str, float]]
    per_class: dict[str, dict[str, list[float]]]
    split_digest: str
    seconds: float
    created: str = ""
    path: Path | None = None

    @property
    def task(self) -> str:
        return self.manifest.task

    @property
    def loss(self) -> str:
        return self.config.resolve_loss(self.task)

    @property
    def n_parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.model.parameters())

    @property
    def size_mb(self) -> float:
        """The model's size in MB (10^6 bytes), statistics included."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.model.state_dict().values()) / 1e6

    def save(self, runs: Path) -> Path:
        """Write the run under ``runs`` in a new directory that is whole or not there at all."""
        self.created = datetime.now(UTC).isoformat(timespec="milliseconds")
        runs.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=runs, prefix=".new-") as temporary:
            folder = Path(temporary) / "run"
            folder.mkdir()
            tensors = {name: tensor.cpu().contiguous() for name, tensor in self.model.state_dict().items()}
            save_file(tensors, folder / "model.safetensors")
            write_atomically(folder / "history.json", to_json(asdict(self.history)).encode())
            write_atomically(folder / "run.json", to_json(self._to_dict()).encode())
            self.path = _move_to_free(folder, runs / slug(self.name))
        self.name = self.path.name
        return self.path

    def _to_dict(self) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "created": self.created,
            "dataset": self.dataset,
            "manifest": self.manifest.model_dump(mode="json", by_alias=True, exclude_defaults=True),
            "classes": list(self.classes),
            "config": {**self.config.to_dict(), "loss": self.loss},
            "features": {modality: [asdict(used) for used in group] for modality, group in self.features.items()},
            "rows": self.rows,
            "split_digest": self.split_digest,
            "best_epoch": self.history.best_epoch,
            "interrupted": self.history.interrupted,
            "metrics": self.metrics,
            "per_class": self.per_class,
            "seconds": round(self.seconds, 3),
            "parameters": self.n_parameters,
            "size_mb": round(self.size_mb, 6),
            "versions": {name: version(name) for name in VERSIONS},
        }

    @classmethod
    def load(cls, path: Path) -> "Run":
        """Open a run directory. Raises RunError, naming the file, if it is incomplete or was edited into nonsense."""
        values = _read_json(path / "run.json")
        if values.get("format") != FORMAT:
            raise RunError(f"{path}: run of another version (format {values.get('format')}, not {FORMAT})")
        with _describing(path / "run.json"):
            about = _Description.model_validate(values)
            config = TrainConfig.from_dict(about.config)
            config.resolve_loss(about.manifest.task)
            widths = {modality: sum(used.width for used in group) for modality, group in about.features.items()}
            with torch.device("meta"):  # shapes only: no memory is taken before the weights' file shows its own
                model = build_model(config, widths, len(about.classes))
        values = _read_json(path / "history.json")
        with _describing(path / "history.json"):
            history = TypeAdapter(History).validate_python(values)
        _load_weights(model, path / "model.safetensors")
        return cls(
            name=path.resolve().name,
            dataset=about.dataset,
            manifest=about.manifest,
            classes=about.classes,
            config=config,
            features=about.features,
            model=model,
            history=history,
            rows=about.rows,
            metrics=about.metrics,
            per_class=about.per_class,
            split_digest=about.split_digest,
            seconds=about.seconds,
            created=about.created,
            path=path,
        )


def build_model(config: TrainConfig, widths: Mapping[str, int], n_classes: int) -> FusionModel:
    """Build the untrained model that the settings describe, for features of the given widths by modality."""
    head = partial(lookup(HEADS, config.head, "head"), **config.head_options())
    return FusionModel(lookup(FUSIONS, config.fusion, "fusion")(dict(widths), n_classes, head))


def used_features(chosen: Mapping[str, list[Features]]) -> dict[str, tuple[UsedFeatures, ...]]:
    """Describe the features that a run is trained on."""
    return {
        modality: tuple(
            UsedFeatures(f.encoder, f.source, f.key, f.provenance["dtype"], f.views["pooled"].row_shape[0])
            for f in group
        )
        for modality, group in chosen.items()
    }


def match_features(run: Run, store: FeatureStore) -> dict[str, list[Features]]:
    """Return a store's features that a run was trained on. Raises RunError if the store has others or none."""
    if store.classes != run.classes:
        raise RunError(f"run {run.name} was trained on other classes than {store.path} has now; train again")
    matched: dict[str, list[Features]] = {}
    for modality, group in run.features.items():
        for used in group:
            features = store.open_features(used.encoder, modality)
            if features is None:
                raise RunError(f"run {run.name} was trained on {used.encoder} ({modality}), which {store.path} lacks")
            if features.key != used.key:
                raise RunError(
                    f"run {run.name} was trained on another store: its {used.encoder} ({modality}) features were made "
                    f"differently from those in {store.path}; train again, or take the store it was trained on"
                )
            matched.setdefault(modality, []).append(features)
    return matched


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


def _load_weights(model: nn.Module, path: Path) -> None:
    try:
        model.load_state_dict(load_file(path), assign=True)
        model.float()
    except FileNotFoundError:
        raise RunError(f"{path} is not there: {path.parent} is not a whole run") from None
    except (SafetensorError, RuntimeError, OSError) as error:
        reason = str(error).splitlines()[-1].strip()
        raise RunError(f"{path}: the weights don't fit the run's settings: {reason}") from error


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
