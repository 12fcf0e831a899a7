"""The gallery of an alignment's report: what some queries find, those found at once and those that go most wrong."""

from dataclasses import dataclass

import numpy as np

from cachefuse.alignment.data import PairData, pair_data
from cachefuse.alignment.loop import embed_samples
from cachefuse.alignment.ranks import Embedded, best_ranks
from cachefuse.alignment.run import Alignment, shown_split
from cachefuse.alignment.train import evaluated_splits, run_features
from cachefuse.data.column import as_text
from cachefuse.data.dataset import Dataset
from cachefuse.device import resolve_device
from cachefuse.report.gallery import PICTURED, picture_of
from cachefuse.runs.run import split_digest
from cachefuse.store.store import FeatureStore

N_EACH = 4  # queries that are found first, and those with the worst ranks
N_NEAREST = 5


@dataclass(frozen=True)
class Item:
    """A picture, a text or the name of another source of a sample, or why it can't be shown."""

    id: str
    text: str = ""
    picture: str = ""
    missing: str = ""


@dataclass(frozen=True)
class Neighbour:
    """An item that a query was compared with: its place by cosine, and whether it is of the query's sample."""

    item: Item
    rank: int
    cosine: float
    right: bool


@dataclass(frozen=True)
class Query:
    """A query and the nearest of ``n_gallery`` items, then the first that is right, where it is farther.

    ``rank`` is that of the first right one.
    """

    item: Item
    rank: int
    n_gallery: int
    neighbours: list[Neighbour]


@dataclass(frozen=True)
class Examples:
    """Queries of a split; ``modality`` is that of what they look for.

    ``changed`` says that the store's samples or splits are not those that the alignment was trained on.
    """

    split: str
    modality: str
    queries: list[Query]
    changed: bool


def examples(run: Alignment, store: FeatureStore, dataset: Dataset, device: str = "auto") -> Examples | None:
    """Return queries with what is nearest to them: texts look for images, the first of two like sides for the second.

    Returns None if nothing was held out. Raises as ``evaluate_alignment`` does.
    """
    run.model.to(resolve_device(device))
    data = pair_data(store, run_features(run, store), run.config.views)
    held_out = evaluated_splits(data)
    split = shown_split([name for name in run.results if name in held_out] or held_out)
    if split is None:
        return None
    samples = data.of(split)
    asks = int(run.sides[1].modality == "text" and not run.same_texts)
    both = embed_samples(run.model, data, samples)
    queries, gallery = both[asks], both[1 - asks]
    shelf = _Shelf(data, samples, store.ids, dataset)
    found = [_query(shelf, queries, gallery, q, asks) for q in chosen(best_ranks(queries, gallery), queries.owners)]
    changed = bool(run.split_digest) and run.split_digest != split_digest(store)
    return Examples(split, run.sides[1 - asks].modality, found, changed)


def chosen(ranks: np.ndarray, owners: np.ndarray) -> list[int]:
    """Return queries found first, an even spread of them, then those with the worst ranks; of a sample one each."""
    first = _one_each(np.flatnonzero(ranks == 1), owners)
    spread = first[np.linspace(0, len(first) - 1, min(N_EACH, len(first))).round().astype(int)]
    order = np.argsort(-ranks, kind="stable")
    worst = _one_each(order[ranks[order] > 1], owners)[:N_EACH]
    return [*spread.tolist(), *worst.tolist()]


def _one_each(queries: np.ndarray, owners: np.ndarray) -> np.ndarray:
    """Return the first of the queries (q,) of each sample, in their order."""
    return queries[np.sort(np.unique(owners[queries], return_index=True)[1])]


def _query(shelf: "_Shelf", queries: Embedded, gallery: Embedded, q: int, asks: int) -> Query:
    own = gallery.owners == queries.owners[q]
    cosines = (gallery.vectors @ queries.vectors[q]).numpy()
    if queries.items is not None and gallery.items is not None and own.sum() > 1:
        cosines[gallery.items == queries.items[q]] = -np.inf  # no answer to itself
    order = np.lexsort((own, -cosines))  # of equal ones the wrong first, as in the ranks
    n_gallery = int(np.isfinite(cosines).sum())
    rank = 1 + int(np.flatnonzero(own[order])[0])
    near = [*range(1, min(N_NEAREST, n_gallery) + 1), *([rank] if rank > N_NEAREST else [])]
    neighbours = []
    for place in near:
        i = int(order[place - 1])
        neighbours.append(Neighbour(shelf.item(1 - asks, i), place, float(cosines[i]), bool(own[i])))
    return Query(shelf.item(asks, q), rank, n_gallery, neighbours)


class _Shelf:
    """The raw items of some samples (n,) of the pairs, found by the samples' ids, whatever their order there."""

    def __init__(self, data: PairData, samples: np.ndarray, ids: np.ndarray, dataset: Dataset):
        self._data, self._samples, self._ids, self._dataset = data, samples, ids, dataset
        self._items = [side.items(samples) for side in data.sides]
        self._rows = {sample: row for row, sample in enumerate(dataset.ids)}

    def item(self, side: int, which: int) -> Item:
        """Return one of the items of a side as it looks or reads."""
        items, owners = self._items[side]
        about, sample = self._data.sides[side], self._samples[owners[which]]
        name = str(self._ids[sample])
        row = self._rows.get(name)
        if about.modality == PICTURED:
            picture, missing = picture_of(self._dataset, row)
            return Item(name, picture=picture, missing=missing or ("" if picture else "no image"))
        sources = self._dataset.sources(about.modality, row)
        place = int(items[which] - about.offsets[sample])
        if place >= len(sources):
            return Item(name, missing="not in the raw data")
        return Item(name, as_text(sources[place]))
