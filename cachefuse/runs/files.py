"""Checking and loading what a run's files hold, and finding the runs in a directory."""

import json
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Protocol, TypeVar

import numpy as np
import safetensors.numpy
import safetensors.torch
from pydantic import AfterValidator, BaseModel, BeforeValidator, Field, FiniteFloat, ValidationError
from safetensors import SafetensorError
from torch import nn

from cachefuse.data.answers import EVALUATION
from cachefuse.data.manifest import VQA, Manifest
from cachefuse.errors import RunError
from cachefuse.files import JsonObject, slug
from cachefuse.metrics.calibrators import Calibration
from cachefuse.printable import listed
from cachefuse.runs.features import RunFeaturesByName, add_views
from cachefuse.runs.folder import ABOUT, ALIGNMENT, FORMATS, HEAD, HELD_OUT, USES, WEIGHTS, RunFolder, run_folders
from cachefuse.training.data import OUT_OF_FOLD, VAL
from cachefuse.training.held_out import HeldOut
from cachefuse.training.resolved import ResolvedConfig

logger = logging.getLogger(__name__)

HOW_TO_MAKE = {HEAD: "train one with cachefuse train-head", ALIGNMENT: "train one with cachefuse align"}
HELD_ARRAYS = ("rows", "parts", "scores")
SPARE = 16 << 20  # bytes of a weights' or scores' file beside its numbers, at most

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


Probability = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]


class _Calibration(BaseModel):
    slopes: list[Annotated[float, Field(gt=0, allow_inf_nan=False)]]
    biases: list[FiniteFloat]
    steps: dict[int, tuple[list[Probability], list[Probability]]]

    def open(self) -> Calibration:
        steps = {c: (np.array(before), np.array(after)) for c, (before, after) in self.steps.items()}
        return Calibration(np.array(self.slopes), np.array(self.biases), steps)

    def check(self, n_classes: int) -> None:
        """Raise RunError unless it fits the classes, and each class's steps ascend."""
        if not len(self.slopes) == len(self.biases) == n_classes or not self.steps.keys() <= set(range(n_classes)):
            raise RunError(f"calibration must have a slope and a bias for each of {n_classes} classes")
        for c, (before, after) in self.steps.items():
            ascends = all(np.diff(before) > 0) and all(np.diff(after) >= 0)
            if not before or len(before) != len(after) or not ascends:
                raise RunError(f"calibration.steps.{c} must be two ascending lists of one length")


class _Member(BaseModel):
    config: JsonObject
    features: Annotated[RunFeaturesByName, BeforeValidator(add_views)]
    weight: float = Field(gt=0, allow_inf_nan=False)
    fold: int | None
    calibration: _Calibration | None = None


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
    calibration: _Calibration | None = None
    calibration_errors: dict[str, tuple[Figure, Figure]] = {}
    results: dict[str, _Result]
    caution: str | None = None
    leaderboard: JsonObject | None = None
    split_digest: str
    seconds: float
    size_mb: float

    @property
    def is_mean_of_several(self) -> bool:
        """Whether it is an ensemble of runs, or a blend of models of several kinds."""
        several = len({member.config.get("fusion") for member in self.members}) > 1
        return bool(self.sources or self.leaderboard) or several


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

    Raises RunError if there is none, if it is of another kind, or if damage hides which run is the latest: an older one
    is never taken in its place.
    """
    if name is None:
        return _latest(runs, kind)
    for path in (runs / name, Path(name)):
        if path in run_folders(path.parent) or (path / ABOUT).is_file():
            actual = RunFolder.peek(path).kind
            if kind not in (None, actual) and actual in USES:
                raise RunError(f"run {path.resolve().name} {USES[actual]}")
            return path
    known = listed(path.name for path in run_folders(runs)) or "none yet"
    raise RunError(f"no run {name!r} in {runs}; the runs are: {known}")


def _latest(runs: Path, kind: str | None) -> Path:
    candidates = []
    for path in run_folders(runs):
        try:
            run = RunFolder.peek(path)
            if run.files is None and run.kind not in FORMATS:
                raise RunError(f"{path / ABOUT}: has a wrong value: kind: {run.kind!r}")
        except RunError as error:
            raise RunError(f"{error}; {_unknown(path)}") from error
        # A fine-tuned alignment is only of use to its head: its two sides no longer match.
        if kind in (None, run.kind) and not run.values.get("parent"):
            candidates.append((run.created, path))
    if not candidates:
        raise RunError(f"no {'runs' if kind in (None, HEAD) else 'alignments'} in {runs}; {HOW_TO_MAKE[kind or HEAD]}")
    return max(candidates)[1]


def _unknown(path: Path) -> str:
    return f"without it the latest run is unknown: name another one with --run, or delete the folder {path}"


def list_runs(runs: Path) -> list[RunSummary]:
    """Return the heads in a directory, newest first, without their weights; damaged ones are skipped with a warning."""
    return newest_first(runs, HEAD, _summarize)


def newest_first(runs: Path, kind: str, summarize: Callable[[RunFolder], Summary]) -> list[Summary]:
    """Return ``summarize(folder)`` for each run of a kind in a directory, the newest first.

    A run that is incomplete or damaged, or for which ``summarize`` raises RunError, is skipped with a warning.
    """
    summaries = []
    for path in run_folders(runs):
        try:
            if _likely_kind(path) == kind:
                run = RunFolder.open(path, kind)
                run.check()
                summaries.append(summarize(run))
        except RunError as error:
            logger.warning("skipped: %s", error)
    return sorted(summaries, key=lambda run: (run.created, run.name), reverse=True)


def _likely_kind(path: Path) -> str:
    """Return the kind of run in a directory. An unreadable one counts as a head, so that one list reports it."""
    try:
        return RunFolder.peek(path).kind
    except RunError:
        return HEAD


def _summarize(run: RunFolder) -> RunSummary:
    about, path = read_description(run), run.path
    with named_errors(path / ABOUT):
        task = about.manifest.task
        settings = {} if about.is_mean_of_several else ResolvedConfig.from_run(about.config, task).differences(task)
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


def read_description(run: RunFolder) -> Description:
    """Return a head's checked run.json. Raises RunError, naming the key, for a wrong value."""
    with named_errors(run.path / ABOUT):
        about = Description.model_validate(run.values)
        _check_shapes(about)
        if about.manifest.task == VQA and about.answers != EVALUATION:
            for result in about.results.values():
                result.metrics["vqa_accuracy"] = float("nan")  # measured by another formula
        return about


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
    for calibration in (about.calibration, *(member.calibration for member in about.members)):
        if calibration is not None:
            calibration.check(len(about.classes))
    if not about.members:
        raise RunError("members must not be empty")
    for split, result in about.results.items():
        if any(len(values) != len(about.classes) for values in result.per_class.values()):
            raise RunError(f"results.{split}.per_class must have one figure for each of {len(about.classes)} classes")


