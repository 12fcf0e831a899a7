"""The worst errors of a report: the wrong rows with the highest loss, with their pictures and texts."""

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from PIL import Image

from cachefuse.data.column import Source, as_text
from cachefuse.data.dataset import Dataset
from cachefuse.errors import BadSampleError
from cachefuse.memory import one_sample
from cachefuse.runs.evaluate import Evaluation

N_EXAMPLES = 24
SIDE = 160  # px
QUALITY = 72
MAX_LABELS, MAX_TEXTS = 10, 5  # shown with an example: labels of a kind, captions
TINY = 1e-7  # float32 scores can reach 0 and 1, where the log loss is infinite
FOUND, MISSED, WRONG = "found", "missed", "wrong"
PICTURED = "image"  # the modality whose sources are shown as pictures; other modalities are shown as text


@dataclass(frozen=True)
class Label:
    """A label of an example: found, missed or wrong, with its score."""

    name: str
    kind: str
    score: float


@dataclass(frozen=True)
class Example:
    """One row: its labels and, from the raw data, its texts and its picture, or the reason ``no_picture`` is shown.

    ``more`` is the number of labels that are not shown. ``gates`` are the row's gate weights, if the fusion has gates.
    """

    id: str
    loss: float
    labels: list[Label]
    more: int
    texts: tuple[str, ...] = ()
    picture: str = ""
    no_picture: str = ""
    gates: dict[str, float] = field(default_factory=dict)


def row_losses(targets: np.ndarray, scores: np.ndarray, task: str) -> np.ndarray:
    """Return each row's log loss (n,) for targets (n, C) bool: of its class in multi-class, else the labels' mean."""
    by_class = -np.log(np.clip(np.where(targets, scores, 1 - scores), TINY, 1))
    losses: np.ndarray = by_class[targets] if task == "multiclass" else by_class.mean(axis=1, dtype=np.float64)
    return losses


def worst_examples(
    evaluation: Evaluation,
    classes: Sequence[str],
    task: str,
    ids: np.ndarray,
    dataset: Dataset | None = None,
    most: int = N_EXAMPLES,
) -> list[Example]:
    """Return the wrong rows with the highest loss, worst first; ``ids`` (N,) are of all samples of the store."""
    targets, predictions = evaluation.targets, evaluation.predictions
    losses = row_losses(targets, evaluation.scores, task)
    differ = targets & ~predictions if task == "vqa" else targets != predictions
    if task == "vqa":  # one of several right answers is enough
        differ &= ~(targets & predictions).any(axis=1, keepdims=True)
    wrong = np.flatnonzero(differ.any(axis=1))
    worst = wrong[np.argsort(-losses[wrong], kind="stable")][:most]
    rows = {} if dataset is None else {sample: row for row, sample in enumerate(dataset.ids)}
    examples = []
    for i in worst.tolist():
        sample = str(ids[evaluation.rows[i]])
        labels, more = _labels(evaluation, classes, i)
        texts, picture, why = _raw(dataset, rows.get(sample))
        gates = {m: float(evaluation.weights[i, 0, j]) for j, m in enumerate(evaluation.gates)}
        examples.append(Example(sample, float(losses[i]), labels, more, texts, picture, why, gates))
    return examples


def thumbnail(source: Source) -> str:
    """Return an image of at most 160 by 160 px as a data URI. Raises BadSampleError if it cannot be read."""
    with one_sample():  # the whole image, until it is small
        image = source.load()
        image.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
    file = io.BytesIO()
    image.save(file, "JPEG", quality=QUALITY)
    return f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"


def picture_of(dataset: Dataset, row: int | None) -> tuple[str, str]:
    """Return a sample's thumbnail, or the reason why it has none; two empty texts if the dataset has no images."""
    if row is None:
        return "", "not in the raw data"
    if PICTURED not in dataset.modalities:
        return "", ""
    sources = dataset.sources(PICTURED, row)
    if not sources or isinstance(sources[0], str):
        return "", "no image"
    try:
        return thumbnail(sources[0]), ""
    except BadSampleError as error:
        return "", str(error)


def lines_of(dataset: Dataset, row: int | None) -> tuple[str, ...]:
    """Return a sample's texts, and the names of its other sources except images."""
    lines = []
    for modality, column in dataset.modalities.items():
        if modality != PICTURED:
            mark = "" if column.is_text else f"{modality}: "
            lines += [f"{mark}{as_text(source)}" for source in dataset.sources(modality, row)]
    return tuple(lines)


def _labels(evaluation: Evaluation, classes: Sequence[str], i: int) -> tuple[list[Label], int]:
    """Return the labels of row i to show, and the number of its other labels."""
    true, predicted, scores = evaluation.targets[i], evaluation.predictions[i], evaluation.scores[i]
    labels, more = [], 0
    for kind, mask in ((MISSED, true & ~predicted), (WRONG, predicted & ~true), (FOUND, true & predicted)):
        best_first = sorted(np.flatnonzero(mask).tolist(), key=lambda c: -scores[c])
        labels += [Label(classes[c], kind, float(scores[c])) for c in best_first[:MAX_LABELS]]
        more += len(best_first[MAX_LABELS:])
    return labels, more


def _raw(dataset: Dataset | None, row: int | None) -> tuple[tuple[str, ...], str, str]:
    """Return a sample's texts, and its picture or the reason why it has none."""
    if dataset is None:
        return (), "", ""
    return lines_of(dataset, row)[:MAX_TEXTS], *picture_of(dataset, row)
