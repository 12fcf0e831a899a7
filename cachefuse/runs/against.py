"""Two runs measured on the same rows: paired differences of their figures, and the rows on which they differ."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch

from cachefuse.csv_writer import csv_for_people
from cachefuse.errors import RunError
from cachefuse.files import JsonObject
from cachefuse.metrics.base import divide
from cachefuse.metrics.bootstrap import at_once, check_level, counted_from, resample
from cachefuse.metrics.decisions import answer_accuracy
from cachefuse.metrics.paired import LEVEL, MCNEMAR, Difference, difference, holm, mcnemar, right_rows
from cachefuse.metrics.per_class import class_f1
from cachefuse.metrics.tasks import TaskSlice
from cachefuse.output import write_output
from cachefuse.runs.evaluate import with_evaluation_metrics
from cachefuse.runs.measured import Measured, measure
from cachefuse.runs.run import Run
from cachefuse.store.store import FeatureStore
from cachefuse.training.data import TrainingData

SHOWN = 100  # rows in as_dict; write_differences writes all
PER_CLASS, MOST = 60, 6000  # resamples for each class, and at most: a corrected p must be able to be small


@dataclass(frozen=True)
class PairedFigure:
    """A figure of a run and of the other run, and their difference.

    ``p_corrected`` is corrected for the number of classes, if it is the figure of a class.
    """

    run: float
    against: float
    difference: Difference
    p_corrected: float | None = None


@dataclass(frozen=True)
class RowDifference:
    """A row on which two runs predict other labels: its true labels, and what each run predicts.

    ``run_score`` and ``against_score`` say how right each is: F1, for answers to questions their accuracy, over several
    tasks the mean.
    """

    id: str
    truth: tuple[str, ...]
    run: tuple[str, ...]
    against: tuple[str, ...]
    run_score: float
    against_score: float


@dataclass(frozen=True)
class RunComparison:
    """A run against another one on ``n_rows`` of a split, which neither has seen; differences are run - against.

    The rows held out by both may be fewer than ``n_held_out``, those of each run. Rows that share an input are drawn
    together, as ``n_groups`` groups. ``per_class`` are F1 by class. ``rows`` are those that differ, the largest
    difference first.
    """

    run: str
    against: str
    dataset: str
    split: str
    n_rows: int
    n_groups: int
    n_held_out: tuple[int, int]
    metrics: dict[str, PairedFigure]
    per_class: dict[str, PairedFigure]
    rows: tuple[RowDifference, ...]
    cautions: tuple[str, ...] = ()  # why the figures of either run may be too high

    def as_dict(self) -> JsonObject:
        """Return all of it, with at most ``SHOWN`` rows."""
        return {**asdict(replace(self, rows=self.rows[:SHOWN])), "n_differ": len(self.rows), "level": LEVEL}


def evaluate_against(
    run: Run,
    against: Run,
    store: FeatureStore,
    split: str | None = None,
    *,
    device: str = "auto",
    n_resamples: int = 1000,
    seed: int = 0,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> RunComparison:
    """Compare two runs of one dataset on the rows that both held out, or on a labelled split that neither has seen.

    Each figure's difference has a 95% interval by the paired bootstrap, and a two-sided p: by McNemar's exact test for
    the share of rows that are right, else by the bootstrap. ``on_progress(done, total)`` counts figures.

    Raises RunError if the runs are the same or of other datasets or classes, if there are no such rows, or if samples
    or splits changed since one of them was trained; DataError for a split that does not exist or has no labels.
    """
    check_level(n_resamples, LEVEL)
    _check_together(run, against, store)
    first, second = (_unseen(one, store, split, device) for one in (run, against))
    both = np.intersect1d(first.rows.cpu(), second.rows.cpu())  # sorted
    if not len(both):
        raise RunError(
            f"run {run.name} ({first.split}) and run {against.name} ({second.split}) held out no row in common; train "
            f"one of them again on the same splits"
        )
    data, rows = with_evaluation_metrics(first.data), torch.from_numpy(both)
    targets, groups = data.targets(rows), data.groups_of(rows)
    (scores, predictions), (other_scores, other_predictions) = (_of_rows(one, both) for one in (first, second))
    names = data.metrics
    for_classes = max(n_resamples, min(PER_CLASS * len(data.classes), MOST))
    total = 2 * (n_resamples * len(names) + for_classes)
    draw = partial(resample, n=len(both), seed=seed, together=at_once(targets), groups=groups)
    metrics = {}
    for i, (name, metric) in enumerate(data.bind(names).items()):
        arrays = (targets, scores, predictions), (targets, other_scores, other_predictions)
        values = [metric(*of_run) for of_run in arrays]
        figures = [
            draw(
                metric.weighted(*of_run),
                n_resamples=n_resamples,
                on_progress=counted_from(on_progress, (2 * i + k) * n_resamples, total),
            )
            for k, of_run in enumerate(arrays)
        ]
        found = difference(values[0] - values[1], figures[0] - figures[1])
        right = [right_rows(metric, *of_run) for of_run in arrays]
        if groups is None and right[0] is not None and right[1] is not None:
            found = replace(found, p=mcnemar(right[0], right[1]), test=MCNEMAR)
        metrics[name] = PairedFigure(values[0], values[1], found)
    f1 = [class_f1(targets, x, data.tasks) for x in (predictions, other_predictions)]
    begun = total - 2 * for_classes
    by_class = [
        draw(of_run, n_resamples=for_classes, on_progress=counted_from(on_progress, begun + k * for_classes, total))
        for k, of_run in enumerate(f1)
    ]
    of_class = [of_run(np.ones((len(both), 1)))[:, 0] for of_run in f1]
    return RunComparison(
        run=run.name,
        against=against.name,
        cautions=tuple(dict.fromkeys(one.caution for one in (run, against) if one.caution)),
        dataset=store.dataset,
        split=first.split if first.split == second.split else f"{first.split} and {second.split}",
        n_rows=len(both),
        n_groups=data.n_groups(rows),
        n_held_out=(len(first.rows), len(second.rows)),
        metrics=metrics,
        per_class=_per_class(data.classes, of_class, by_class),
        rows=_differing(store, data, rows, (scores, other_scores), (predictions, other_predictions)),
    )


def write_differences(comparison: RunComparison, path: Path) -> None:
    """Write all rows on which two runs differ to a csv file, the largest difference first."""
    rows: list[list[str]] = [["id", "truth", "run", "against", "run_score", "against_score"]]
    for row in comparison.rows:
        labels = ("; ".join(names) for names in (row.truth, row.run, row.against))
        rows.append([row.id, *labels, f"{row.run_score:.4f}", f"{row.against_score:.4f}"])
    write_output(path, csv_for_people(rows))


def _check_together(run: Run, against: Run, store: FeatureStore) -> None:
    same_path = run.path is not None and against.path is not None and run.path.resolve() == against.path.resolve()
    if run is against or same_path:
        raise RunError(f"run {run.name} cannot be compared with itself; name another run")
    for one in (run, against):
        if one.dataset != store.dataset:
            raise RunError(f"run {one.name} is of dataset {one.dataset}, not {store.dataset}; name runs of one dataset")
    if run.task != against.task or run.classes != against.classes or run.tasks != against.tasks:
        raise RunError(f"run {against.name} has other classes than run {run.name}; train one of them again")


def _unseen(run: Run, store: FeatureStore, split: str | None, device: str) -> Measured:
    """Return the scores of rows that a run has not seen. Raises RunError if it may have seen some."""
    measured = measure(run, store, split, device=device)
    if measured.caution:
        raise RunError(f"{measured.caution}; leave out --split to compare the rows that both runs held out")
    return measured


def _of_rows(measured: Measured, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return scores and predictions (n, C) of sorted rows (n,)."""
    order = measured.rows.cpu().numpy().argsort()
    places = order[np.searchsorted(measured.rows.cpu().numpy()[order], rows)]
    return measured.scores[places], measured.predictions[places]


