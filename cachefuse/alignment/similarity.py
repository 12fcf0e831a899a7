"""Sentence similarity: cosines of embeddings, evaluated against people's scores or paraphrase labels."""

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
from cachefuse.printable import listed
from cachefuse.store.features import Features
from cachefuse.store.store import FeatureStore
from cachefuse.training.data import TRAIN, VAL
from cachefuse.training.selection import select_features

TOLERANCES = np.linspace(0.1, 1, 100)  # CBMF, figure 3: "100 values spanning from 0.1 to 1"
CHUNK = 4096  # pairs at a time
MOST_UNITS = 20  # of a scale with a tolerance curve per unit


@dataclass(frozen=True)
class ScoredPairs:
    """Figures of pairs with people's scores: correlations of score and cosine, and the tolerance curve.

    ``tolerance`` has, for each e of ``TOLERANCES``, the share of pairs whose cosine is within e of the score. Cosines
    from 0 to 1 are first mapped to the dataset's scale. There is a curve for "all" pairs, and one for each unit ("0-1")
    of a scale of up to 20 units.
    """

    n_pairs: int
    pearson: float
    spearman: float
    tolerance: Mapping[str, tuple[float, ...]]


@dataclass(frozen=True)
class Paraphrases:
    """Figures of pairs with paraphrase labels: a pair is predicted a paraphrase from a cosine of ``threshold`` on.

    ``chosen_on`` is the split that chose the threshold. ``by_class`` has precision, recall and F1 of both classes.
    """

    n_pairs: int
    accuracy: float
    average_precision: float
    threshold: float
    chosen_on: str
    by_class: Mapping[str, Mapping[str, float]]


Figures = ScoredPairs | Paraphrases


def similarity(
    store: FeatureStore,
    *,
    encoders: Sequence[str] = (),
    run: Alignment | None = None,
    split: str | None = None,
    device: str = "auto",
    on_rows: OnRows = silent,
) -> dict[str, dict[str, Figures]]:
    """Evaluate text encoders, by default all of a store, and an alignment's text sides, on pairs of sentences.

    Returns figures by encoder and split. An alignment of two text encoders is evaluated on each side and across: one
    sentence is encoded by the first, the other by the second, in both orders. The threshold for paraphrases has the
    highest accuracy on the train pairs, else on val, else on the evaluated pairs themselves (see ``chosen_on``).

    Raises ConfigError for a dataset without pairs, DataError for a split without scored pairs, RunError if the store
    lacks the features that the alignment reads.
    """
    task = store.manifest.task
    if task not in PAIRS:
        raise ConfigError(f"similarity needs a dataset of scored pairs; the task of {store.dataset} is {task}")
    labelled = is_labelled(store.targets) & store.present("text")
    splits = ordered_splits(store.splits[labelled])
    if split is not None and split not in splits:
        raise DataError(f"{store.dataset} has no scored pairs in split {split!r}; splits with some: {listed(splits)}")
    if not splits:
        raise DataError(f"{store.dataset} has no scored pairs")
    shown = [split] if split is not None else splits
    results: dict[str, dict[str, Figures]] = {}
    for name, cosines in _all_cosines(store, encoders, run, device, on_rows).items():
        if task == "similarity":
            results[name] = {s: _scored(store, cosines, labelled & (store.splits == s)) for s in shown}
        else:
            results[name] = {s: _paraphrases(store, cosines, labelled, s, splits) for s in shown}
    return results


def pair_cosines(first: Features, second: Features | None = None) -> np.ndarray:
    """Return the cosine of each sample's two texts (N,): one by the ``first`` encoder, one by the ``second``.

    Without ``second`` both are by the first. NaN for a sample without two usable texts. Raises DataError if samples
    have one text each.
    """
    samples = first.samples
    offsets = samples.items(first.modality)
    if offsets is None:
        raise DataError(f"{samples.dataset} has one {first.modality} per sample, but a pair needs two")
    usable = samples.present(first.modality) & (np.diff(offsets) == 2)
    a, b = first.rows(), (second or first).rows()
    cosines = np.full(len(samples), np.nan)
    pairs = np.flatnonzero(usable)
    for start in range(0, len(pairs), CHUNK):
        chunk = pairs[start : start + CHUNK]
        x, y = (rows[offsets[chunk] + i].astype(np.float64) for i, rows in enumerate((a, b)))
        norms = np.linalg.norm(x, axis=1) * np.linalg.norm(y, axis=1)
        cosines[chunk] = (x * y).sum(1) / np.where(norms > 0, norms, 1)
    return cosines


