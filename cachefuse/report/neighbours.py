"""The gallery of an alignment's report: queries with rank 1 and with the worst ranks, and their nearest items."""

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

N_EACH = 4  # queries with rank 1, and queries with the worst ranks
N_NEAREST = 5


@dataclass(frozen=True)
class Item:
    """A picture, a text or the name of another source of a sample, or the reason why it is ``missing``."""

    id: str
    text: str = ""
    picture: str = ""
    missing: str = ""


@dataclass(frozen=True)
class Neighbour:
    """An item near to a query: its rank by cosine, and whether it is ``right``: of the query's sample."""

    item: Item
    rank: int
    cosine: float
    right: bool


@dataclass(frozen=True)
class Query:
    """A query and the nearest of ``n_gallery`` items, then the first right item if it is farther.

    ``rank`` is the rank of the first right item.
    """

    item: Item
    rank: int
    n_gallery: int
    neighbours: list[Neighbour]


@dataclass(frozen=True)
class Examples:
    """Queries of a split; ``modality`` is the searched one.

    ``changed`` means that the store's samples or splits are not those that the alignment was trained on.
    """

    split: str
    modality: str
    queries: list[Query]
    changed: bool


def examples(run: Alignment, store: FeatureStore, dataset: Dataset, device: str = "auto") -> Examples | None:
    """Return queries with their nearest items: texts search images, or the first of two text encoders the second.

    Returns None if all samples were trained on. Raises as ``evaluate_alignment`` does.
    """
    run.model.to(resolve_device(device))
    data = pair_data(store, run_features(run, store), run.config.views)
    held_out = evaluated_splits(data)
    split = shown_split([name for name in run.results if name in held_out] or held_out)
    if split is None:
        return None
    samples = data.of(split)
    side = int(run.sides[1].modality == "text" and not run.same_texts)
    both = embed_samples(run.model, data, samples)
    queries, gallery = both[side], both[1 - side]
    raw = _RawItems(data, samples, store.ids, dataset)
    numbers = choose_queries(best_ranks(queries, gallery), queries.owners)
    shown = [_query(raw, queries, gallery, q, side) for q in numbers]
    changed = bool(run.split_digest) and run.split_digest != split_digest(store)
    return Examples(split, run.sides[1 - side].modality, shown, changed)


def choose_queries(ranks: np.ndarray, owners: np.ndarray) -> list[int]:
    """Return an even selection of the queries with rank 1, then those with the worst ranks; one per sample of each."""
    first = _one_each(np.flatnonzero(ranks == 1), owners)
    spread = first[np.linspace(0, len(first) - 1, min(N_EACH, len(first))).round().astype(int)]
    order = np.argsort(-ranks, kind="stable")
    worst = _one_each(order[ranks[order] > 1], owners)[:N_EACH]
    return [*spread.tolist(), *worst.tolist()]


def _one_each(queries: np.ndarray, owners: np.ndarray) -> np.ndarray:
    """Return the first of the queries (q,) of each sample, in their order."""
    return queries[np.sort(np.unique(owners[queries], return_index=True)[1])]


def _query(raw: "_RawItems", queries: Embedded, gallery: Embedded, q: int, side: int) -> Query:
    right = gallery.owners == queries.owners[q]
    cosines = (gallery.vectors @ queries.vectors[q]).numpy()
    if queries.items is not None and gallery.items is not None and right.sum() > 1:
        cosines[gallery.items == queries.items[q]] = -np.inf  # an item is no answer to itself
    order = np.lexsort((right, -cosines))  # of equal cosines the wrong item first, as in best_ranks
    n_gallery = int(np.isfinite(cosines).sum())
    first_right = 1 + int(np.flatnonzero(right[order])[0])
    ranks = [*range(1, min(N_NEAREST, n_gallery) + 1), *([first_right] if first_right > N_NEAREST else [])]
    neighbours = []
    for rank in ranks:
        i = int(order[rank - 1])
        neighbours.append(Neighbour(raw.item(1 - side, i), rank, float(cosines[i]), bool(right[i])))
    return Query(raw.item(side, q), first_right, n_gallery, neighbours)


class _RawItems:
    """The raw items of some samples (n,) of the pairs; the dataset's samples are looked up by id, in any order."""

    def __init__(self, data: PairData, samples: np.ndarray, ids: np.ndarray, dataset: Dataset):
        self._data, self._samples, self._ids, self._dataset = data, samples, ids, dataset
        self._items = [side.items(samples) for side in data.sides]
        self._rows = {sample: row for row, sample in enumerate(dataset.ids)}

    def item(self, side: int, which: int) -> Item:
        """Return item number ``which`` of a side for the page."""
        items, owners = self._items[side]
        about, sample = self._data.sides[side], self._samples[owners[which]]
        name = str(self._ids[sample])
        row = self._rows.get(name)
        if about.modality == PICTURED:
            picture, missing = picture_of(self._dataset, row)
            return Item(name, picture=picture, missing=missing or ("" if picture else "no image"))
        sources = self._dataset.sources(about.modality, row)
        index = int(items[which] - about.offsets[sample])
        if index >= len(sources):
            return Item(name, missing="not in the raw data")
        return Item(name, as_text(sources[index]))
