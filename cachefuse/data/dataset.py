"""A dataset for the pipeline: ids, splits, targets and one column per modality, in file order."""

import logging
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from cachefuse.data.column import Column, Source, TextOrSource
from cachefuse.data.digests import hash_parts
from cachefuse.data.manifest import PAIRS, HashSplit, Manifest
from cachefuse.data.readers.base import Samples
from cachefuse.data.splits import apply_hash_splits
from cachefuse.data.targets import encode_targets, is_labelled
from cachefuse.errors import DataError, MissingDataError
from cachefuse.printable import listed
from cachefuse.threads import n_cores

logger = logging.getLogger(__name__)

# Held out if neither the data nor the manifest has validation rows.
DEFAULT_SPLITS = {"val": HashSplit.model_validate({"from": "train", "fraction": 0.1})}
MIN_ROWS_TO_SPLIT = 20
LIMIT = "-limit"  # in the name of a part of a dataset, before its number of samples
BATCH = 32  # rows that a thread hashes at a time: handing over single small images takes longer than hashing them
MODALITY = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")  # it names folders of a store
MAX_NAME = 4096  # characters of an id, a label or a group
MAX_KIND = 200  # of a split, or another name that arrays hold as wide as their longest
WINDOW = 4096  # rows that wait for threads at a time

Hasher = Callable[[TextOrSource], str]


def dataset_options(name: str) -> str:
    """Return the options of ``cachefuse extract`` for a dataset's name: "--dataset shapes --limit 200"."""
    whole, _, n = name.rpartition(LIMIT)
    return f"--dataset {whole} --limit {n}" if whole and n.isdecimal() else f"--dataset {name}"


