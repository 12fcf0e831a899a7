"""Reading and checking a run's files, and finding the runs in a directory."""

import json
import logging
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Protocol, TypeVar

import numpy as np
import safetensors.numpy
from pydantic import AfterValidator, BaseModel, BeforeValidator, Field, FiniteFloat, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from cachefuse.data.answers import EVALUATION
from cachefuse.data.manifest import VQA, Manifest
from cachefuse.errors import RunError
from cachefuse.files import JsonObject, slug, write_atomically
from cachefuse.printable import listed
from cachefuse.runs.features import RunFeaturesByName, add_views
from cachefuse.training.data import OUT_OF_FOLD, VAL
from cachefuse.training.held_out import HeldOut
from cachefuse.training.resolved import ResolvedConfig

logger = logging.getLogger(__name__)


HEAD, ALIGNMENT = "head", "alignment"  # kinds of runs
FORMATS = {HEAD: 3, ALIGNMENT: 1}
USES = {
    HEAD: "is a head, not an alignment; use cachefuse predict, evaluate or report",
    ALIGNMENT: "is an alignment, without classes; use cachefuse retrieve, zero-shot, similarity, evaluate or report",
}
HOW_TO_MAKE = {HEAD: "train one with cachefuse train-head", ALIGNMENT: "train one with cachefuse align"}
WEIGHTS, HELD_OUT = "model.safetensors", "held_out.safetensors"
FILES = ("run.json", "history.json", WEIGHTS)  # every run has these
HELD_ARRAYS = ("rows", "parts", "scores")

# JSON has no NaN: an undefined figure is null.
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


DatasetName = Annotated[str, AfterValidator(_check_dataset)]  # names a store's file: no path to another folder


class Description(BaseModel):
    """The fields of run.json that loading reads."""

    dataset: DatasetName
    answers: int | None = None  # the version of the VQA accuracy
    created: str
    manifest: Manifest
    classes: tuple[str, ...]
    config: JsonObject
    members: list[_Member]
    sources: tuple[str, ...]
    thresholds: list[FiniteFloat]
    results: dict[str, _Result]
    caution: str | None = None
    split_digest: str
    seconds: float
    size_mb: float


@dataclass(frozen=True)
class RunSummary:
    """A run in a list: ``metrics`` are of ``n_rows`` held-out rows, and ``split`` is "oof" or "val".

    Without held-out rows ``split`` is None. ``caution`` says why the metrics may be too high. ``settings`` are those
    that differ from the defaults; an ensemble has none.
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
    caution: str | None = None


def find_run(runs: Path, name: str | None = None, kind: str | None = HEAD) -> Path:
    """Return the directory of a run by name or path, by default the latest one; ``kind`` None means any kind.

    Raises RunError if there is none, or if it is of another kind.
    """
    if name is not None:
        for path in (runs / name, Path(name)):
            if (path / "run.json").is_file():
                actual = kind_of(read_json(path / "run.json"))
                if kind not in (None, actual) and actual in USES:
                    raise RunError(f"run {path.resolve().name} {USES[actual]}")
                return path
        known = listed(sorted(path.parent.name for path in runs.glob("*/run.json"))) or "none yet"
        raise RunError(f"no run {name!r} in {runs}; the runs are: {known}")
    candidates = []
    for path in runs.glob("*/run.json"):
        try:
            values = read_whole(path.parent)
        except RunError as error:
            logger.warning("skipped: %s", error)
            continue
        # A fine-tuned alignment is only of use to its head: its two sides no longer match.
        if kind in (None, kind_of(values)) and not values.get("parent"):
            candidates.append((str(values.get("created", "")), path.parent))
    if not candidates:
        raise RunError(f"no {'runs' if kind in (None, HEAD) else 'alignments'} in {runs}; {HOW_TO_MAKE[kind or HEAD]}")
    return max(candidates)[1]


def kind_of(values: JsonObject) -> str:
    """Return the kind of a run, from the values of its run.json."""
    return str(values.get("kind", HEAD))


def write_run(runs: Path, name: str, files: Mapping[str, bytes]) -> Path:
    """Write a run's files to a new directory name-1, name-2, ..., which appears only when all files are written."""
    runs.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=runs, prefix=".new-") as temporary:
        folder = Path(temporary) / "run"
        folder.mkdir()
        for file, data in files.items():
            write_atomically(folder / file, data)
        return _move_to_free(folder, runs / slug(name))


def _move_to_free(folder: Path, name: Path) -> Path:
    """Move a folder to the first free name of name-1, name-2, ...; another process may take one at any moment."""
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
    """Return the heads in a directory, newest first, without their weights; damaged ones are skipped with a warning."""
    return newest_first(runs, HEAD, _summarize)


def newest_first(runs: Path, kind: str, summarize: Callable[[Path], Summary]) -> list[Summary]:
    """Return ``summarize(path)`` for each run of a kind in a directory, the newest first.

    If ``summarize`` raises RunError, the run is skipped with a warning.
    """
    summaries = []
    for path in sorted({path.parent for name in FILES for path in runs.glob(f"*/{name}")}):
        try:
            if _likely_kind(path) == kind:
                summaries.append(summarize(path))
        except RunError as error:
            logger.warning("skipped: %s", error)
    return sorted(summaries, key=lambda run: (run.created, run.name), reverse=True)


