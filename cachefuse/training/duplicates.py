"""Duplicates: rows with the same content, by digest, and with nearly the same, by the cosine of stored features."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from cachefuse.csv_writer import csv_for_people
from cachefuse.data.folds import join_groups, link_groups
from cachefuse.data.manifest import VQA
from cachefuse.data.splits import ordered_splits
from cachefuse.data.targets import UNLABELLED, is_labelled
from cachefuse.device import resolve_device
from cachefuse.errors import ConfigError
from cachefuse.nn.losses import TINY_NORM
from cachefuse.output import write_output
from cachefuse.store.features import Features
from cachefuse.store.samples import StoredSamples
from cachefuse.store.store import FeatureStore
from cachefuse.threads import idle_threads
from cachefuse.training.config import TOGETHER, TrainConfig
from cachefuse.training.data import TrainingData
from cachefuse.training.selection import select_features

NEAR = 0.95  # of centred features: different images have at most 0.92, see cachefuse/data/README.md
PIECE = 4096  # rows that are compared with as many others at a time
ROUNDING = 1e-6  # of a cosine in float32
MAX_PAIRS = 10**6  # kept to be listed; all are counted
COMPARED = 1 << 18  # pairs whose labels are compared at a time

Progress = Callable[[int, int], None]
Pairs = tuple[np.ndarray, np.ndarray]  # the first and the second row of P pairs, (P,) int64 each


@dataclass(frozen=True)
class Copies:
    """Copies of one kind: the ``rows`` that have one, the ``pairs`` of rows, and the pairs that differ in labels."""

    rows: int
    pairs: int
    other_labels: int


@dataclass(frozen=True)
class SplitCopies:
    """The rows of ``split``, ``n_rows`` in all, that have copies in the split ``among``, which may be the same."""

    split: str
    among: str
    n_rows: int
    exact: Copies
    near: Copies


@dataclass(frozen=True)
class Duplicates:
    """The duplicates of a store: counts by pair of splits, and the pairs, at most a million of each kind.

    ``encoders`` by modality tell which features were compared. In near duplicates their cosine, after the mean over all
    rows is subtracted, is at least ``limit``. A pair that is exact is not counted as near. ``exact`` and ``near`` are
    row numbers (P, 2), each pair once, with ``cosines`` (P,) of the near ones.
    """

    dataset: str
    n_rows: int
    limit: float
    encoders: Mapping[str, str]
    splits: tuple[SplitCopies, ...]
    exact: np.ndarray = field(compare=False, repr=False)
    near: np.ndarray = field(compare=False, repr=False)
    cosines: np.ndarray = field(compare=False, repr=False)


@idle_threads()
def find_duplicates(
    store: FeatureStore,
    *,
    encoders: Sequence[str] = (),
    limit: float = NEAR,
    device: str = "auto",
    on_progress: Progress = lambda done, total: None,
) -> Duplicates:
    """Find rows of a store with the same content, and with nearly the same.

    Rows are near if, in every modality that both have, the cosine of their pooled features is at least ``limit`` after
    the mean over all rows is subtracted. The features are those of the first of the ``encoders``, by default of the
    store, that has the modality. All rows are compared, in blocks of constant memory. ``on_progress`` gets the number
    of rows done and their total. Raises ConfigError for a limit that is not above 0 and at most 1, and CacheError or
    ConfigError for features as ``train_head`` does.
    """
    features = first_features(select_features(store, encoders))
    exact, near = _Tally(store), _Tally(store)
    content = store.content
    for pairs in equal_pairs(content):
        exact.add(pairs)
    for (first, second), cosines in near_pairs(store, features, limit, device, on_progress):
        other = (content[first] != content[second]) | (content[first] < 0)
        near.add((first[other], second[other]), cosines[other])
    names = exact.names
    return Duplicates(
        dataset=store.dataset,
        n_rows=len(store),
        limit=limit,
        encoders={modality: one.encoder for modality, one in features.items()},
        splits=tuple(
            SplitCopies(split, among, exact.n_rows[s], exact.copies(s, a), near.copies(s, a))
            for s, split in enumerate(names)
            for a, among in enumerate(names[: s + 1])
        ),
        exact=exact.kept()[0],
        near=near.kept()[0],
        cosines=near.kept()[1],
    )


def write_pairs(found: Duplicates, store: FeatureStore, path: Path) -> int:
    """Write the pairs to a csv file: id, split, copy_of, copy_of_split, kind, cosine, other_labels.

    Return the number of pairs that are counted, but too many to be kept.
    """
    rows: list[Sequence[object]] = [("id", "split", "copy_of", "copy_of_split", "kind", "cosine", "other_labels")]
    labels = _Labels(store)
    for kind, pairs, cosines in (
        ("exact", found.exact, np.ones(len(found.exact))),
        ("near", found.near, found.cosines),
    ):
        differ = labels.differ((pairs[:, 0], pairs[:, 1]))
        for (first, second), cosine, other in zip(pairs.tolist(), cosines.tolist(), differ.tolist(), strict=True):
            names = store.ids[second], store.splits[second], store.ids[first], store.splits[first]
            rows.append((*map(str, names), kind, f"{cosine:.4f}", "yes" if other else "no"))
    write_output(path, csv_for_people(rows))
    return sum(line.exact.pairs + line.near.pairs for line in found.splits) - len(rows) + 1


def first_features(chosen: Mapping[str, Sequence[Features]]) -> dict[str, Features]:
    """Return the first features of each modality of which a sample has one. Raises ConfigError if there is none."""
    features = {m: group[0] for m, group in chosen.items() if not group[0].samples.has_several(m)}
    if not features:
        raise ConfigError(f"samples have several {' and '.join(chosen)}s each: there is nothing to compare by features")
    return features


def keep_together(data: TrainingData, config: TrainConfig) -> TrainingData:
    """Return the same data, with exact and near duplicates in one group if ``config.duplicates`` is "together".

    The features are the first ones that the data has of each modality. Raises as ``find_duplicates`` does.
    """
    if config.duplicates != TOGETHER:
        return data
    features = first_features(data.stored)
    samples = next(iter(features.values())).samples
    alone = len(samples) + np.arange(len(samples))
    partitions = [np.where(samples.content < 0, alone, samples.content)]
    groups = join_groups([*partitions, data.groups] if data.groups is not None else partitions)
    with idle_threads():
        for pairs, _ in near_pairs(samples, features, device=str(data.device)):
            groups = link_groups(groups, *pairs)
    return replace(data, groups=groups)


def equal_pairs(codes: np.ndarray) -> Iterator[Pairs]:
    """Yield all pairs of rows with equal codes (N,), each once and its first row first; not of those below 0."""
    order = np.argsort(codes, kind="stable")
    order = order[codes[order] >= 0]
    places, step = np.arange(len(order)), 1
    while len(places):
        places = places[: np.searchsorted(places, len(order) - step)]
        places = places[codes[order[places]] == codes[order[places + step]]]
        yield order[places], order[places + step]
        step += 1


def near_pairs(
    samples: StoredSamples,
    features: Mapping[str, Features],
    limit: float = NEAR,
    device: str = "auto",
    on_progress: Progress = lambda done, total: None,
) -> Iterator[tuple[Pairs, np.ndarray]]:
    """Yield pairs of rows that are near by their features, each once, with the least cosine (P,) of their modalities.

    Raises as ``find_duplicates`` does.
    """
    if not 0 < limit <= 1:
        raise ConfigError(f"the cosine of near duplicates must be above 0 and at most 1. Got {limit:g} instead")
    readers = [_Reader(samples, one, resolve_device(device)) for one in features.values()]
    n, done = len(samples), 0
    starts = range(0, n, PIECE)
    total = len(starts) * (len(starts) + 1) // 2
    for start in starts:
        first = [reader.read(start) for reader in readers]
        for other in starts[start // PIECE :]:
            second = first if other == start else [reader.read(other) for reader in readers]
            rows, columns, cosines = _near(first, second, limit - ROUNDING)
            rows, columns = rows + start, columns + other
            once = rows < columns
            yield (rows[once], columns[once]), cosines[once]
            done += 1
            on_progress(n * done // total, n)


class _Reader:
    """Reads centred features of one modality, each of length 1."""

    def __init__(self, samples: StoredSamples, features: Features, device: str) -> None:
        self._rows, self._device = features.rows("pooled"), device
        self._present = samples.present(features.modality)
        self._numbers = samples.feature_rows(features.modality)
        total, used = torch.zeros(self._rows.shape[1], dtype=torch.float64), samples.present_rows(features.modality)
        for start, x in self._rows.in_order(PIECE):
            total += x[torch.from_numpy(used[start : start + len(x)])].double().sum(0)
        self._mean = (total / max(1, int(used.sum()))).float()

    def read(self, start: int) -> tuple[Tensor, Tensor]:
        """Return unit vectors (B, D) of the samples from ``start`` on, and which have the modality, (B,) bool."""
        numbers = torch.from_numpy(self._numbers[start : start + PIECE])
        x = (self._rows.index_select(0, numbers).float() - self._mean).to(self._device)
        x = x / x.norm(dim=1, keepdim=True).clamp(min=TINY_NORM)
        return x, torch.from_numpy(self._present[start : start + PIECE]).to(self._device)


def _near(
    first: Sequence[tuple[Tensor, Tensor]], second: Sequence[tuple[Tensor, Tensor]], limit: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the pairs of rows of two blocks that are near in all their modalities, with their least cosines."""
    rows, columns = (torch.arange(len(block[0][1]), device=block[0][1].device) for block in (first, second))
    least = torch.tensor(torch.inf, device=rows.device)
    for (x, has_x), (y, has_y) in zip(first, second, strict=True):
        if not len(rows):
            break
        cosines, has_x, has_y = x[rows] @ y[columns].T, has_x[rows], has_y[columns]
        if not (has_x.all() and has_y.all()):
            cosines.masked_fill_(~(has_x[:, None] & has_y), torch.inf)
        least = torch.minimum(least, cosines) if least.ndim else cosines
        left, left_columns = least.amax(1) >= limit, least.amax(0) >= limit  # the rest is not compared further
        rows, columns, least = rows[left], columns[left_columns], least[left][:, left_columns]
    at = ((least >= limit) & (least < torch.inf)).nonzero(as_tuple=True)
    found = rows[at[0]], columns[at[1]], least[at].clamp(max=1)
    return found[0].cpu().numpy(), found[1].cpu().numpy(), found[2].cpu().numpy()