@dataclass(frozen=True)
class Dataset:
    """N samples. ``modalities`` has one column per modality of this copy of the data, such as images and texts.

    targets: (N, C) int8 of 0 and 1 for multi-label, (N,) int32 class indices for multi-class and paraphrase, (N,)
    float32 scores for similarity. Unlabelled rows have -1, or NaN for scores. For several tasks (N, C) int8 of 0 and 1,
    with -1 in all columns of a task whose label the row lacks; a class is "color=red".

    A sample of similarity or paraphrase is a pair: its two texts are the two sentences, even if one is empty. A sample
    of visual question answering is a question. Its targets are (N, 10) int32: see ``encode_answers``. Questions about
    one image share its features. ``kinds`` (N,) are texts by name, such as the type of each question.

    ``groups`` (N,) name each row's group, which no split or fold parts; "" is a row of its own. None without groups.
    """

    manifest: Manifest
    classes: tuple[str, ...]
    ids: list[str]
    splits: np.ndarray
    targets: np.ndarray
    modalities: Mapping[str, Column]
    notes: tuple[str, ...] = ()
    name: str = ""
    kinds: Mapping[str, np.ndarray] = field(default_factory=dict)
    groups: np.ndarray | None = None

    def __post_init__(self) -> None:
        for modality, column in self.modalities.items():
            if not MODALITY.fullmatch(modality):
                raise DataError(f"a modality's name may have letters, digits, _ and -. Got {modality!r} instead")
            if len(column) != len(self):
                raise DataError(
                    f"{self.name}: has {len(self):,} samples, but its column {modality} has {len(column):,}"
                )
            column.check()

    def __len__(self) -> int:
        return len(self.ids)

    def sources(self, modality: str, row: int | None) -> tuple[TextOrSource, ...]:
        """Return a sample's sources of a modality; () if there are none, or if ``row`` is None."""
        return () if row is None or modality not in self.modalities else self.modalities[modality][row]

    def fingerprints(self) -> list[str]:
        """Return N fingerprints of 16 characters, over each sample's texts and the fingerprints of its other sources.

        No source is read. A sample with an unchanged fingerprint has an unchanged digest.
        """
        return self._hashes(range(len(self)), self._by_modality(lambda source: source.fingerprint()))

    def digests(
        self,
        rows: Sequence[int] | None = None,
        on_progress: Callable[[int, int], None] = lambda done, total: None,
    ) -> list[str]:
        """Return 16 characters per row, by default of all rows: hashes of the content of texts and other sources.

        Threads read and hash the sources. ``on_progress`` gets the number of rows done and their total from time to
        time.
        """
        rows = range(len(self)) if rows is None else rows
        digests: list[str] = []
        hashers = self._by_modality(lambda source: source.digest())
        with ThreadPoolExecutor(n_cores(), thread_name_prefix="digest") as pool:
            run = map if all(column.is_text for column in self.modalities.values()) else pool.map
            for start in range(0, len(rows), WINDOW):
                window = rows[start : start + WINDOW]
                batches = [window[i : i + BATCH] for i in range(0, len(window), BATCH)]
                for hashed in run(lambda batch: self._hashes(batch, hashers), batches):
                    digests += hashed
                    on_progress(len(digests), len(rows))
        return digests

    def _by_modality(self, hash_source: Callable[[Source], str]) -> dict[str, Hasher]:
        """Return a function per modality that hashes a source; shared sources are hashed once."""

        def hash_any(source: TextOrSource) -> str:
            return hash_parts(source) if isinstance(source, str) else hash_source(source)

        return {
            modality: _once(hash_any) if column.shared else hash_any for modality, column in self.modalities.items()
        }

    def _hashes(self, rows: Sequence[int], hashers: Mapping[str, Hasher]) -> list[str]:
        """Hash rows: the texts of the first text column, then one string with the hashes of all other sources.

        That last string is always there, even if empty: no text can pass for another source.
        """
        first_texts = next((modality for modality, column in self.modalities.items() if column.is_text), None)
        hashes = []
        for row in rows:
            texts = self.sources(first_texts, row) if first_texts is not None else ()
            others = [
                f"{modality}:{hashers[modality](source)}"
                for modality, column in self.modalities.items()
                for source in column[row]
                if modality != first_texts or not isinstance(source, str)
            ]
            hashes.append(hash_parts(*(text for text in texts if isinstance(text, str)), ",".join(others)))
        return hashes

    def limit(self, n: int) -> "Dataset":
        """Return about ``n`` samples, the first ones of each split in proportion, under another name.

        A limited dataset has its own store, so that a trial never mixes with the whole dataset.
        """
        if n >= len(self):
            return self
        keep: list[int] = []
        names, counts = np.unique(self.splits, return_counts=True)
        for name, count in zip(names, counts, strict=True):
            share = max(1, round(n * count / len(self)))
            keep.extend(np.flatnonzero(self.splits == name)[:share].tolist())
        rows = sorted(keep)
        return replace(
            self,
            name=f"{self.name}{LIMIT}{n}",
            ids=[self.ids[i] for i in rows],
            splits=self.splits[rows],
            targets=self.targets[rows],
            modalities={modality: column.take(rows) for modality, column in self.modalities.items()},
            kinds={name: values[rows] for name, values in self.kinds.items()},
            groups=None if self.groups is None else self.groups[rows],
        )


def _once(function: Hasher) -> Hasher:
    """Return a function that computes each result once."""
    known: dict[TextOrSource, str] = {}

    def look_up(source: TextOrSource) -> str:
        if source not in known:
            known[source] = function(source)
        return known[source]

    return look_up