def _likely_kind(path: Path) -> str:
    """Return the kind of run in a directory. An unreadable one counts as a head, so that one list reports it."""
    try:
        return kind_of(read_json(path / "run.json"))
    except RunError:
        return HEAD


def _summarize(path: Path) -> RunSummary:
    about = read_description(path)
    with named_errors(path / "run.json"):
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
        caution=about.caution,
    )


def read_whole(path: Path, kind: str | None = None) -> JsonObject:
    """Return the values of run.json, and check that the run is complete.

    Raises RunError if a file is missing, or for another version or kind.
    """
    for name in FILES:
        if not (path / name).is_file():
            raise RunError(f"{path / name} is missing: {path} is not a complete run; train again")
    values = read_json(path / "run.json")
    actual = kind_of(values)
    if actual not in FORMATS:
        raise RunError(f"{path}: this version does not know runs of kind {actual!r}")
    if values.get("format") != FORMATS[actual]:
        raise RunError(
            f"{path}: a run of another version (format {values.get('format')}, not {FORMATS[actual]}); train again"
        )
    if kind not in (None, actual):
        raise RunError(f"run {path.resolve().name} {USES[actual]}")
    return values


def read_description(path: Path) -> Description:
    """Return a head's checked run.json. Raises RunError, naming the key, for a wrong value."""
    values = read_whole(path, HEAD)
    with named_errors(path / "run.json"):
        about = Description.model_validate(values)
        _check_shapes(about)
        if about.manifest.task == VQA and about.answers != EVALUATION:
            for result in about.results.values():
                result.metrics["vqa_accuracy"] = float("nan")  # measured by another formula
        return about


def read_json(path: Path) -> JsonObject:
    """Read a JSON object. Raises RunError if the file is missing, or is not a JSON object."""
    try:
        values = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise RunError(f"{path} is missing: {path.parent} is not a complete run") from None
    except (ValueError, OSError, RecursionError) as error:
        raise RunError(f"{path}: cannot be read: {error}") from error
    if not isinstance(values, dict):
        raise RunError(f"{path}: must hold a JSON object. Got {type(values).__name__} instead")
    return values


@contextmanager
def named_errors(path: Path) -> Iterator[None]:
    """Turn any error that an edited file causes, also in torch, into a RunError with one line that names the file."""
    try:
        yield
    except ValidationError as error:
        problem = error.errors()[0]
        key = ".".join(str(name) for name in problem["loc"])
        raise RunError(f"{path}: has a wrong value: {key}: {problem['msg']}") from error
    except Exception as error:
        raise RunError(f"{path}: has a wrong value: {error}") from error


def _check_shapes(about: Description) -> None:
    if len(about.thresholds) != len(about.classes):
        raise RunError(f"{len(about.thresholds)} thresholds for {len(about.classes)} classes")
    if not about.members:
        raise RunError("members must not be empty")
    for split, result in about.results.items():
        if any(len(values) != len(about.classes) for values in result.per_class.values()):
            raise RunError(f"results.{split}.per_class must have one figure for each of {len(about.classes)} classes")


def load_weights(models: Sequence[nn.Module], path: Path) -> None:
    """Load a file's weights into models, in order. Raises RunError if they do not fit."""
    try:
        tensors = load_file(path)
        for i, model in enumerate(models):
            state = {name: tensors.pop(name) for name in list(tensors) if name.startswith(f"{i}.")}
            model.load_state_dict({name.partition(".")[2]: x for name, x in state.items()}, assign=True)
            model.float()
        if tensors:
            raise RuntimeError(f"unexpected weights: {listed(sorted(tensors)[:3])}")
    except FileNotFoundError:
        raise RunError(f"{path} is missing: {path.parent} is not a complete run") from None
    except (SafetensorError, RuntimeError, OSError) as error:
        reason = str(error).splitlines()[-1].strip()
        raise RunError(f"{path}: the weights do not fit the run's settings: {reason}") from error


def held_out_bytes(held_out: HeldOut) -> bytes:
    """Return the file of the held-out rows' scores, which ``load_held_out`` reads."""
    arrays = {name: getattr(held_out, name) for name in HELD_ARRAYS}
    return safetensors.numpy.save(arrays, {"split": held_out.split})


def load_held_out(path: Path, n_classes: int, folds: Sequence[int | None]) -> HeldOut | None:
    """Return the scores of the held-out rows, or None if there are none. ``folds`` are those of the run's members.

    Raises RunError if the file is damaged, or does not fit the classes or folds.
    """
    if not path.is_file():
        return None
    try:
        with safetensors.safe_open(path, "np") as file:
            split = (file.metadata() or {}).get("split", "")
            rows, parts, scores = (file.get_tensor(name) for name in HELD_ARRAYS)
    except (SafetensorError, OSError, TypeError, ValueError) as error:
        raise RunError(f"{path}: cannot be read: {error}") from error
    kinds = rows.dtype, parts.dtype, scores.dtype
    fit = rows.ndim == 1 and rows.shape == parts.shape and scores.shape == (len(rows), n_classes)
    if not fit or kinds != (np.int64, np.int64, np.float32) or rows.min(initial=0) < 0 or not np.isfinite(scores).all():
        raise RunError(f"{path}: rows, parts and scores do not fit together, or do not fit {n_classes} classes")
    if not {fold for fold in folds if fold is not None} <= set(parts.tolist()):
        raise RunError(f"{path}: lacks the rows of a fold that a model in run.json held out")
    return HeldOut(split, rows, parts, scores)
