"""Update a store's samples to its dataset: append rows, replace labels and splits, find changed samples."""

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path

import numpy as np

from cachefuse.data.answers import EVALUATION
from cachefuse.data.dataset import Dataset
from cachefuse.data.manifest import VQA
from cachefuse.errors import CacheError
from cachefuse.files import JsonObject, make_folder, read_bounded, sync_folder
from cachefuse.memory import fits_now
from cachefuse.printable import listed
from cachefuse.store.columns import (
    IDENTITY,
    KIND,
    Columns,
    finish_replacing,
    has_column,
    read_columns,
    replace_samples,
    same_columns,
    strings,
    write_samples,
)
from cachefuse.store.format import FORMAT, MAX_METADATA, seal, unseal
from cachefuse.store.store import FeatureStore
from cachefuse.store.views import declare_group

OnProgress = Callable[[int, int], None]


def open_store(
    path: Path,
    dataset: Dataset,
    *,
    refresh: bool = False,
    on_progress: OnProgress = lambda done, total: None,
    asked: Mapping[str, Mapping[str, str]] | None = None,
) -> FeatureStore:
    """Open or create the store of a dataset, and update its samples, splits and targets.

    ``asked``: the encoders to extract, each with the spec that opens it by modality. The store notes them, so that
    features that are gone, or were never begun, are missed.

    Rows may only be appended. Raises CacheError, naming rows, if stored rows are gone or have moved, or if the content
    of some has changed. With ``refresh``, changed rows are marked outdated, and extract computes them again. Content is
    read only if a source's name, size or time has changed; ``on_progress`` gets the rows done and their total.
    """
    _remove_leftovers(path)
    finish_replacing(path)
    if not (path / "zarr.json").is_file() and not (path / "samples").is_dir():
        _create(path, dataset, on_progress, asked or {})
        return FeatureStore(path)
    _repair_metadata(path, dataset)
    store = FeatureStore(path)
    _update(store, dataset, refresh, on_progress)
    known = store.asked
    for encoder, sources in (asked or {}).items():
        known[encoder] = {**known.get(encoder, {}), **sources}
    _write_metadata(path, dataset, known)
    return FeatureStore(path)


def sample_columns(dataset: Dataset) -> Columns:
    """Return the arrays of the samples by name, without digests. A modality is present if a sample has a source."""
    columns = {
        "id": strings(dataset.ids),
        "split": strings(dataset.splits),
        "target": dataset.targets,
        "stamp": strings(dataset.fingerprints()),
    }
    columns |= {f"{KIND}{name}": strings(values) for name, values in dataset.kinds.items()}
    if dataset.groups is not None:
        columns["group"] = strings(dataset.groups)
    for modality, column in dataset.modalities.items():
        columns[f"present/{modality}"] = column.present
        if column.offsets is not None:
            columns[f"items/{modality}"] = column.offsets
        if column.rows is not None:
            columns[f"rows/{modality}"] = column.rows
    return columns


def check_same_rows(path: Path, old: Columns, new: Columns) -> None:
    """Raise CacheError, naming rows, if rows of the store at ``path`` are gone or have moved."""
    now = new["id"]
    before = old.get("id", now)  # if the ids are damaged, the digests show changes
    n = min(len(before), len(now))
    differ = np.flatnonzero(before[:n] != now[:n])
    if len(differ) or len(before) > len(now):
        row = int(differ[0]) if len(differ) else len(now)
        raise CacheError(
            f"{path} was made from other rows: row {row + 1} was {before[row]!r}"
            + (f" and is now {now[row]!r}" if row < len(now) else " and is gone")
            + "; rows may only be appended. Use another --workspace, or delete the store to extract again"
        )
    for modality in sorted({name.partition("/")[2] for name in old.keys() | new.keys() if "/" in name}):
        _check_same_sources(path, modality, old, new)


def _check_same_sources(path: Path, modality: str, old: Columns, new: Columns) -> None:
    """Raise CacheError if stored samples now have another number of sources of a modality, or share other sources."""
    items, rows = f"items/{modality}", f"rows/{modality}"
    several, shared = has_column(path, items), has_column(path, rows)
    changes = {
        f"some samples now have several {modality}s, but all had one before, or the reverse": (items in new) != several,
        f"samples now share {modality}s, but each had its own before, or the reverse": (rows in new) != shared,
        f"some samples now have another {modality}": _differs(rows, old, new),
        f"some samples now have another number of {modality}s": _differs(items, old, new),
    }
    for change, happened in changes.items():
        if happened:
            raise CacheError(f"{path}: {change}. Use another --workspace, or delete the store to extract again")


