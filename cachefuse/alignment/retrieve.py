"""Search of a store for the samples nearest to a text or an image."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cachefuse.alignment.search import nearest
from cachefuse.alignment.space import OnRows, Space, silent
from cachefuse.data.column import as_text
from cachefuse.data.dataset import Dataset
from cachefuse.data.images import FileImage
from cachefuse.errors import ConfigError, DataError
from cachefuse.printable import listed
from cachefuse.store.samples import StoredSamples
from cachefuse.store.store import FeatureStore


@dataclass(frozen=True)
class Match:
    """A feature row near to a query: its cosine ``score``, its sample, and its index among the sample's items."""

    score: float
    sample: int
    id: str
    item: int


@dataclass(frozen=True)
class QueryResult:
    """A query, the modality that was searched, and the matches, best first."""

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
) -> QueryResult:
    """Return the ``k`` images or texts of a store that are nearest to a text or an image file, by exact search.

    By default a text searches images, and an image searches texts; ``modality`` selects another, and ``split`` limits
    the search. Raises ConfigError unless exactly one query is given, BadSampleError if it is unusable, RunError if the
    store lacks the features that the space needs, DataError for an unknown split, or if there is nothing to search.
    """
    if (text is None) == (image is None):
        raise ConfigError("give one query: either --text or --image")
    query_modality = "text" if image is None else "image"
    wanted = modality or space.counterpart(query_modality)
    query = text if image is None else FileImage(image)
    vector = space.embed(query_modality, [query])  # (1, W)
    features = space.stored(store, wanted, on_rows)
    owners, items = item_places(store, wanted)
    keep = store.present(wanted)
    if split is not None:
        if split not in store.splits:
            raise DataError(f"{store.dataset} has no split {split!r}; it has: {listed(np.unique(store.splits))}")
        keep = keep & (store.splits == split)
    if not keep.any():
        raise DataError(f"{store.dataset} has no {wanted} to search{f' in split {split!r}' if split else ''}")
    hits = nearest(features.rows(), vector, k, unit=space.unit, keep=keep[owners], on_rows=on_rows)
    ids = store.ids
    matches = [
        Match(float(score), int(owners[row]), str(ids[owners[row]]), int(items[row]))
        for row, score in zip(hits.rows[0].tolist(), hits.scores[0].tolist(), strict=True)
    ]
    return QueryResult(str(image) if text is None else text, wanted, tuple(matches))


def item_places(samples: StoredSamples, modality: str) -> tuple[np.ndarray, np.ndarray]:
    """Return the sample of each feature row of a modality (n,), and the row's index among the sample's items (n,)."""
    offsets = samples.items(modality)
    if offsets is None:
        return np.arange(len(samples)), np.zeros(len(samples), np.int64)
    owners = np.repeat(np.arange(len(samples)), np.diff(offsets))
    return owners, np.arange(len(owners)) - offsets[owners]


def matched_texts(result: QueryResult, dataset: Dataset) -> list[str]:
    """Return the text to show with each match: the matched text, or the first text of a matched image's sample.

    A text is empty if the raw data lacks the sample or its texts.
    """
    rows = {sample: row for row, sample in enumerate(dataset.ids)}
    shown = []
    for match in result.matches:
        sources = dataset.sources("text" if result.modality == "image" else result.modality, rows.get(match.id))
        index = match.item if result.modality != "image" and match.item < len(sources) else 0
        shown.append(as_text(sources[index]) if sources else "")
    return shown