class _Labels:
    """The labels of a store's rows, to compare."""

    def __init__(self, store: FeatureStore) -> None:
        targets = store.targets if store.targets.ndim == 2 else store.targets[:, None]
        several = bool(store.manifest.tasks)  # then a row may lack the labels of some tasks
        self._known = (targets != UNLABELLED) if several else is_labelled(store.targets)[:, None]
        self._targets = np.sort(targets, axis=1) if store.manifest.task == VQA else targets

    def differ(self, pairs: Pairs) -> np.ndarray:
        """Return which pairs have other labels, (P,) bool; what one of the rows lacks is no other label."""
        found = np.zeros(len(pairs[0]), bool)
        for start in range(0, len(found), COMPARED):
            first, second = (rows[start : start + COMPARED] for rows in pairs)
            known = self._known[first] & self._known[second]
            found[start : start + COMPARED] = (known & (self._targets[first] != self._targets[second])).any(axis=1)
        return found


class _Tally:
    """Counts pairs of rows by their splits, and keeps the first ``MAX_PAIRS``."""

    def __init__(self, store: FeatureStore) -> None:
        self.names = ordered_splits(map(str, store.splits))
        numbers = {name: i for i, name in enumerate(self.names)}
        self._split = np.array([numbers[name] for name in store.splits.tolist()])
        self._labels = _Labels(store)
        self.n_rows = np.bincount(self._split, minlength=len(self.names)).tolist()
        self._pairs, self._other = (np.zeros((len(self.names),) * 2, np.int64) for _ in range(2))
        self._has = np.zeros((len(store), len(self.names)), bool)  # whether a row has a copy in a split
        self._kept: list[tuple[np.ndarray, np.ndarray]] = []

    def add(self, pairs: Pairs, cosines: np.ndarray | None = None) -> None:
        """Count pairs (P,) of rows; none may come twice."""
        first, second = (self._split[rows] for rows in pairs)
        self._has[pairs[0], second] = True
        self._has[pairs[1], first] = True
        place, size = np.maximum(first, second) * len(self.names) + np.minimum(first, second), self._pairs.size
        self._pairs += np.bincount(place, minlength=size).reshape(self._pairs.shape)
        other = place[self._labels.differ(pairs)]
        self._other += np.bincount(other, minlength=size).reshape(self._other.shape)
        left = MAX_PAIRS - sum(len(kept) for kept, _ in self._kept)
        if left > 0 and len(place):
            given = np.ones(len(place), np.float32) if cosines is None else cosines
            self._kept.append((np.stack(pairs, axis=1)[:left], given[:left]))

    def copies(self, split: int, among: int) -> Copies:
        """Return the copies that rows of a split have among those of another one, not after it."""
        rows = self._has[self._split == split, among].sum()
        return Copies(int(rows), int(self._pairs[split, among]), int(self._other[split, among]))

    def kept(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the kept pairs (P, 2) by their rows, and their cosines (P,)."""
        pairs = np.concatenate([np.empty((0, 2), np.int64), *(kept for kept, _ in self._kept)])
        cosines = np.concatenate([np.empty(0, np.float32), *(kept for _, kept in self._kept)])
        order = np.lexsort((pairs[:, 1], pairs[:, 0]))
        return pairs[order], cosines[order]
