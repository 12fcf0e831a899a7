"""An alignment as a run: a directory with its settings, weights, history and figures. JSON and safetensors only."""

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Annotated

import torch
from pydantic import BaseModel, Field, TypeAdapter
from safetensors.torch import save

from cachefuse.alignment.config import AlignConfig
from cachefuse.alignment.model import Aligner
from cachefuse.data.dataset import MODALITY
from cachefuse.data.splits import USUAL, ordered_splits
from cachefuse.files import JsonObject, to_json
from cachefuse.runs.files import DatasetName, Figure, load_weights, named_errors, newest_first
from cachefuse.runs.folder import (
    ABOUT,
    ALIGNMENT,
    FORMATS,
    HISTORY,
    WEIGHTS,
    RunFolder,
    time_of_creation,
    write_run,
)
from cachefuse.settings import with_older
from cachefuse.store.features import Features
from cachefuse.training.data import VAL
from cachefuse.training.loop import History

VERSIONS = ("cachefuse", "torch", "numpy", "zarr")
MAX_WIDTH = 1 << 20  # of the features of a side in run.json
CHOSE_EPOCH = "val also chose the epoch, so its figures may be too high; test rows chose nothing"


@dataclass(frozen=True)
class AlignmentSide:
    """The features that one side of an alignment reads; ``source`` opens their encoder."""

    modality: Annotated[str, Field(pattern=f"^{MODALITY.pattern}$")]
    encoder: str
    source: str
    key: str
    dtype: Annotated[str, Field(pattern="^float(16|32)$")]
    width: Annotated[int, Field(ge=1, le=MAX_WIDTH)]

    @classmethod
    def of(cls, features: Features, view: str) -> "AlignmentSide":
        return cls(
            features.modality,
            features.encoder,
            features.source,
            features.key,
            features.provenance["dtype"],
            features.views[view].row_shape[-1],
        )


@dataclass(frozen=True)
class Direction:
    """Retrieval of one side by the other: figures of ``n_queries`` queries among ``n_gallery`` items.

    ``recall`` and ``chance``, the recall of a random order, are by k. ``curve`` has (k, precision). Precision within
    the top k is the share of queries with an item of their own sample there (CBMF, figure 4): the recall at k.
    ``median_rank`` counts from 1.
    """

    n_queries: int
    n_gallery: int
    recall: dict[int, Figure]
    chance: dict[int, Figure]
    median_rank: Figure
    curve: tuple[tuple[int, Figure], ...]


@dataclass(frozen=True)
class Retrieval:
    """Figures of a split: each direction's, and the modality gap before and after training."""

    n_samples: int
    directions: dict[str, Direction]
    gap_before: Figure
    gap_after: Figure


