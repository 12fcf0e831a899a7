"""How alike two sentences are: cosines of their embeddings, judged by people's scores or by paraphrase labels."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from cachefuse.alignment.run import Alignment
from cachefuse.alignment.space import OnRows, silent
from cachefuse.alignment.tower import aligned_features
from cachefuse.data.manifest import PAIRS
from cachefuse.data.splits import ordered_splits
from cachefuse.data.targets import is_labelled
from cachefuse.errors import ConfigError, DataError, RunError
from cachefuse.store.features import Features
from cachefuse.store.store import FeatureStore
from cachefuse.training.data import TRAIN, VAL
from cachefuse.training.selection import select_features

TOLERANCES = np.linspace(0.1, 1, 100)  # CBMF, figure 3: "100 values spanning from 0.1 to 1"
CHUNK = 4096  # pairs at a time
MOST_UNITS = 20  # of a scale that is looked at by unit


@dataclass(frozen=True)
class Scored:
    """Pairs with people's scores: correlations with the cosine, and the tolerance curve.

    ``tolerance`` is the share of pairs whose cosine, from 0 to 1 laid over the dataset's scale, is within e of the
    score, for each e of ``TOLERANCES``: of all pairs, and of those in each unit of a scale of up to 20
    ("0-1").
    """

    n_pairs: int
    pearson: float
    spearman: float
    tolerance: Mapping[str, tuple[float, ...]]


@dataclass(frozen=True)
class Paraphrases:
    """Pairs that are paraphrases or not: called so from a cosine of ``threshold`` on, which was chosen elsewhere.

    ``by_class`` has precision, recall and F1 of either class; ``chosen_on`` is the split that the threshold is from.
    """

    n_pairs: int
    accuracy: float
    average_precision: float
    threshold: float
    chosen_on: str
    by_class: Mapping[str, Mapping[str, float]]


Figures = Scored | Paraphrases


def similarity(
    store: FeatureStore,
    *,
    encoders: Sequence[str] = (),
    run: Alignment | None = None,
    split: str | None = None,
    device: str = "auto",
    on_rows: OnRows = silent,
) -> dict[str, dict[str, Figures]]:
    """Measure text encoders, by default all of a store, and an alignment's text sides, on pairs of sentences.

    Returns figures by encoder and split. An alignment of two text encoders is measured on each side, and across: one
    sentence by the first, the other by the second, both ways. The threshold of paraphrases is the one with the highest
    accuracy on the train pairs (or on val; where there are neither, on those measured, and ``chosen_on`` says so).

    Raises ConfigError for a dataset that has no pairs, DataError for a split without scored pairs, RunError if the
    store lacks what the alignment reads.
    """
    task = store.manifest.task
    if task not in PAIRS:
        raise ConfigError(f"similarity takes a dataset of scored pairs; {store.dataset} is one for {task}")
    labelled = is_labelled(store.targets) & store.present("text")
    splits = ordered_splits(store.splits[labelled])
    if split is not None and split not in splits:
        raise DataError(
            f"{store.dataset} has no scored pairs in split {split!r}; splits with some: {', '.join(splits)}"
        )
    if not splits:
        raise DataError(f"{store.dataset} has no scored pairs")
    shown = [split] if split is not None else splits
    found: dict[str, dict[str, Figures]] = {}
    for name, cosines in _all_cosines(store, encoders, run, device, on_rows).items():
        if task == "similarity":
            found[name] = {s: _scored(store, cosines, labelled & (store.splits == s)) for s in shown}
        else:
            found[name] = {s: _paraphrases(store, cosines, labelled, s, splits) for s in shown}
    return found


def pair_cosines(first: Features, second: Features | None = None) -> np.ndarray:
    """Return the cosine of each sample's two texts (N,): the first's by one encoder, the second's by the same or
    another.

    NaN for a sample that does not have two usable texts.
    """
    about = first.samples
    offsets = about.items(first.modality)
    if offsets is None:
        raise DataError(f"{about.dataset} has one {first.modality} a sample, where pairs have two")
    usable = about.present(first.modality) & (np.diff(offsets) == 2)
    a, b = first.rows(), (second or first).rows()
    cosines = np.full(len(about), np.nan)
    samples = np.flatnonzero(usable)
    for start in range(0, len(samples), CHUNK):
        part = samples[start : start + CHUNK]
        x, y = (rows[offsets[part] + i].astype(np.float64) for i, rows in enumerate((a, b)))
        norms = np.linalg.norm(x, axis=1) * np.linalg.norm(y, axis=1)
        cosines[part] = (x * y).sum(1) / np.where(norms > 0, norms, 1)
    return cosines


def _all_cosines(
    store: FeatureStore, encoders: Sequence[str], run: Alignment | None, device: str, on_rows: OnRows
) -> dict[str, np.ndarray]:
    cosines: dict[str, np.ndarray] = {}
    if encoders or run is None:
        chosen = select_features(store, encoders)
        if "text" not in chosen:
            raise ConfigError("similarity is about texts; name a text encoder with --encoder")
        cosines |= {features.encoder: pair_cosines(features) for features in chosen["text"]}
    if run is not None:
        sides = [i for i, side in enumerate(run.sides) if side.modality == "text"]
        if not sides:
            raise RunError(f"alignment {run.name} has no text side")
        if not encoders:  # what they were before, to compare with
            for i in sides:
                features = store.open_features(run.sides[i].encoder, "text")
                if features is not None and run.config.views == "pooled":
                    cosines[features.encoder] = pair_cosines(features)
        aligned = [aligned_features(run, i, store, device=device, on_rows=on_rows) for i in sides]
        for features in aligned:
            cosines[features.encoder] = pair_cosines(features)
        if len(aligned) == 2:
            across = [pair_cosines(*aligned), pair_cosines(*aligned[::-1])]
            cosines[f"{run.name}, across"] = np.mean(across, axis=0)
    return cosines


def _scored(store: FeatureStore, cosines: np.ndarray, rows: np.ndarray) -> Scored:
    from scipy.stats import pearsonr, spearmanr

    rows = rows & np.isfinite(cosines)
    scores, found = store.targets[rows].astype(np.float64), cosines[rows]
    low, high = store.manifest.scale or (0.0, 1.0)
    errors = np.abs(low + np.clip(found, 0, 1) * (high - low) - scores)
    groups = {"all": np.ones(len(scores), bool)}
    if 1 < np.ceil(high) - np.floor(low) <= MOST_UNITS:
        edges = np.arange(np.floor(low), np.ceil(high))
        bins = np.clip(np.floor(scores), edges[0], edges[-1])
        groups |= {f"{edge:g}-{edge + 1:g}": bins == edge for edge in edges}
    varies = len(scores) > 1 and np.ptp(scores) > 0 and np.ptp(found) > 0
    return Scored(
        n_pairs=len(scores),
        pearson=float(pearsonr(found, scores)[0]) if varies else float("nan"),
        spearman=float(spearmanr(found, scores)[0]) if varies else float("nan"),
        tolerance={
            name: tuple(float((errors[mine] < e).mean()) for e in TOLERANCES)
            for name, mine in groups.items()
            if mine.any()
        },
    )


def _paraphrases(
    store: FeatureStore, cosines: np.ndarray, labelled: np.ndarray, split: str, splits: Sequence[str]
) -> Paraphrases:
    from sklearn.metrics import average_precision_score, precision_recall_fscore_support

    usable = labelled & np.isfinite(cosines)
    source = next((name for name in (TRAIN, VAL) if name in splits and name != split), split)
    chosen = usable & (store.splits == source)
    threshold = best_threshold(cosines[chosen], store.targets[chosen] == 1)
    rows = usable & (store.splits == split)
    truth, called = store.targets[rows] == 1, cosines[rows] >= threshold
    figures = precision_recall_fscore_support(truth, called, labels=[False, True], zero_division=0)
    return Paraphrases(
        n_pairs=int(rows.sum()),
        accuracy=float((truth == called).mean()),
        average_precision=float(average_precision_score(truth, cosines[rows])) if truth.any() else float("nan"),
        threshold=threshold,
        chosen_on=source,
        by_class={
            name: dict(zip(("precision", "recall", "f1"), (float(x[c]) for x in figures[:3]), strict=True))
            for c, name in enumerate(("dissimilar", "similar"))
        },
    )


def best_threshold(cosines: np.ndarray, truth: np.ndarray) -> float:
    """Return the threshold (halfway between two cosines) with the highest accuracy, of (n,) of both; the lowest
    such."""
    order = np.argsort(cosines, kind="stable")
    values, positive = cosines[order], truth[order]
    # Right with so many of the lowest called dissimilar: those that are, and the similar ones above.
    right = np.concatenate([[0], np.cumsum(~positive)]) + positive.sum() - np.concatenate([[0], np.cumsum(positive)])
    possible = np.concatenate([[True], values[1:] > values[:-1], [True]]) if len(values) else np.array([True])
    best = int(np.argmax(np.where(possible, right, -1)))
    if not len(values):
        return 0.0
    if best in (0, len(values)):
        return float(np.nextafter(values[0], -np.inf) if best == 0 else np.nextafter(values[-1], np.inf))
    middle = float((values[best - 1] + values[best]) / 2)
    return middle if middle > values[best - 1] else float(values[best])  # between neighbours there is nothing
