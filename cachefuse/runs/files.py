"""The files of a run as they are read back, each checked; and the runs in a directory, found by their files."""

import json
import logging
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Protocol, TypeVar

import numpy as np
import safetensors
from pydantic import AfterValidator, BaseModel, BeforeValidator, Field, FiniteFloat, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from cachefuse.data.manifest import Manifest
from cachefuse.errors import RunError
from cachefuse.files import JsonObject, slug, write_atomically
from cachefuse.runs.features import RunFeaturesByName, add_views
from cachefuse.training.data import OUT_OF_FOLD, VAL
from cachefuse.training.held_out import HeldOut
from cachefuse.training.resolved import ResolvedConfig

logger = logging.getLogger(__name__)


HEAD, ALIGNMENT = "head", "alignment"  # kinds of runs
FORMATS = {HEAD: 3, ALIGNMENT: 1}
USES = {
    HEAD: "is a head, which predicts: take cachefuse predict, evaluate or report",
    ALIGNMENT: "is an alignment, without classes: take cachefuse retrieve, zero-shot, similarity, evaluate or report",
}
HOW_TO_MAKE = {HEAD: "train one with cachefuse train-head", ALIGNMENT: "make one with cachefuse align"}
WEIGHTS, HELD_OUT = "model.safetensors", "held_out.safetensors"
FILES = ("run.json", "history.json", WEIGHTS)  # that every run has
HELD_ARRAYS = ("rows", "parts", "scores")

# JSON has no NaN: a figure that is not defined is null there.
Figure = Annotated[float, BeforeValidator(lambda value: float("nan") if value is None else value)]


class _Dated(Protocol):
    @property
    def name(self) -> str: ...
    @property
    def created(self) -> str: ...


Summary = TypeVar("Summary", bound=_Dated)


class _Result(BaseModel):
    n_rows: int
    metrics: dict[str, Figure]
    per_class: dict[str, list[Figure]]


class _Member(BaseModel):
    config: JsonObject
    features: Annotated[RunFeaturesByName, BeforeValidator(add_views)]
    weight: float = Field(gt=0, allow_inf_nan=False)
    fold: int | None


def _check_dataset(name: str) -> str:
    if slug(name) != name or name.endswith(".toml"):
        raise ValueError(f"not a dataset's name: {name!r}")
    return name


DatasetName = Annotated[str, AfterValidator(_check_dataset)]  # the name of a store's file, which leads nowhere else


class Description(BaseModel):
    """The part of run.json that is read back."""

    dataset: DatasetName
    created: str
    manifest: Manifest
    classes: tuple[str, ...]
    config: JsonObject
    members: list[_Member]
    sources: tuple[str, ...]
    thresholds: list[FiniteFloat]
    results: dict[str, _Result]
    split_digest: str
    seconds: float
    size_mb: float


@dataclass(frozen=True)
class RunSummary:
    """What run.json says of a run: ``metrics`` are those of the ``n_rows`` held out, ``split`` says which those were.

    Without such rows ``split`` is None. ``settings`` are those that differ from the defaults, if it is no ensemble.
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
    settings: JsonObject


def find_run(runs: Path, name: str | None = None, kind: str | None = HEAD) -> Path:
    """Return the directory of a run of a kind, or with None of any: by name or path, or the one made last.

    Raises RunError if there is none, or if it is of another kind.
    """
    if name is not None:
        for path in (runs / name, Path(name)):
            if (path / "run.json").is_file():
                found = kind_of(read_json(path / "run.json"))
                if kind not in (None, found) and found in USES:
                    raise RunError(f"run {path.resolve().name} {USES[found]}")
                return path
        known = ", ".join(sorted(path.parent.name for path in runs.glob("*/run.json"))) or "none yet"
        raise RunError(f"no run {name!r} in {runs}; the runs are: {known}")
    made = []
    for path in runs.glob("*/run.json"):
        try:
            values = read_whole(path.parent)
        except RunError as error:
            logger.warning("skipped: %s", error)
            continue
        # A tuned alignment is for the head that it was tuned with: its other side is no longer where it was.
        if kind in (None, kind_of(values)) and not values.get("parent"):
            made.append((str(values.get("created", "")), path.parent))
    if not made:
        raise RunError(f"no {'runs' if kind in (None, HEAD) else 'alignments'} in {runs}; {HOW_TO_MAKE[kind or HEAD]}")
    return max(made)[1]


def kind_of(values: JsonObject) -> str:
    """Return which kind of run a run.json describes."""
    return str(values.get("kind", HEAD))


def write_run(runs: Path, name: str, files: Mapping[str, bytes]) -> Path:
    """Write a run's files in a new directory, name-1, name-2, ..., that is whole or not there at all."""
    runs.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=runs, prefix=".new-") as temporary:
        folder = Path(temporary) / "run"
        folder.mkdir()
        for file, data in files.items():
            write_atomically(folder / file, data)
        return _move_to_free(folder, runs / slug(name))


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


def list_runs(runs: Path) -> list[RunSummary]:
    """Return the heads in a directory, the one made last first. Damaged ones are skipped, with a warning.

    Reads no weights.
    """
    return newest_first(runs, HEAD, _summarize)


