"""A summary of a store: arrays with shapes, dtypes, sizes and progress, their provenance, and the bad samples."""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from cachefuse.data.splits import ordered_splits
from cachefuse.store.features import Features
from cachefuse.store.long_texts import LongTexts
from cachefuse.store.samples import BadSample
from cachefuse.store.store import FeatureStore


@dataclass(frozen=True)
class StoredView:
    """One view: shape ("T" if the number of tokens varies), ``done`` of ``rows`` rows, bytes, damaged blocks."""

    encoder: str
    modality: str
    view: str
    shape: tuple[int | str, ...]
    dtype: str
    done: int
    rows: int
    blocks: int
    n_bytes: int
    damaged: int


@dataclass(frozen=True)
class Inspection:
    """A store's summary. By (encoder, modality): ``provenance``, ``long`` texts, and what to do where all is ``lost``.

    ``present`` are the numbers of samples by modality.
    """

    path: Path
    dataset: str
    extracted: str
    rows: int
    splits: dict[str, int]
    classes: tuple[str, ...]
    present: dict[str, int]
    views: tuple[StoredView, ...]
    lost: dict[tuple[str, str], str]
    sources: dict[tuple[str, str], str]
    provenance: dict[tuple[str, str], dict[str, str]]
    long: dict[tuple[str, str], LongTexts]
    bad: tuple[BadSample, ...]


def inspect_store(store: FeatureStore) -> Inspection:
    """Summarise a store. This reads its samples and journals, no features."""
    features = store.features()
    counts = Counter(str(split) for split in store.splits)
    return Inspection(
        path=store.path,
        dataset=store.dataset,
        extracted=store.extracted,
        rows=len(store),
        splits={split: counts[split] for split in ordered_splits(counts)},
        classes=store.classes,
        present={modality: int(store.present(modality).sum()) for modality in store.modalities},
        views=tuple(_view(group, name) for group in features for name in group.views),
        lost=store.lost_features(),
        sources={(group.encoder, group.modality): group.source for group in features},
        provenance={(group.encoder, group.modality): {**group.provenance, "key": group.key} for group in features},
        long={(group.encoder, group.modality): long for group in features if (long := group.long_texts()) is not None},
        bad=tuple(store.bad_samples()),
    )


def _view(features: Features, name: str) -> StoredView:
    view, n_blocks = features.views[name], features.n_blocks(name)
    row_shape: tuple[int | str, ...] = ("T", *view.token_shape) if view.ragged else view.row_shape
    blocks = [features.written(name, block) for block in range(n_blocks)]
    faults = [features.fault(name, block) for block in range(n_blocks)]
    return StoredView(
        encoder=features.encoder,
        modality=features.modality,
        view=name,
        shape=(features.n_rows, *row_shape),
        dtype=view.dtype,
        done=features.n_rows - len(features.missing_rows(name)),
        rows=features.n_rows,
        blocks=n_blocks,
        n_bytes=sum(size for block in blocks if block for size, _ in block.files.values()),
        damaged=sum(fault is not None and fault.is_damage for fault in faults),
    )
