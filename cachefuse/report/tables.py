"""The tables of a report: figures of each class, labels together, and labels in place of others."""

from dataclasses import dataclass

import numpy as np

from cachefuse.runs.evaluate import Evaluation

MAX_ROWS = 100  # classes with figures
MAX_CELLS = 40  # classes along a heatmap's side
MAX_NUMBERS = 20  # up to so many, there is room for numbers in the cells
MAX_PAIRS = 10
NOTHING = "nothing"


@dataclass(frozen=True)
class ClassFigures:
    """What is known of one class; ``threshold`` is None where the highest score decides."""

    name: str
    support: int
    precision: float
    recall: float
    f1: float
    ap: float
    threshold: float | None


@dataclass(frozen=True)
class Cell:
    """A count, with the share from 0 to 1 that colours it; ``same`` where row and column are the same class."""

    count: int
    share: float
    same: bool


@dataclass(frozen=True)
class Heatmap:
    """Rows and columns of cells under the same names; of ``n_classes`` only those with the most rows are shown."""

    names: list[str]
    cells: list[list[Cell]]
    n_classes: int

    @property
    def n_shown(self) -> int:
        return min(self.n_classes, MAX_CELLS)

    @property
    def numbered(self) -> bool:
        return len(self.names) <= MAX_NUMBERS


def class_figures(
    by: dict[str, list[float]], classes: tuple[str, ...], thresholds: np.ndarray | None
) -> list[ClassFigures]:
    """Return each class's figures, those with the most rows first; of very many, those with rows and the lowest F1."""
    order = sorted(range(len(classes)), key=lambda c: (not by["support"][c], by["f1"][c], -by["support"][c]))[:MAX_ROWS]
    return [
        ClassFigures(
            name=classes[c],
            support=int(by["support"][c]),
            precision=by["precision"][c],
            recall=by["recall"][c],
            f1=by["f1"][c],
            ap=by["ap"][c],
            threshold=None if thresholds is None else float(thresholds[c]),
        )
        for c in sorted(order, key=lambda c: (-by["support"][c], c))
    ]


def weakest(by: dict[str, list[float]], classes: tuple[str, ...], n: int = 3) -> list[tuple[str, float]]:
    """Return the classes with the lowest F1 among those that occur, and their F1; none if all are that few."""
    f1, support = by["f1"], by["support"]
    order = sorted((c for c in range(len(classes)) if support[c]), key=lambda c: f1[c])
    return [(classes[c], f1[c]) for c in order[:n]] if len(order) > n else []


def cooccurrence(targets: np.ndarray, classes: tuple[str, ...]) -> Heatmap:
    """Return how many rows have two labels together, of targets (n, C) bool, as shares of those with the first."""
    order = _most_common(targets)
    counts = _together(targets[:, order], targets[:, order])
    shares = counts / np.maximum(1, counts.diagonal())[:, None]
    return _heatmap(counts, shares, [classes[c] for c in order], len(classes))


def confusion(measured: Evaluation, classes: tuple[str, ...]) -> Heatmap:
    """Return how many rows of a class are taken for another, as shares of the largest share of a class's rows."""
    order = _most_common(measured.targets)
    counts = _together(measured.targets[:, order], measured.predictions[:, order])
    shares = counts / np.maximum(1, measured.targets[:, order].sum(axis=0))[:, None]
    np.fill_diagonal(shares, 0)
    return _heatmap(counts, _scaled(shares), [classes[c] for c in order], len(classes))


def mistakes(measured: Evaluation, classes: tuple[str, ...]) -> Heatmap:
    """Return in how many rows a label is missed and another is wrongly predicted, as shares of the largest share.

    A share is one of the rows where the label is missed. The last row and column, without colour, are for nothing
    missed and nothing wrong.
    """
    order = _most_common(measured.targets)
    missed, wrong = _missed_and_wrong(measured)
    missed = np.column_stack([missed[:, order], ~missed.any(axis=1)])
    wrong = np.column_stack([wrong[:, order], ~wrong.any(axis=1)])
    counts = _together(missed, wrong)
    counts[-1, -1] = 0  # rows that are right
    shares = counts / np.maximum(1, missed.sum(axis=0))[:, None]
    shares[-1], shares[:, -1] = 0, 0
    return _heatmap(counts, _scaled(shares), [*(classes[c] for c in order), NOTHING], len(classes))


def frequent_mistakes(measured: Evaluation, classes: tuple[str, ...]) -> list[tuple[str, str, int]]:
    """Return the pairs (missed, predicted in its place, rows) of two classes that occur most."""
    from scipy.sparse import csr_array

    missed, wrong = (csr_array(x, dtype=np.int64) for x in _missed_and_wrong(measured))
    pairs = (missed.T @ wrong).tocoo()
    best = np.lexsort((pairs.col, pairs.row, -pairs.data))[:MAX_PAIRS]
    return [(classes[pairs.row[i]], classes[pairs.col[i]], int(pairs.data[i])) for i in best]


def gates_by_class(evaluation: Evaluation) -> list[tuple[str, dict[str, float]]]:
    """Return the modalities' mean weights over the rows of each class, the most common classes first."""
    support = evaluation.per_class["support"]
    order = [c for c in np.argsort([-n for n in support], kind="stable")[:MAX_CELLS] if support[c]]
    by = evaluation.gates_per_class
    return [(evaluation.classes[c], {modality: weights[c] for modality, weights in by.items()}) for c in order]


def _most_common(targets: np.ndarray) -> np.ndarray:
    return np.argsort(-targets.sum(axis=0), kind="stable")[:MAX_CELLS]


def _together(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return (a.astype(np.float32).T @ b.astype(np.float32)).round().astype(np.int64)


def _missed_and_wrong(measured: Evaluation) -> tuple[np.ndarray, np.ndarray]:
    return measured.targets & ~measured.predictions, measured.predictions & ~measured.targets


def _scaled(shares: np.ndarray) -> np.ndarray:
    scaled: np.ndarray = shares / max(shares.max(initial=0), 1e-9)
    return scaled


def _heatmap(counts: np.ndarray, shares: np.ndarray, names: list[str], n_classes: int) -> Heatmap:
    cells = [
        [Cell(int(n), round(float(share), 3), i == j) for j, (n, share) in enumerate(zip(row, row_shares, strict=True))]
        for i, (row, row_shares) in enumerate(zip(counts, shares, strict=True))
    ]
    return Heatmap(names, cells, n_classes)