def newest_first(runs: Path, kind: str, summarize: Callable[[Path], Summary]) -> list[Summary]:
    """Return what ``summarize`` makes of each run of a kind in a directory, the one made last first.

    Those that it raises RunError for are skipped, with a warning.
    """
    found = []
    for path in sorted({path.parent for name in FILES for path in runs.glob(f"*/{name}")}):
        try:
            if _likely_kind(path) == kind:
                found.append(summarize(path))
        except RunError as error:
            logger.warning("skipped: %s", error)
    return sorted(found, key=lambda run: (run.created, run.name), reverse=True)


def _likely_kind(path: Path) -> str:
    """Return which kind of run is in a directory; what can't be read counts as a head, so that one list names it."""
    try:
        return kind_of(read_json(path / "run.json"))
    except RunError:
        return HEAD


def _summarize(path: Path) -> RunSummary:
    about = describe(path)
    with describing(path / "run.json"):
        task = about.manifest.task
        settings = {} if about.sources else ResolvedConfig.from_run(about.config, task).differences(task)
    split = next((split for split in (OUT_OF_FOLD, VAL) if split in about.results), None)
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
        settings=settings,
    )


def read_whole(path: Path, kind: str | None = None) -> JsonObject:
    """Return a run's run.json. Raises RunError if the run lacks a file, is of another version, or of another kind."""
    for name in FILES:
        if not (path / name).is_file():
            raise RunError(f"{path / name} is not there: {path} is not a whole run")
    values = read_json(path / "run.json")
    found = kind_of(values)
    if found not in FORMATS:
        raise RunError(f"{path}: not a kind of run that this version knows: {found!r}")
    if values.get("format") != FORMATS[found]:
        expected = FORMATS[found]
        raise RunError(
            f"{path}: run of another version (format {values.get('format')}, not {expected}); train it again"
        )
    if kind not in (None, found):
        raise RunError(f"run {path.resolve().name} {USES[found]}")
    return values


def describe(path: Path) -> Description:
    """Read what a run says of itself. Raises RunError, naming the key, for what it can't say."""
    values = read_whole(path, HEAD)
    with describing(path / "run.json"):
        about = Description.model_validate(values)
        _check_shapes(about)
        return about


def read_json(path: Path) -> JsonObject:
    """Read a JSON object. Raises RunError if it is not there, or none."""
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
def describing(path: Path) -> Iterator[None]:
    """Turn whatever an edited file leads to, in torch as well, into one line that names it."""
    try:
        yield
    except ValidationError as error:
        problem = error.errors()[0]
        key = ".".join(str(part) for part in problem["loc"])
        raise RunError(f"{path}: not a run's description: {key}: {problem['msg']}") from error
    except Exception as error:
        raise RunError(f"{path}: not a run's description: {error}") from error


def _check_shapes(about: Description) -> None:
    if len(about.thresholds) != len(about.classes):
        raise RunError(f"{len(about.thresholds)} thresholds for {len(about.classes)} classes")
    if not about.members:
        raise RunError("members: there are none")
    for split, result in about.results.items():
        if any(len(values) != len(about.classes) for values in result.per_class.values()):
            raise RunError(f"results.{split}.per_class: must have a figure for each of {len(about.classes)} classes")


def load_weights(models: Sequence[nn.Module], path: Path) -> None:
    """Fill models, in their order, with the weights in a file. Raises RunError if they don't fit."""
    try:
        tensors = load_file(path)
        for i, model in enumerate(models):
            mine = {name: tensors.pop(name) for name in list(tensors) if name.startswith(f"{i}.")}
            model.load_state_dict({name.partition(".")[2]: x for name, x in mine.items()}, assign=True)
            model.float()
        if tensors:
            raise RuntimeError(f"unexpected weights: {', '.join(sorted(tensors)[:3])}")
    except FileNotFoundError:
        raise RunError(f"{path} is not there: {path.parent} is not a whole run") from None
    except (SafetensorError, RuntimeError, OSError) as error:
        reason = str(error).splitlines()[-1].strip()
        raise RunError(f"{path}: the weights don't fit the run's settings: {reason}") from error


def load_held_out(path: Path, n_classes: int, folds: Sequence[int | None]) -> HeldOut | None:
    """Return the scores of the rows held out, or None where none were. ``folds`` are those of the run's members.

    Raises RunError if they don't fit together.
    """
    if not path.is_file():
        return None
    try:
        with safetensors.safe_open(path, "np") as file:
            split = (file.metadata() or {}).get("split", "")
            rows, parts, scores = (file.get_tensor(name) for name in HELD_ARRAYS)
    except (SafetensorError, OSError, TypeError, ValueError) as error:
        raise RunError(f"{path}: can't be read: {error}") from error
    kinds = rows.dtype, parts.dtype, scores.dtype
    fit = rows.ndim == 1 and rows.shape == parts.shape and scores.shape == (len(rows), n_classes)
    if not fit or kinds != (np.int64, np.int64, np.float32) or rows.min(initial=0) < 0 or not np.isfinite(scores).all():
        raise RunError(f"{path}: rows, parts and scores don't fit together, or the run's {n_classes} classes")
    if not {fold for fold in folds if fold is not None} <= set(parts.tolist()):
        raise RunError(f"{path}: it lacks the part of a fold that a model of run.json has not seen")
    return HeldOut(split, rows, parts, scores)