def load_weights(models: Sequence[nn.Module], run: RunFolder) -> None:
    """Load a run's weights into models, in order. Raises RunError if they do not fit, or are not as written."""
    numbers = sum(tensor.numel() for model in models for tensor in model.state_dict().values())
    data = run.read(WEIGHTS, 8 * numbers + SPARE)
    try:
        tensors = safetensors.torch.load(data)
        for i, model in enumerate(models):
            state = {name: tensors.pop(name) for name in list(tensors) if name.startswith(f"{i}.")}
            model.load_state_dict({name.partition(".")[2]: x for name, x in state.items()}, assign=True)
            model.float()
        if tensors:
            raise RuntimeError(f"unexpected weights: {listed(sorted(tensors)[:3])}")
    except (SafetensorError, RuntimeError, ValueError, KeyError) as error:
        reason = str(error).splitlines()[-1].strip()
        raise RunError(f"{run.path / WEIGHTS}: the weights do not fit the run's settings: {reason}") from error


def held_out_bytes(held_out: HeldOut) -> bytes:
    """Return the file of the held-out rows' scores, which ``parse_held_out`` reads."""
    arrays = {name: getattr(held_out, name) for name in HELD_ARRAYS}
    return safetensors.numpy.save(arrays, {"split": held_out.split})


def held_out_limit(n_rows: int, n_classes: int) -> int:
    """Return the maximum of bytes in a file of the scores (n, C) of held-out rows."""
    return (16 + 4 * n_classes) * n_rows + SPARE


def load_held_out(run: RunFolder, about: Description) -> HeldOut | None:
    """Return the scores of the held-out rows, or None if there are none.

    Raises RunError if the file is damaged, or does not fit the classes or folds.
    """
    if not run.has(HELD_OUT):
        return None
    n_classes = len(about.classes)
    n_rows = max((result.n_rows for result in about.results.values()), default=0)
    data = run.read(HELD_OUT, held_out_limit(n_rows, n_classes))
    held_out = parse_held_out(run.path / HELD_OUT, data, n_classes)
    if not {member.fold for member in about.members if member.fold is not None} <= set(held_out.parts.tolist()):
        raise RunError(f"{run.path / HELD_OUT}: lacks the rows of a fold that a model in run.json held out")
    return held_out


def parse_held_out(path: Path, data: bytes, n_classes: int) -> HeldOut:
    """Return the scores of held-out rows in a file's bytes. Raises RunError if they do not fit the classes."""
    try:
        arrays = safetensors.numpy.load(data)
        rows, parts, scores = (arrays[name] for name in HELD_ARRAYS)
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        split = header.get("__metadata__", {}).get("split", "")
    except (SafetensorError, LookupError, TypeError, ValueError) as error:
        raise RunError(f"{path}: cannot be read: {error}") from error
    kinds = [array.dtype.type for array in (rows, parts, scores)]
    fit = rows.ndim == 1 and rows.shape == parts.shape and scores.shape == (len(rows), n_classes)
    if not fit or kinds != [np.int64, np.int64, np.float32] or rows.min(initial=0) < 0 or not np.isfinite(scores).all():
        raise RunError(f"{path}: rows, parts and scores do not fit together, or do not fit {n_classes} classes")
    return HeldOut(split, rows, parts, scores)