def _differs(name: str, old: Columns, new: Columns) -> bool:
    """Whether the old rows of a column have changed."""
    return name in old and name in new and not np.array_equal(new[name][: len(old[name])], old[name])


def _create(path: Path, dataset: Dataset, on_progress: OnProgress, asked: Mapping[str, Mapping[str, str]]) -> None:
    """Create a store beside ``path`` and move it there, so that it is never incomplete."""
    columns = sample_columns(dataset)
    columns["digest"] = strings(dataset.digests(on_progress=on_progress))
    make_folder(path.parent)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as temporary:
        new = Path(temporary) / path.name
        _write_metadata(new, dataset, asked)
        write_samples(new / "samples", columns)
        os.replace(new, path)
        sync_folder(path.parent)


def _update(store: FeatureStore, dataset: Dataset, refresh: bool, on_progress: OnProgress) -> None:
    """Update the stored samples.

    Raises CacheError, naming rows, if stored rows are gone or have moved, or without ``refresh`` if some have changed.
    """
    new, (old, appended) = sample_columns(dataset), read_columns(store.path)
    if "digest" not in old and not {"id", "stamp"} <= old.keys():
        if any(features.n_written for features in store.features()):
            raise _lost(store, old)
        old, appended = {}, []  # nothing was computed yet, so nothing depends on the old samples
    else:
        check_same_rows(store.path, old, new)
    n = next((len(old[name]) for name in IDENTITY if name in old), 0)
    if n > len(dataset):  # some are gone, and without ids they cannot be named
        raise _lost(store, old)
    same = np.zeros(len(dataset), bool)  # name, size and time have not changed
    if {"id", "stamp"} <= old.keys():
        same[:n] = new["stamp"][:n] == old["stamp"]
    digests = strings([""] * len(dataset))
    digests[:n] = old.get("digest", digests[:n])
    suspects = np.flatnonzero(~same) if "digest" in old else np.arange(len(dataset))
    digests[suspects] = strings(dataset.digests(suspects.tolist(), on_progress=on_progress))
    new["digest"] = digests
    changed = np.flatnonzero(digests[:n] != old["digest"] if "digest" in old else ~same[:n])
    if len(changed) and "id" not in old:
        raise _lost(store, old)
    names = new["id"][changed].tolist()
    if names and not refresh:
        raise CacheError(
            f"{len(names):,} sample{'s' * (len(names) > 1)} changed since {store.path} was made: {listed(names[:3])}"
            f"{', ...' if len(names) > 3 else ''}; add --refresh to compute them again, or use another --workspace"
        )
    lost = "id" in old and store.lost_lines() is not None
    again = np.union1d(changed, _now_in_memory(store, new))
    again = np.union1d(again, _unexplained(store, old, new)) if lost else again
    if len(again):
        _forget(store, new, again)
    fresh = set(new["id"][again].tolist())  # these may be usable now
    kept = [vars(line) for line in store.bad_samples(whole=False) if line.id not in fresh]
    bad_samples = _with_sharers(kept, new)
    _mark_present(bad_samples, old, new, again)
    if appended is None or lost or not same_columns(old, new):
        appended = [*(appended or []), *([n] if 0 < n < len(dataset) else [])]
        replace_samples(store.path, new, appended, bad_samples)


def _lost(store: FeatureStore, old: Columns) -> CacheError:
    lost = listed(name for name in IDENTITY if name not in old)
    return CacheError(
        f"{store.path}/samples is damaged ({lost}): it is unknown now which row belongs to which sample; "
        f"delete the store to extract again"
    )


def _now_in_memory(store: FeatureStore, new: Columns) -> np.ndarray:
    """Return the samples (n,) with an image that took too much memory and now fits: an earlier call had less."""
    fit = [line.id for line in store.bad_samples(whole=False) if fits_now(line.reason)]
    return np.flatnonzero(np.isin(new["id"], strings(fit))) if fit else np.empty(0, np.int64)


