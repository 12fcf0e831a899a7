"""What in a store is nearest to a text or an image."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cachefuse.alignment.search import nearest
from cachefuse.alignment.space import OnRows, Space, silent
from cachefuse.data.column import as_text
from cachefuse.data.dataset import Dataset
from cachefuse.data.images import FileImage
from cachefuse.errors import ConfigError, DataError
from cachefuse.store.samples import StoredSamples
from cachefuse.store.store import FeatureStore


@dataclass(frozen=True)
class Match:
    """A row of a store near to a query: its sample, and which of the sample's items it is; ``score`` is the cosine."""

    score: float
    sample: int
    id: str
    item: int


@dataclass(frozen=True)
class Found:
    """What was looked for, in which modality, and the best matches, best first."""

    query: str
    modality: str
    matches: tuple[Match, ...]


def retrieve(
    space: Space,
    store: FeatureStore,
    *,
    text: str | None = None,
    image: Path | None = None,
    k: int = 10,
    modality: str | None = None,
    split: str | None = None,
    on_rows: OnRows = silent,
) -> Found:
    """Return the ``k`` images or texts of a store that are nearest to a text or an image file, every one compared.

    By default a text looks for images, an image for texts; ``modality`` says otherwise, and ``split`` where. Raises
    ConfigError unless one query is given, BadSampleError if it can't be used, RunError if the store lacks what the
    space is made of, DataError for a split or modality that has nothing.
    """
    if (text is None) == (image is None):
        raise ConfigError("give a --text or an --image to look for, one of them")
    own = "text" if image is None else "image"
    wanted = modality or space.counterpart(own)
    query = text if image is None else FileImage(image)
    vector = space.embed(own, [query])  # (1, W)
    features = space.stored(store, wanted, on_rows)
    owners, items = item_places(store, wanted)
    keep = store.present(wanted)
    if split is not None:
        if split not in store.splits:
            raise DataError(f"{store.dataset} has no split {split!r}; it has: {', '.join(np.unique(store.splits))}")
        keep = keep & (store.splits == split)
    if not keep.any():
        raise DataError(f"{store.dataset} has no {wanted} to look for{f' in split {split!r}' if split else ''}")
    hits = nearest(features.rows(), vector, k, unit=space.unit, keep=keep[owners], on_rows=on_rows)
    ids = store.ids
    matches = [
        Match(float(score), int(owners[row]), str(ids[owners[row]]), int(items[row]))
        for row, score in zip(hits.rows[0].tolist(), hits.scores[0].tolist(), strict=True)
    ]
    return Found(str(image) if text is None else text, wanted, tuple(matches))


def item_places(samples: StoredSamples, modality: str) -> tuple[np.ndarray, np.ndarray]:
    """Return the sample of each row of a modality's features (n,), and its place among the sample's items (n,)."""
    offsets = samples.items(modality)
    if offsets is None:
        return np.arange(len(samples)), np.zeros(len(samples), np.int64)
    owners = np.repeat(np.arange(len(samples)), np.diff(offsets))
    return owners, np.arange(len(owners)) - offsets[owners]


def matched_texts(found: Found, dataset: Dataset) -> list[str]:
    """Return the text to show with each match: the one that was found, or the first of a found image's sample.

    It is empty where the raw data has none, or no such sample.
    """
    rows = {sample: row for row, sample in enumerate(dataset.ids)}
    shown = []
    for match in found.matches:
        own = dataset.sources("text" if found.modality == "image" else found.modality, rows.get(match.id))
        place = match.item if found.modality != "image" and match.item < len(own) else 0
        shown.append(as_text(own[place]) if own else "")
    return shown