def _all_cosines(
    store: FeatureStore, encoders: Sequence[str], run: Alignment | None, device: str, on_rows: OnRows
) -> dict[str, np.ndarray]:
    cosines: dict[str, np.ndarray] = {}
    if encoders or run is None:
        chosen = select_features(store, encoders)
        if "text" not in chosen:
            raise ConfigError("similarity needs a text encoder; name one with --encoder")
        cosines |= {features.encoder: pair_cosines(features) for features in chosen["text"]}
    if run is not None:
        sides = [i for i, side in enumerate(run.sides) if side.modality == "text"]
        if not sides:
            raise RunError(f"alignment {run.name} has no text side")
        if not encoders:  # the features before alignment, for comparison
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


def _scored(store: FeatureStore, cosines: np.ndarray, rows: np.ndarray) -> ScoredPairs:
    from scipy.stats import pearsonr, spearmanr

    rows = rows & np.isfinite(cosines)
    scores, cosines = store.targets[rows].astype(np.float64), cosines[rows]
    low, high = store.manifest.scale or (0.0, 1.0)
    errors = np.abs(low + np.clip(cosines, 0, 1) * (high - low) - scores)
    groups = {"all": np.ones(len(scores), bool)}
    if 1 < np.ceil(high) - np.floor(low) <= MOST_UNITS:
        edges = np.arange(np.floor(low), np.ceil(high))
        bins = np.clip(np.floor(scores), edges[0], edges[-1])
        groups |= {f"{edge:g}-{edge + 1:g}": bins == edge for edge in edges}
    varies = len(scores) > 1 and np.ptp(scores) > 0 and np.ptp(cosines) > 0
    return ScoredPairs(
        n_pairs=len(scores),
        pearson=float(pearsonr(cosines, scores)[0]) if varies else float("nan"),
        spearman=float(spearmanr(cosines, scores)[0]) if varies else float("nan"),
        tolerance={
            name: tuple(float((errors[group] < e).mean()) for e in TOLERANCES)
            for name, group in groups.items()
            if group.any()
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
    truth, predicted = store.targets[rows] == 1, cosines[rows] >= threshold
    figures = precision_recall_fscore_support(truth, predicted, labels=[False, True], zero_division=0)
    return Paraphrases(
        n_pairs=int(rows.sum()),
        accuracy=float((truth == predicted).mean()),
        average_precision=float(average_precision_score(truth, cosines[rows])) if truth.any() else float("nan"),
        threshold=threshold,
        chosen_on=source,
        by_class={
            name: dict(zip(("precision", "recall", "f1"), (float(x[c]) for x in figures[:3]), strict=True))
            for c, name in enumerate(("dissimilar", "similar"))
        },
    )


def best_threshold(cosines: np.ndarray, truth: np.ndarray) -> float:
    """Return the threshold with the highest accuracy on ``cosines`` (n,) and labels ``truth`` (n,) bool.

    It is halfway between two cosines; of equally good thresholds the lowest is returned.
    """
    order = np.argsort(cosines, kind="stable")
    values, positive = cosines[order], truth[order]
    # right[i]: correct pairs if the i lowest are predicted dissimilar: the dissimilar below, the similar above.
    right = np.concatenate([[0], np.cumsum(~positive)]) + positive.sum() - np.concatenate([[0], np.cumsum(positive)])
    possible = np.concatenate([[True], values[1:] > values[:-1], [True]]) if len(values) else np.array([True])
    best = int(np.argmax(np.where(possible, right, -1)))
    if not len(values):
        return 0.0
    if best in (0, len(values)):
        return float(np.nextafter(values[0], -np.inf) if best == 0 else np.nextafter(values[-1], np.inf))
    middle = float((values[best - 1] + values[best]) / 2)
    return middle if middle > values[best - 1] else float(values[best])  # no float lies between