@dataclass
class Alignment:
    """An alignment of two encoders: a model that maps both sides' features to one space. ``results`` are by split."""

    name: str
    dataset: str
    config: AlignConfig
    sides: tuple[AlignmentSide, AlignmentSide]
    model: Aligner
    history: History
    results: dict[str, Retrieval] = field(default_factory=dict)
    split_digest: str = ""
    seconds: float = 0.0
    created: str = ""
    parent: str = ""  # the alignment that was fine-tuned to this one
    val_chose: bool = False  # whether val rows of its dataset chose an epoch that is not the last one
    path: Path | None = None

    @property
    def caution(self) -> str | None:
        """Why figures of val may be too high: val chose the epoch. None if it did not."""
        return CHOSE_EPOCH if self.val_chose else None

    @property
    def same_texts(self) -> bool:
        """Whether both sides encode the same texts."""
        return self.sides[0].modality == self.sides[1].modality

    @property
    def side_names(self) -> tuple[str, str]:
        """The sides' names in tables: their modalities, or "first" and "second" if both encode the same texts."""
        return ("first", "second") if self.same_texts else (self.sides[0].modality, self.sides[1].modality)

    def save(self, runs: Path, *, unfinished: bool = False) -> Path:
        """Write the run to a new directory in ``runs``, atomically, and return its path.

        An ``unfinished`` one counts as a run once a head that reads it is saved.
        """
        self.created = time_of_creation(runs)
        tensors = {f"0.{name}": tensor.cpu().contiguous() for name, tensor in self.model.state_dict().items()}
        about = {
            "kind": ALIGNMENT,
            "format": FORMATS[ALIGNMENT],
            "created": self.created,
            "dataset": self.dataset,
            "config": self.config.to_dict(),
            "sides": [asdict(side) for side in self.sides],
            "results": {split: asdict(result) for split, result in self.results.items()},
            "val_chose": self.val_chose,
            "caution": self.caution,
            "split_digest": self.split_digest,
            "interrupted": self.history.interrupted,
            "parent": self.parent,
            "seconds": round(self.seconds, 3),
            "parameters": self.model.n_parameters,
            "size_mb": round(self.model.size_mb, 6),
            "versions": {name: version(name) for name in VERSIONS},
        }
        files = {WEIGHTS: save(tensors), HISTORY: to_json(asdict(self.history)).encode()}
        self.path = write_run(runs, self.name, about, files, unfinished=unfinished)
        self.name = self.path.name
        return self.path

    @classmethod
    def load(cls, path: Path) -> "Alignment":
        """Open a run directory. Raises RunError, naming the file, if it is incomplete, damaged or invalid."""
        folder = RunFolder.open(path, ALIGNMENT)
        about = read_description(folder)
        with named_errors(path / ABOUT):
            config = AlignConfig.from_dict(with_older(AlignConfig, about.config))
            with torch.device("meta"):  # no memory is allocated before the weights' file has shown these shapes
                model = Aligner([side.width for side in about.sides], config)
        values = folder.read_json(HISTORY)
        with named_errors(path / HISTORY):
            history = TypeAdapter(History).validate_python(values)
        load_weights([model], folder)
        return cls(
            name=path.resolve().name,
            dataset=about.dataset,
            config=config,
            sides=about.sides,
            model=model.eval(),
            history=history,
            results=about.results,
            split_digest=about.split_digest,
            seconds=about.seconds,
            created=about.created,
            parent=about.parent,
            val_chose=chose_epoch(history) if about.val_chose is None else about.val_chose,
            path=path,
        )


class Description(BaseModel):
    """The fields of run.json that are read back."""

    dataset: DatasetName
    created: str
    config: JsonObject
    sides: tuple[AlignmentSide, AlignmentSide]
    results: dict[str, Retrieval]
    split_digest: str
    parent: str
    val_chose: bool | None = None  # None in runs of older versions
    seconds: float
    size_mb: float


@dataclass(frozen=True)
class AlignmentSummary:
    """An alignment in a list, from its run.json; ``recall_at_1`` is by direction, on ``split``."""

    name: str
    path: Path
    created: str
    dataset: str
    encoders: tuple[str, str]
    label: str
    split: str | None
    recall_at_1: Mapping[str, float]
    size_mb: float
    caution: str | None = None  # why the figures may be too high


def shown_split(splits: Iterable[str]) -> str | None:
    """Return the split to show where only one is shown: test, else val, else the first."""
    known = ordered_splits(splits)
    return next((name for name in USUAL[:0:-1] if name in known), known[0] if known else None)


def read_description(run: RunFolder) -> Description:
    """Return an alignment's checked run.json. Raises RunError, naming the key, for an invalid value."""
    with named_errors(run.path / ABOUT):
        return Description.model_validate(run.values)


def list_alignments(runs: Path) -> list[AlignmentSummary]:
    """Return the alignments in a directory, the newest first; damaged ones are skipped, with a warning."""
    return newest_first(runs, ALIGNMENT, _summarize)


def _summarize(run: RunFolder) -> AlignmentSummary:
    about, path = read_description(run), run.path
    with named_errors(path / ABOUT):
        config = AlignConfig.from_dict(with_older(AlignConfig, about.config))
    split = shown_split(about.results)
    directions = about.results[split].directions if split else {}
    return AlignmentSummary(
        name=path.name,
        path=path,
        created=about.created,
        dataset=about.dataset,
        encoders=(about.sides[0].encoder, about.sides[1].encoder),
        label=config.label,
        split=split,
        recall_at_1={name: direction.recall.get(1, float("nan")) for name, direction in directions.items()},
        size_mb=about.size_mb,
        caution=CHOSE_EPOCH if split == VAL and about.val_chose is not False else None,
    )


def chose_epoch(history: History) -> bool:
    """Whether validation chose the epoch: one that is not the best so far makes a difference."""
    return not all(epoch.best for epoch in history.epochs)