def _unexplained(store: FeatureStore, old: Columns, new: Columns) -> np.ndarray:
    """Return the samples (n,) that lack a modality without a reason: lines of the list of bad samples are lost."""
    known = {(line.modality, line.id) for line in store.bad_samples(whole=False)}
    unexplained = np.zeros(len(new["id"]), bool)
    for name in [name for name in new if name.startswith("present/") and name in old]:
        modality, before = name.removeprefix("present/"), old[name]
        reason = np.array([(modality, sample) in known for sample in new["id"][: len(before)]], bool)
        unexplained[: len(before)] |= new[name][: len(before)] & ~before & ~reason
    return np.flatnonzero(unexplained)


def _forget(store: FeatureStore, new: Columns, changed: np.ndarray) -> None:
    """Mark all features of changed samples as outdated, for every encoder."""
    for features in store.features():
        offsets, shared = new.get(f"items/{features.modality}"), new.get(f"rows/{features.modality}")
        rows = changed if shared is None else np.unique(shared[changed])
        if offsets is not None:
            rows = np.concatenate([np.arange(offsets[sample], offsets[sample + 1]) for sample in changed])
        for view in features.views:
            features.forget(view, rows.tolist())


def _with_sharers(bad_samples: list[JsonObject], new: Columns) -> list[JsonObject]:
    """Return the list of bad samples, extended by samples (such as appended ones) that share a row with one of them."""
    added: list[JsonObject] = []
    for name in [name for name in new if name.startswith("rows/")]:
        lines = {line["id"]: line for line in bad_samples if line["modality"] == name.removeprefix("rows/")}
        if lines:
            ids, rows = new["id"].tolist(), new[name].tolist()
            by_row = {row: lines[sample] for sample, row in zip(ids, rows, strict=True) if sample in lines}
            sharing = [(sample, row) for sample, row in zip(ids, rows, strict=True) if row in by_row]
            added += [{**by_row[row], "id": sample} for sample, row in sharing if sample not in lines]
    return [*bad_samples, *added]


def _mark_present(bad_samples: Sequence[JsonObject], old: Columns, new: Columns, changed: np.ndarray) -> None:
    """Mark a modality absent if the list of bad samples or the old column says so."""
    bad = {(line["modality"], line["id"]) for line in bad_samples}
    for name in [name for name in new if name.startswith("present/")]:
        modality = name.removeprefix("present/")
        before = old.get(name, np.empty(0, bool))
        usable = np.array([(modality, sample) not in bad for sample in new["id"]], bool)
        usable[: len(before)] &= before
        usable[changed] = True
        new[name] &= usable


def _write_metadata(path: Path, dataset: Dataset, asked: Mapping[str, Mapping[str, str]]) -> None:
    """Write a store's metadata: its dataset, manifest, classes, the encoders asked for, and the time."""
    meta: JsonObject = {
        "format": FORMAT,
        "dataset": dataset.name,
        "manifest": dataset.manifest.model_dump(mode="json", by_alias=True, exclude_defaults=True),
        "classes": list(dataset.classes),
        "asked": {encoder: dict(sources) for encoder, sources in sorted(asked.items())},
        "extracted": datetime.now(UTC).isoformat(timespec="milliseconds"),
    }
    if dataset.manifest.task == VQA:
        meta["answers"] = EVALUATION
    declare_group(path, {"cachefuse": seal(meta)})


def _repair_metadata(path: Path, dataset: Dataset) -> None:
    """Write a store's metadata again if it was cut short or changed. Another version's is left alone."""
    try:
        meta = json.loads(read_bounded(path / "zarr.json", MAX_METADATA))["attributes"]["cachefuse"]
        if meta["format"] == FORMAT:
            unseal(meta, path)
    except (OSError, ValueError, RecursionError, CacheError):
        _write_metadata(path, dataset, {})
    except (KeyError, TypeError):  # not written by cachefuse
        return


def _remove_leftovers(path: Path) -> None:
    """Remove incomplete stores and files of a killed process."""
    for folder in path.parent.glob(f".{path.name}.*/"):
        shutil.rmtree(folder, ignore_errors=True)
    for pattern in ("*.partial", ".*.tmp"):
        for file in path.rglob(pattern):
            file.unlink(missing_ok=True)
