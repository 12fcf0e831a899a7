"""The tables of a report: figures of each class, labels that occur together, and confused labels."""

from dataclasses import dataclass

import numpy as np

from cachefuse.runs.evaluate import Evaluation

MAX_ROWS = 100  # classes in the table of figures
MAX_CELLS = 40  # classes along a heatmap's side
MAX_NUMBERS = 20  # classes of a heatmap whose cells have room for numbers
MAX_PAIRS = 10
NOTHING = "nothing"


@dataclass(frozen=True)
class ClassFigures:
    """The figures of one class; ``threshold`` is None if the class with the highest score is predicted."""

    name: str
    support: int
    precision: float
    recall: float
    f1: float
    ap: float
    threshold: float | None


@dataclass(frozen=True)
class Cell:
    """A count, and the share from 0 to 1 that sets its colour; ``same`` if row and column are the same class."""

    count: int
    share: float
    same: bool


@dataclass(frozen=True)
class Heatmap:
    """Cells whose rows and columns have the same names: of ``n_classes`` classes, those with the most rows."""

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
    per_class: dict[str, list[float]], classes: tuple[str, ...], thresholds: np.ndarray | None
) -> list[ClassFigures]:
    """Return each class's figures, the classes with the most rows first; at most 100, those with the lowest F1.

    Classes without rows are the first to be left out.
    """
    f1, support = per_class["f1"], per_class["support"]
    order = sorted(range(len(classes)), key=lambda c: (not support[c], f1[c], -support[c]))[:MAX_ROWS]
    return [
        ClassFigures(
            name=classes[c],
            support=int(support[c]),
            precision=per_class["precision"][c],
            recall=per_class["recall"][c],
            f1=f1[c],
            ap=per_class["ap"][c],
            threshold=None if thresholds is None else float(thresholds[c]),
        )
        for c in sorted(order, key=lambda c: (-support[c], c))
    ]


def weakest(per_class: dict[str, list[float]], classes: tuple[str, ...], n: int = 3) -> list[tuple[str, float]]:
    """Return the ``n`` classes with rows and the lowest F1, and their F1; nothing if no more than ``n`` have rows."""
    f1, support = per_class["f1"], per_class["support"]
    order = sorted((c for c in range(len(classes)) if support[c]), key=lambda c: f1[c])
    return [(classes[c], f1[c]) for c in order[:n]] if len(order) > n else []


def cooccurrence(targets: np.ndarray, classes: tuple[str, ...]) -> Heatmap:
    """Return the number of rows with each two labels, from targets (n, C) bool, as shares of rows with the first."""
    order = _most_common(targets)
    counts = _joint_counts(targets[:, order], targets[:, order])
    shares = counts / np.maximum(1, counts.diagonal())[:, None]
    return _heatmap(counts, shares, [classes[c] for c in order], len(classes))


def confusion(evaluation: Evaluation, classes: tuple[str, ...]) -> Heatmap:
    """Return the number of rows of each class by predicted class; colours are relative to the largest wrong share."""
    order = _most_common(evaluation.targets)
    counts = _joint_counts(evaluation.targets[:, order], evaluation.predictions[:, order])
    shares = counts / np.maximum(1, evaluation.targets[:, order].sum(axis=0))[:, None]
    np.fill_diagonal(shares, 0)
    return _heatmap(counts, _scaled(shares), [classes[c] for c in order], len(classes))


def mistakes(evaluation: Evaluation, classes: tuple[str, ...]) -> Heatmap:
    """Return the number of rows where one label is missed and another is wrongly predicted.

    A share is of the rows that miss the label; colours are relative to the largest share. The last row and column,
    without colour, are for rows with no missed label, or with no wrong one.
    """
    order = _most_common(evaluation.targets)
    missed, wrong = _missed_and_wrong(evaluation)
    missed = np.column_stack([missed[:, order], ~missed.any(axis=1)])
    wrong = np.column_stack([wrong[:, order], ~wrong.any(axis=1)])
    counts = _joint_counts(missed, wrong)
    counts[-1, -1] = 0  # rows that are right
    shares = counts / np.maximum(1, missed.sum(axis=0))[:, None]
    shares[-1], shares[:, -1] = 0, 0
    return _heatmap(counts, _scaled(shares), [*(classes[c] for c in order), NOTHING], len(classes))


def frequent_mistakes(evaluation: Evaluation, classes: tuple[str, ...]) -> list[tuple[str, str, int]]:
    """Return the most frequent pairs of classes (missed, wrongly predicted, number of rows)."""
    from scipy.sparse import csr_array

    missed, wrong = (csr_array(x, dtype=np.int64) for x in _missed_and_wrong(evaluation))
    pairs = (missed.T @ wrong).tocoo()
    best = np.lexsort((pairs.col, pairs.row, -pairs.data))[:MAX_PAIRS]
    return [(classes[pairs.row[i]], classes[pairs.col[i]], int(pairs.data[i])) for i in best]


def gates_by_class(evaluation: Evaluation) -> list[tuple[str, dict[str, float]]]:
    """Return the modalities' mean gate weights over the rows of each class, the most common classes first."""
    support = evaluation.per_class["support"]
    order = [c for c in np.argsort([-n for n in support], kind="stable")[:MAX_CELLS] if support[c]]
    gates = evaluation.gates_per_class
    return [(evaluation.classes[c], {modality: weights[c] for modality, weights in gates.items()}) for c in order]


def _most_common(targets: np.ndarray) -> np.ndarray:
    return np.argsort(-targets.sum(axis=0), kind="stable")[:MAX_CELLS]


def _joint_counts(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return (a.astype(np.float32).T @ b.astype(np.float32)).round().astype(np.int64)


def _missed_and_wrong(evaluation: Evaluation) -> tuple[np.ndarray, np.ndarray]:
    return evaluation.targets & ~evaluation.predictions, evaluation.predictions & ~evaluation.targets


def _scaled(shares: np.ndarray) -> np.ndarray:
    scaled: np.ndarray = shares / max(shares.max(initial=0), 1e-9)
    return scaled


def _heatmap(counts: np.ndarray, shares: np.ndarray, names: list[str], n_classes: int) -> Heatmap:
    cells = [
        [Cell(int(n), round(float(share), 3), i == j) for j, (n, share) in enumerate(zip(row, row_shares, strict=True))]
        for i, (row, row_shares) in enumerate(zip(counts, shares, strict=True))
    ]
    return Heatmap(names, cells, n_classes)
