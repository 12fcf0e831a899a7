"""The label space: from class names and scores to targets."""

import math
from collections.abc import Iterable
from dataclasses import replace

import numpy as np

from cachefuse.data.answers import encode_answers, frequent_answers
from cachefuse.data.column import Column
from cachefuse.data.manifest import PAIRS, VQA, Manifest
from cachefuse.data.readers.base import Samples
from cachefuse.errors import DataError
from cachefuse.printable import listed

UNLABELLED = -1


def encode_targets(samples: Samples, manifest: Manifest) -> tuple[tuple[str, ...], np.ndarray]:
    """Return the classes, () if the task has none, and the targets of the task.

    See ``encode_labels``, ``encode_scores``, ``encode_answers`` and ``encode_tasks``. Raises DataError as they do, if
    there are no classes, and if a sample of a task on pairs is not a pair.
    """
    if manifest.task in PAIRS:
        _check_pairs(samples, manifest)
    if manifest.task != VQA:
        samples = _without_empty_names(samples)
    if manifest.scale is not None:
        return (), encode_scores(samples, manifest.scale)
    if manifest.tasks:
        return encode_tasks(samples, manifest)
    classes = manifest.classes or samples.classes
    if not classes:
        classes = find_answers(samples, manifest.answers) if manifest.answers else find_classes(samples.labels)
    if manifest.task == "retrieval":
        classes = ()
    elif not classes:
        raise DataError(f"{manifest.name}: no row has a label, so there are no classes to learn")
    if manifest.task == VQA:
        return classes, encode_answers(samples.ids, samples.labels, classes)
    return classes, encode_labels(samples, classes, manifest.task, manifest.min_labels)


def _without_empty_names(samples: Samples) -> Samples:
    def named(labels: list[tuple[str, ...] | None]) -> list[tuple[str, ...] | None]:
        return [row if row is None else tuple(filter(None, row)) for row in labels]

    return replace(
        samples,
        labels=named(samples.labels),
        task_labels={task: named(labels) for task, labels in samples.task_labels.items()},
    )


def _check_pairs(samples: Samples, manifest: Manifest) -> None:
    texts = samples.modalities.get("text", Column.texts([()] * len(samples.ids)))
    for row, sample in enumerate(samples.ids):
        if len(texts[row]) != 2:
            raise DataError(
                f"{manifest.name}: a row of the task {manifest.task} must have two texts (the reader sentence_pairs "
                f"gives them). Got {len(texts[row])} in row {sample!r}"
            )


def find_classes(labels: Iterable[tuple[str, ...] | None]) -> tuple[str, ...]:
    """Return the class names that occur: in numeric order if all are whole numbers, else alphabetically."""
    names = {name for row in labels if row is not None for name in row}
    if all(name.isascii() and name.isdigit() and len(name) < 19 for name in names):
        return tuple(sorted(names, key=lambda name: (int(name), name)))
    return tuple(sorted(names))


def find_answers(samples: Samples, n: int) -> tuple[str, ...]:
    """Return the ``n`` most frequent answers in train, or in all splits if train has no answers."""
    answered = [(split, row) for split, row in zip(samples.splits, samples.labels, strict=True) if row]
    return frequent_answers([row for split, row in answered if split == "train"] or [row for _, row in answered], n)


def encode_labels(samples: Samples, classes: tuple[str, ...], task: str, min_labels: int = 0) -> np.ndarray:
    """Return targets: (N, C) int8 for multi-label, (N,) int32 for multi-class and paraphrase, -1 in unlabelled rows.

    A row with no label is unlabelled if the task needs one label per row, or if its split has no labels at all.

    Raises DataError, naming the row, for a label that is not a class, or for several labels if a row must have one.
    """
    index = {name: i for i, name in enumerate(classes)}
    n = len(samples.ids)
    if task == "retrieval":
        return np.full((n,), UNLABELLED, np.int32)
    targets = np.full((n, len(classes)), UNLABELLED, np.int8) if task == "multilabel" else np.full(n, -1, np.int32)
    with_labels = {split for split, labels in zip(samples.splits, samples.labels, strict=True) if labels}
    for i, (split, labels) in enumerate(zip(samples.splits, samples.labels, strict=True)):
        if labels is None or (not labels and (min_labels or task != "multilabel" or split not in with_labels)):
            continue
        labels = tuple(dict.fromkeys(labels))
        unknown = [name for name in labels if name not in index]
        if unknown:
            raise DataError(
                f"row {samples.ids[i]!r} has label {unknown[0]!r}, which is not a class; "
                f"the classes are: {listed(classes)}"
            )
        if task == "multilabel":
            targets[i] = 0
            targets[i, [index[name] for name in labels]] = 1
        elif len(labels) == 1:
            targets[i] = index[labels[0]]
        else:
            task_name = "multi-class" if task == "multiclass" else task
            raise DataError(f"row {samples.ids[i]!r} has {len(labels)} labels; a {task_name} row must have one")
    return targets


def encode_tasks(samples: Samples, manifest: Manifest) -> tuple[tuple[str, ...], np.ndarray]:
    """Return the classes of several tasks, task by task, such as "color=red", and their targets (N, C) int8.

    Targets are 0 and 1; if a row lacks a task's label, all columns of that task are -1. Raises DataError, naming the
    task, as ``encode_labels`` does, and if no row has its label.
    """
    classes: list[str] = []
    targets = []
    for name, task in manifest.tasks.items():
        task_samples = replace(samples, labels=samples.task_labels[name])
        names = task.classes or find_classes(task_samples.labels)
        if not names:
            raise DataError(f"{manifest.name}: no row has a label of task {name}, so there are no classes to learn")
        try:
            task_targets = encode_labels(task_samples, names, task.task, task.min_labels)
        except DataError as error:
            raise DataError(f"task {name}: {error}") from error
        if task_targets.ndim == 1:
            one_hot = (task_targets[:, None] == np.arange(len(names))).astype(np.int8)
            task_targets = np.where(task_targets[:, None] == UNLABELLED, np.int8(UNLABELLED), one_hot)
        classes += [f"{name}={class_name}" for class_name in names]
        targets.append(task_targets)
    return tuple(classes), np.concatenate(targets, axis=1)


def encode_scores(samples: Samples, scale: tuple[float, float]) -> np.ndarray:
    """Return targets (N,) float32: each row's label as a score, NaN in unlabelled rows.

    Raises DataError, naming the row, if the label is not one number, or not on the scale.
    """
    low, high = scale
    targets = np.full(len(samples.ids), np.nan, np.float32)
    for i, labels in enumerate(samples.labels):
        if not labels:
            continue
        try:
            (label,) = labels
            score = math.nan if "_" in label else float(label)  # float() reads 1_0 as 10
        except ValueError:
            score = math.nan
        if not low <= score <= high:
            raise DataError(
                f"row {samples.ids[i]!r} has the score {' '.join(labels)[:40]!r}; "
                f"it must be a number from {low:g} to {high:g}"
            )
        targets[i] = score
    return targets


def is_labelled(targets: np.ndarray) -> np.ndarray:
    """Return which rows have targets, (N,) bool; with several tasks, targets of any task."""
    if targets.dtype.kind == "f":
        return np.asarray(~np.isnan(targets))
    known: np.ndarray = targets != UNLABELLED
    return known if targets.ndim == 1 else np.asarray(known.any(axis=1))
