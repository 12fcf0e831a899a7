"""The samples group of a store: ids, splits, targets and presence, aligned with every feature."""

import os
import shutil
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import zarr

from cachefuse.data.dataset import Dataset
from cachefuse.errors import CacheError

LEDGER = "bad.jsonl"


def text_offsets(dataset: Dataset) -> np.ndarray | None:
    """Return (N + 1,) offsets into the dataset's flat texts if any sample has several, else None."""
    if not dataset.texts or all(len(texts) <= 1 for texts in dataset.texts):
        return None
    return np.concatenate([[0], np.cumsum([len(texts) for texts in dataset.texts])]).astype(np.int64)


def sample_columns(dataset: Dataset, digests: list[str], bad: Collection[tuple[str, str]]) -> dict[str, np.ndarray]:
    """Return the group's arrays by name; ``bad`` are the (modality, id) that the ledger lists."""
    columns = {
        "id": _strings(dataset.ids),
        "split": _strings(dataset.splits),
        "target": dataset.targets,
        "digest": _strings(digests),
    }
    for modality in dataset.modalities:
        sources = (dataset.images if modality == "image" else dataset.texts) or ()
        usable = [(modality, sample) not in bad for sample in dataset.ids]
        columns[f"present/{modality}"] = np.array([bool(source) for source in sources]) & usable
    offsets = text_offsets(dataset)
    if offsets is not None:
        columns["items/text"] = offsets
    return columns


def check_same_rows(path: Path, columns: Mapping[str, np.ndarray]) -> None:
    """Raise CacheError, naming rows, if those of the store at ``path`` are gone, moved or changed."""
    samples = zarr.open_group(path / "samples", mode="r")
    old, new = _values(samples, "id").tolist(), columns["id"].tolist()
    if new[: len(old)] != old:
        row = next((i for i, (a, b) in enumerate(zip(old, new, strict=False)) if a != b), len(new))
        raise CacheError(
            f"{path} was made from other rows: row {row + 1} was {old[row]!r}"
            + (f" and is now {new[row]!r}" if row < len(new) else " and is gone")
            + "; rows may only be appended. Use another --workspace, or delete the store to extract again"
        )
    stored = _values(samples, "digest").tolist()
    changed = [sample for sample, a, b in zip(old, stored, columns["digest"].tolist(), strict=False) if a != b]
    if changed:
        raise CacheError(
            f"{len(changed):,} samples changed since {path} was made: {', '.join(changed[:3])}"
            f"{', ...' if len(changed) > 3 else ''}. Use another --workspace, or delete the store to extract again"
        )
    if ("items/text" in columns) != ("items/text" in samples):
        raise CacheError(
            f"{path}: some samples now have several texts where all had one, or the reverse. "
            f"Use another --workspace, or delete the store to extract again"
        )


def write_samples(folder: Path, columns: Mapping[str, np.ndarray]) -> None:
    """Write the group anew."""
    group = zarr.open_group(folder, mode="w")
    with zarr.config.set({"array.write_empty_chunks": True}):
        for name, values in columns.items():
            array = group.create_array(name, shape=values.shape, chunks=values.shape, dtype=values.dtype)
            array[:] = values


def update_samples(path: Path, columns: Mapping[str, np.ndarray]) -> None:
    """Bring the group of the store at ``path`` up to date by putting a whole new one in its place."""
    folder, new, old = path / "samples", path / ".samples.new", path / ".samples.old"
    if _is_same(zarr.open_group(folder, mode="r"), columns):
        return
    write_samples(new, columns)
    if (folder / LEDGER).is_file():
        shutil.copy2(folder / LEDGER, new / LEDGER)
    os.replace(folder, old)
    os.replace(new, folder)
    shutil.rmtree(old)


def finish_update(path: Path) -> None:
    """Complete an update that was killed: without the old group the new one is whole and only has to take its place."""
    folder, new, old = path / "samples", path / ".samples.new", path / ".samples.old"
    if not folder.exists():
        os.replace(new, folder)
    for left in (new, old):
        shutil.rmtree(left, ignore_errors=True)


def _is_same(group: zarr.Group, columns: Mapping[str, np.ndarray]) -> bool:
    for name, values in columns.items():
        stored = _values(group, name) if name in group else None
        if stored is None or stored.dtype != values.dtype or not np.array_equal(stored, values):
            return False
    return True


def _values(group: Any, name: str) -> np.ndarray:
    return np.asarray(group[name][:])


def _strings(values: list[str] | np.ndarray) -> np.ndarray:
    return np.array(values).astype(np.dtypes.StringDType())
