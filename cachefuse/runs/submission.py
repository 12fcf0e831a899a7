"""A competition's submission file, written only if it is valid."""

import json
from collections import Counter
from collections.abc import Collection, Sequence
from pathlib import Path

from cachefuse.csv_writer import csv_bytes
from cachefuse.data.manifest import Manifest
from cachefuse.data.readers.table import read_columns
from cachefuse.errors import SubmissionError
from cachefuse.output import check_output, write_output
from cachefuse.printable import listed
from cachefuse.runs.predict import Predictions


def write_submission(
    predictions: Predictions, manifest: Manifest, path: Path, sample_submission: Path | None = None
) -> Path:
    """Write predictions in the manifest's format: one row per id with its labels in class order, one column per task.

    A .json file is a list of objects with these columns as keys, as the VQA evaluation reads it; its ids are numbers if
    all are whole numbers. Rows have the order of the test file, or of ``sample_submission``. Raises SubmissionError,
    and writes nothing, if an id occurs twice, a row has too few labels, or ``sample_submission`` has other rows;
    ConfigError if nothing can be written to ``path``.
    """
    check_output(path)
    columns = manifest.submission
    names = tuple(task.name for task in predictions.tasks) or (columns.labels,)
    rows = {
        sample: list(predictions.by_task(i).values()) or [predictions.names(i)]
        for i, sample in enumerate(predictions.ids)
    }
    _check(predictions, manifest)
    order = predictions.ids
    if sample_submission is not None:
        order = _check_sample(sample_submission, (columns.id, *names), rows)
    lines = [(sample, *(columns.separator.join(labels) for labels in rows[sample])) for sample in order]
    write_output(path, _as_bytes(path, (columns.id, *names), lines))
    return path


def _as_bytes(path: Path, header: tuple[str, ...], lines: Sequence[tuple[str, ...]]) -> bytes:
    if path.suffix == ".json":
        whole = all(sample.isdecimal() and len(sample) < 19 and str(int(sample)) == sample for sample, *_ in lines)
        records = [(int(sample) if whole else sample, *labels) for sample, *labels in lines]
        text = json.dumps([dict(zip(header, record, strict=True)) for record in records], ensure_ascii=False)
        return f"{text}\n".encode("utf-8", "surrogatepass")
    return csv_bytes([header, *lines])


def _check(predictions: Predictions, manifest: Manifest) -> None:
    repeated = [sample for sample, n in Counter(predictions.ids).items() if n > 1]
    if repeated:
        raise SubmissionError(f"id {repeated[0]!r} would be in the submission twice")
    for task in manifest.task_slices(predictions.classes):
        least = 1 if task.one_label else task.min_labels
        for i, n in enumerate(predictions.labels[:, task.columns].sum(axis=1).tolist()):
            if n < least:
                named = f"task {task.name}" if task.name else "the task"
                raise SubmissionError(f"row {predictions.ids[i]!r} has {n} labels; {named} needs at least {least}")
        for name in predictions.classes[task.columns]:
            several = task.n_classes > 1 and not task.one_label
            if several and manifest.submission.separator in task.own_class(name):
                raise SubmissionError(
                    f"class {name!r} contains the separator {manifest.submission.separator!r}; set another in the "
                    f"manifest's [submission]"
                )


def _check_sample(path: Path, columns: tuple[str, ...], rows: Collection[str]) -> list[str]:
    """Return the ids of a sample submission, in its order; checks that they are the predicted ids."""
    if not path.is_file():
        raise SubmissionError(f"no such file: {path}")
    sample = read_columns(path, wanted=columns[:1])
    if sample.names != columns:
        raise SubmissionError(
            f"{path.name} has the columns {listed(sample.names)}; the manifest's [submission] has {listed(columns)}"
        )
    ids = [str(value) for value in sample[columns[0]]]
    for problem, wrong in (
        ("lists an id twice", [name for name, n in Counter(ids).items() if n > 1]),
        ("has ids that are not predicted", [name for name in ids if name not in rows]),
        ("lacks ids that are predicted", sorted(set(rows) - set(ids))),
    ):
        if wrong:
            raise SubmissionError(f"{path.name} {problem}: {len(wrong):,}, such as {wrong[0]!r}")
    return ids
