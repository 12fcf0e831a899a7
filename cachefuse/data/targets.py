"""The label space: class names to targets, and back."""

from collections.abc import Iterable

import numpy as np

from cachefuse.data.readers.base import Samples
from cachefuse.errors import DataError

UNLABELLED = -1


def find_classes(labels: Iterable[tuple[str, ...] | None]) -> tuple[str, ...]:
    """Return the class names that occur: in numeric order if all are whole numbers, else alphabetically."""
    found = {name for row in labels if row is not None for name in row}
    if all(name.isascii() and name.isdigit() and len(name) < 19 for name in found):
        return tuple(sorted(found, key=lambda name: (int(name), name)))
    return tuple(sorted(found))


def encode_labels(samples: Samples, classes: tuple[str, ...], task: str, min_labels: int = 0) -> np.ndarray:
    """Return targets: (N, C) int8 for multi-label, (N,) int32 for multi-class, -1 in unlabelled rows.

    A row with no label is unlabelled if the task gives each row at least one, or if no row of its split has any.

    Raises DataError, naming the row, for a label that is not a class, or several labels in a multi-class row.
    """
    index = {name: i for i, name in enumerate(classes)}
    n = len(samples.ids)
    if task == "retrieval":
        return np.full((n,), UNLABELLED, np.int32)
    targets = np.full((n, len(classes)), UNLABELLED, np.int8) if task == "multilabel" else np.full(n, -1, np.int32)
    with_labels = {split for split, labels in zip(samples.splits, samples.labels, strict=True) if labels}
    for i, (split, labels) in enumerate(zip(samples.splits, samples.labels, strict=True)):
        if labels is None or (not labels and (min_labels or task == "multiclass" or split not in with_labels)):
            continue
        unknown = [name for name in labels if name not in index]
        if unknown:
            raise DataError(
                f"row {samples.ids[i]!r} has label {unknown[0]!r}, which is not a class; "
                f"the classes are: {', '.join(classes[:30])}{' ...' if len(classes) > 30 else ''}"
            )
        if task == "multilabel":
            targets[i] = 0
            targets[i, [index[name] for name in labels]] = 1
        elif len(labels) == 1:
            targets[i] = index[labels[0]]
        else:
            raise DataError(f"row {samples.ids[i]!r} has {len(labels)} labels; a multi-class row must have one")
    return targets


def is_labelled(targets: np.ndarray) -> np.ndarray:
    """Return (N,) bool: which rows have targets."""
    return (targets != UNLABELLED) if targets.ndim == 1 else (targets[:, 0] != UNLABELLED)