def load_dataset(manifest: Manifest, root: Path) -> Dataset:
    """Read a dataset from the raw data under ``root``.

    Raises MissingDataError if files are missing (it says where to get them), DataError if they contradict the manifest.
    """
    reader = manifest.open_reader()
    missing = reader.missing(root)
    if missing:
        raise _missing(manifest, root, missing)
    samples = reader.read(root)
    _check_names(samples, manifest)
    check_ids(samples.ids, manifest.name)
    _check_once(samples.ids, manifest)
    notes = [*samples.notes, *_count_notes(samples, manifest)]
    for note in notes:
        logger.warning("%s: %s", manifest.name, note)
    classes, targets = encode_targets(samples, manifest)
    splits = apply_hash_splits(manifest.splits, samples)
    if _lacks_validation(manifest, samples, targets):
        splits = apply_hash_splits(DEFAULT_SPLITS, samples)
        note = f"held out {splits.count('val'):,} of {samples.splits.count('train'):,} train rows as val"
        notes.append(note)
        logger.info("%s: %s", manifest.name, note)
    return Dataset(
        manifest=manifest,
        classes=classes,
        ids=samples.ids,
        splits=np.array(splits),
        targets=targets,
        modalities=samples.modalities,
        notes=tuple(notes),
        name=manifest.name,
        kinds={name: np.array(values) for name, values in samples.kinds.items()},
        groups=None if samples.groups is None else np.array(samples.groups, np.dtypes.StringDType()),
    )


def _lacks_validation(manifest: Manifest, samples: Samples, targets: np.ndarray) -> bool:
    """Whether val has no usable row, and train has enough rows to hold some out."""
    if manifest.splits or manifest.task in PAIRS or samples.splits.count("train") < MIN_ROWS_TO_SPLIT:
        return False
    if manifest.task == "retrieval":
        return "val" not in samples.splits
    return not np.any(np.array(samples.splits)[is_labelled(targets)] == "val")


def _check_names(samples: Samples, manifest: Manifest) -> None:
    """Raise DataError for ids and other names that are too long, or hold a zero byte, which arrays of names lose."""
    labels = (label for rows in (samples.labels, *samples.task_labels.values()) for row in rows for label in row or ())
    for kind, names, most in (
        ("id", samples.ids, MAX_NAME),
        ("split", samples.splits, MAX_KIND),
        ("group", samples.groups or [], MAX_NAME),
        ("label", labels, MAX_NAME),
        *((kind, names, MAX_KIND) for kind, names in samples.kinds.items()),
    ):
        for name in names:
            if len(name) > most:
                raise DataError(
                    f"{manifest.name}: a {kind} has {len(name):,} characters, over the limit of {most:,}; it begins "
                    f"with {name[:40]!r}"
                )
            if "\0" in name:
                raise DataError(f"{manifest.name}: a {kind} may not hold a zero byte. Got {name[:40]!r} instead")


def check_ids(ids: list[str], name: str) -> None:
    """Raise DataError if there are no rows, or one has no id. ``name`` is that of the dataset or the table."""
    if not ids:
        raise DataError(f"{name}: the raw data has no rows")
    if "" in ids:
        raise DataError(f"{name}: row {ids.index('') + 1} has an empty id")


def _check_once(ids: list[str], manifest: Manifest) -> None:
    repeated = [f"{sample} ({n} times)" for sample, n in Counter(ids).most_common(3) if n > 1]
    if repeated:
        raise DataError(f"{manifest.name}: each id must occur once. Got {listed(repeated)} instead")


def _count_notes(samples: Samples, manifest: Manifest) -> list[str]:
    counts = Counter(samples.splits)
    if dict(counts) in manifest.other_rows:
        return []
    return [
        f"has {counts[split]:,} {split} rows, but the published dataset has {published:,}; going on with these"
        for split, published in manifest.rows.items()
        if counts[split] != published
    ]


def _missing(manifest: Manifest, root: Path, missing: list[str]) -> MissingDataError:
    """Return the error for missing raw data, with notes: where to get it, and how to lay it out."""
    error = MissingDataError(f"no raw data for {manifest.name} in {root}: missing {listed(missing[:3])}")
    if manifest.get:
        error.add_note(f"get it: {manifest.get.strip()}")
    if manifest.licence:
        error.add_note(f"licence: {manifest.licence.strip()}")
    if manifest.layout:
        error.add_note("expected layout:")
        for line in manifest.layout.strip().splitlines()[:30]:
            error.add_note(f"  {line}")
    error.add_note("put it there, or name its folder with --data-dir DIR")
    return error