def _per_class(
    classes: Sequence[str], values: Sequence[np.ndarray], figures: Sequence[np.ndarray]
) -> dict[str, PairedFigure]:
    """Return F1 by class, from values (C,) and resampled figures (C, R) of two runs."""
    apart = [difference(float(values[0][c] - values[1][c]), figures[0][c] - figures[1][c]) for c in range(len(classes))]
    corrected = holm(np.array([found.p for found in apart]))
    return {
        name: PairedFigure(float(values[0][c]), float(values[1][c]), apart[c], float(corrected[c]))
        for c, name in enumerate(classes)
    }


def _differing(
    store: FeatureStore,
    data: TrainingData,
    rows: torch.Tensor,
    scores: tuple[np.ndarray, np.ndarray],
    predictions: tuple[np.ndarray, np.ndarray],
) -> tuple[RowDifference, ...]:
    """Return the rows on which two runs predict other labels: first those where one is much more right."""
    targets = data.targets(rows)
    labelled = targets >= 0
    first, second = predictions[0] & labelled, predictions[1] & labelled
    right = [row_scores(targets, x, data.tasks) for x in (first, second)]
    apart = np.where(labelled, np.abs(scores[0] - scores[1]), 0).mean(axis=1)
    differ = np.flatnonzero((first != second).any(axis=1))
    order = differ[np.lexsort((-apart[differ], -np.abs(right[0] - right[1])[differ]))]

    def names(chosen: np.ndarray) -> tuple[str, ...]:
        return tuple(data.classes[c] for c in np.flatnonzero(chosen))

    return tuple(
        RowDifference(
            str(store.ids[int(rows[i])]),
            names(targets[i] > 0),
            names(first[i]),
            names(second[i]),
            float(right[0][i]),
            float(right[1][i]),
        )
        for i in order
    )


def row_scores(targets: np.ndarray, predictions: np.ndarray, tasks: Sequence[TaskSlice]) -> np.ndarray:
    """Return how right each row's labels are, (n,): F1, or the accuracy of an answer; of several tasks the mean.

    Tasks without a label of a row do not count.
    """
    total, count = np.zeros(len(targets)), np.zeros(len(targets))
    for task in tasks:
        rows = task.labelled(targets)
        right, chosen = task.own(targets, predictions)
        if task.kind == "vqa":
            values = answer_accuracy(right, chosen)
        else:
            right = right > 0
            values = divide(2.0 * (right & chosen).sum(axis=1), right.sum(axis=1) + chosen.sum(axis=1), 1.0)
        total[rows] += values
        count[rows] += 1
    return divide(total, count, 0.0)
