"""A dataset as the pipeline sees it: ids, splits, images, texts and targets, in manifest order."""

import logging
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np

from cachefuse.data.digests import hash_parts
from cachefuse.data.manifest import PAIRS, HashSplit, Manifest
from cachefuse.data.readers.base import ImageSource, Samples
from cachefuse.data.splits import apply_hash_splits
from cachefuse.data.targets import encode_targets, is_labelled
from cachefuse.errors import DataError, MissingDataError
from cachefuse.threads import n_cores

logger = logging.getLogger(__name__)

# Held out where neither the data nor the manifest gives rows to validate on.
DEFAULT_SPLITS = {"val": HashSplit.model_validate({"from": "train", "fraction": 0.1})}
MIN_ROWS_TO_SPLIT = 20
BATCH = 32  # rows hashed by a thread at a time: one by one, handing small images over takes longer than hashing them
WINDOW = 4096  # rows that wait for threads at a time, however many there are in all


@dataclass(frozen=True)
class Dataset:
    """N samples. Missing modalities are None; ``images[i]`` None and ``texts[i]`` () where one sample lacks them.

    targets: (N, C) int8 of 0 and 1 for multi-label, (N,) int32 class indices for multi-class and paraphrase; -1 where
    unlabelled. (N,) float32 scores for similarity, NaN where unlabelled. Of several tasks (N, C) int8 of 0 and 1, and
    -1 in all columns of a task whose label the row lacks; classes are called "color=red".

    A sample of similarity or paraphrase is a pair: ``texts[i]`` are its two sentences, also where one is empty. One of
    visual question answering is a question: (N, 10) int32 classes of the answers that people gave, -2 for one that is
    no class, and of those ``shares_images`` that are about one image have the features of one.
    """

    manifest: Manifest
    classes: tuple[str, ...]
    ids: list[str]
    splits: np.ndarray
    targets: np.ndarray
    images: list[ImageSource | None] | None
    texts: list[tuple[str, ...]] | None
    notes: tuple[str, ...] = ()
    name: str = ""
    shares_images: bool = False

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def modalities(self) -> tuple[str, ...]:
        """The modalities that this copy of the data has."""
        return tuple(m for m, column in (("image", self.images), ("text", self.texts)) if column is not None)

    @cached_property
    def image_rows(self) -> np.ndarray | None:
        """(N,) the number of each sample's image, where samples share them, else None: equal ones have one number.

        They are numbered as they first occur, so that samples to come change no number; a sample without an image
        shares the number of the others without.
        """
        if not self.shares_images or self.images is None:
            return None
        numbers: dict[ImageSource | None, int] = {}
        return np.array([numbers.setdefault(image, len(numbers)) for image in self.images], np.int64)

    def fingerprints(self) -> list[str]:
        """Return N fingerprints of 16 characters, over each sample's texts and its image's stamp; reads no image.

        A sample whose stamp is what it was has the digest that it had.
        """
        return self._fingerprints(range(len(self)), self._once(lambda image: image.fingerprint()))

    def digests(
        self,
        rows: Sequence[int] | None = None,
        on_progress: Callable[[int, int], None] = lambda done, total: None,
    ) -> list[str]:
        """Return 16 characters a row, all rows by default, over the sample's texts and its image's content.

        Images are read and hashed in threads. ``on_progress`` gets the rows done and their total every so often.
        """
        rows = range(len(self)) if rows is None else rows
        digests: list[str] = []
        of_image = self._once(lambda image: image.digest())
        with ThreadPoolExecutor(n_cores(), thread_name_prefix="digest") as pool:
            run = map if self.images is None else pool.map
            for start in range(0, len(rows), WINDOW):
                window = rows[start : start + WINDOW]
                batches = [window[i : i + BATCH] for i in range(0, len(window), BATCH)]
                for hashed in run(lambda batch: self._fingerprints(batch, of_image), batches):
                    digests += hashed
                    on_progress(len(digests), len(rows))
        return digests

    def _once(self, of_image: Callable[[ImageSource], str]) -> Callable[[ImageSource], str]:
        """Return a function of an image that, where samples share images, is computed once for each."""
        known: dict[ImageSource, str] = {}

        def look_up(image: ImageSource) -> str:
            if image not in known:
                known[image] = of_image(image)
            return known[image]

        return look_up if self.shares_images else of_image

    def _fingerprints(self, rows: Sequence[int], of_image: Callable[[ImageSource], str]) -> list[str]:
        fingerprints = []
        for row in rows:
            texts = self.texts[row] if self.texts is not None else ()
            image = self.images[row] if self.images is not None else None
            # The image comes last and is never empty where there is one, so no text can stand for it.
            fingerprints.append(hash_parts(*texts, f"image:{of_image(image)}" if image is not None else ""))
        return fingerprints

    def limit(self, n: int) -> "Dataset":
        """Return about ``n`` samples, the first ones of each split in its proportion, under a name of its own.

        A limited dataset has its own store, so that a trial never mixes with the whole.
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
            name=f"{self.name}-limit{n}",
            ids=[self.ids[i] for i in rows],
            splits=self.splits[rows],
            targets=self.targets[rows],
            images=[self.images[i] for i in rows] if self.images is not None else None,
            texts=[self.texts[i] for i in rows] if self.texts is not None else None,
        )


def load_dataset(manifest: Manifest, root: Path) -> Dataset:
    """Read a dataset from the raw data under ``root``.

    Raises MissingDataError if files are absent (saying where to get them), DataError if they contradict the manifest.
    """
    reader = manifest.open_reader()
    missing = reader.missing(root)
    if missing:
        raise MissingDataError(_how_to_get(manifest, root, missing))
    samples = reader.read(root)
    _check_ids(samples, manifest)
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
        images=samples.images,
        texts=samples.texts,
        notes=tuple(notes),
        name=manifest.name,
        shares_images=samples.shares_images,
    )


def _lacks_validation(manifest: Manifest, samples: Samples, targets: np.ndarray) -> bool:
    """Return whether no row to validate on is in val, and those to train on are enough to hold some out."""
    if manifest.splits or manifest.task in PAIRS or samples.splits.count("train") < MIN_ROWS_TO_SPLIT:
        return False
    if manifest.task == "retrieval":
        return "val" not in samples.splits
    return not np.any(np.array(samples.splits)[is_labelled(targets)] == "val")


def _check_ids(samples: Samples, manifest: Manifest) -> None:
    if not samples.ids:
        raise DataError(f"{manifest.name}: the raw data has no rows")
    if "" in samples.ids:
        raise DataError(f"{manifest.name}: row {samples.ids.index('') + 1} has an empty id")
    repeated = [f"{sample} ({n} times)" for sample, n in Counter(samples.ids).most_common(3) if n > 1]
    if repeated:
        raise DataError(f"{manifest.name}: each id must occur once, but found {', '.join(repeated)}")


def _count_notes(samples: Samples, manifest: Manifest) -> list[str]:
    counts = Counter(samples.splits)
    if dict(counts) in manifest.other_rows:
        return []
    return [
        f"has {counts[split]:,} {split} rows where the published dataset has {published:,}; going on with these"
        for split, published in manifest.rows.items()
        if counts[split] != published
    ]


def _how_to_get(manifest: Manifest, root: Path, missing: list[str]) -> str:
    lines = [f"no raw data for {manifest.name} in {root}: missing {', '.join(missing[:3])}"]
    if manifest.get:
        lines.append(f"get it: {manifest.get.strip()}")
    if manifest.licence:
        lines.append(f"licence: {manifest.licence.strip()}")
    if manifest.layout:
        lines.append("expected layout:\n" + "\n".join(f"  {line}" for line in manifest.layout.strip().splitlines()))
    lines.append("put it there, or say where it is with --data-dir DIR")
    return "\n".join(lines)
