"""Files of scores: the id of each row, and its score for each class."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np

from cachefuse.csv_writer import csv_bytes
from cachefuse.errors import ConfigError, DataError
from cachefuse.output import check_output, open_output

ID = "id"
CSV_AT_ONCE, PARQUET_AT_ONCE = 1 << 18, 1 << 24  # scores in memory a second time, as texts and as columns


def check_scores_file(path: Path, *inputs: Path | None) -> None:
    """Raise ConfigError for a file of another format, and as ``check_output`` does. For a check before the work."""
    if path.suffix.lower() not in WRITERS:
        raise ConfigError(f"cannot write {path}: scores are written as {', '.join(WRITERS)}; choose one of them")
    check_output(path, *inputs)


def write_scores(
    ids: Sequence[str], classes: Sequence[str], scores: np.ndarray, path: Path, targets: np.ndarray | None = None
) -> None:
    """Write the scores (n, C) of rows with ``ids`` (n,) as float32, in the format that the file's suffix names.

    A .csv or .parquet file has a column "id", or "_id" if a class is called "id", and then one for each class. A .npz
    file has the arrays ``ids`` (n,), ``classes`` (C,) and ``scores`` (n, C), and ``targets`` (n, C) if they are given;
    it needs no pickle.

    Raises ConfigError as ``check_scores_file`` does, and DataError for a name that the format cannot hold.
    """
    check_scores_file(path)
    with open_output(path) as file:
        WRITERS[path.suffix.lower()](file, ids, classes, scores, targets)


def _write_csv(
    file: BinaryIO, ids: Sequence[str], classes: Sequence[str], scores: np.ndarray, targets: np.ndarray | None
) -> None:
    file.write(csv_bytes([_header(classes)]))
    for rows in _pieces(scores, CSV_AT_ONCE):
        texts = scores[rows].astype(np.float32).astype(str)  # the fewest digits that mean the same number
        file.write(csv_bytes([sample, *row] for sample, row in zip(ids[rows], texts.tolist(), strict=True)))


def _write_parquet(
    file: BinaryIO, ids: Sequence[str], classes: Sequence[str], scores: np.ndarray, targets: np.ndarray | None
) -> None:
    import pyarrow as pa
    import pyarrow.parquet

    try:
        schema = pa.schema([(name, pa.float32() if i else pa.string()) for i, name in enumerate(_header(classes))])
        with pa.parquet.ParquetWriter(file, schema) as writer:
            for rows in _pieces(scores, PARQUET_AT_ONCE):
                columns = np.ascontiguousarray(scores[rows].T, np.float32)
                writer.write_table(pa.table([pa.array(list(ids[rows]), pa.string()), *columns], schema=schema))
    except UnicodeEncodeError as error:
        name = f"{error.object!a}"
        raise DataError(f"parquet cannot hold {name}, which has half a surrogate pair; write .csv or .npz") from error


def _write_npz(
    file: BinaryIO, ids: Sequence[str], classes: Sequence[str], scores: np.ndarray, targets: np.ndarray | None
) -> None:
    known = {} if targets is None else {"targets": targets}
    names = {"ids": np.array(list(ids), str), "classes": np.array(classes, str)}
    np.savez(file, allow_pickle=False, **names, scores=scores.astype(np.float32, copy=False), **known)


WRITERS = {".csv": _write_csv, ".parquet": _write_parquet, ".npz": _write_npz}


def _header(classes: Sequence[str]) -> list[str]:
    name = ID
    while name in classes:
        name = f"_{name}"
    return [name, *classes]


def _pieces(scores: np.ndarray, at_once: int) -> Iterator[slice]:
    size = max(1, at_once // scores.shape[1])
    return (slice(i, i + size) for i in range(0, len(scores), size))
