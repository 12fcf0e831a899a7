"""Features made of others that a store has already: read, mapped, written; no sample is encoded again."""

from collections.abc import Callable, Mapping

import numpy as np

from cachefuse.encoders.base import DerivedTower
from cachefuse.store.features import Features
from cachefuse.store.rows import Rows
from cachefuse.store.store import FeatureStore
from cachefuse.store.writer import ViewWriter

AT_ONCE = 1 << 22  # floats read at a time, at most; some rows have many tokens
MOST_ROWS = 1024

OnRows = Callable[[int, int], None]


def base_rows(store: FeatureStore, tower: DerivedTower) -> Rows | None:
    """Return the rows that a tower's features are made of, or None if the store lacks them, or any of them."""
    base = store.open_features(tower.base_encoder, tower.modality)
    if base is None or base.key != tower.base_key or tower.base_view not in base.views or base.pending(tower.base_view):
        return None
    return base.rows(tower.base_view)


def derive(
    features: Features,
    tower: DerivedTower,
    rows: Rows,
    dtypes: Mapping[str, str],
    on_rows: OnRows = lambda done, total: None,
) -> int:
    """Compute the rows that features lack from those of another encoder, and return how many those are.

    A sample without the modality keeps its row, of zeros.
    """
    samples, view = features.samples, "pooled"
    missing = features.missing_rows(view)
    present = samples.present_rows(features.modality)
    n_tokens = rows.shape[1] if len(rows.shape) == 3 else int(getattr(rows, "lengths", np.ones(1)).max(initial=1))
    size = max(1, min(MOST_ROWS, AT_ONCE // max(1, n_tokens * rows.shape[-1])))
    with ViewWriter(features, view, ragged=False, dtype=dtypes[view]) as writer:
        for start in range(0, len(missing), size):
            part = missing[start : start + size]
            here = present[part]
            values: list[np.ndarray | None] = [None] * len(part)
            if here.any():
                for i, value in zip(np.flatnonzero(here).tolist(), tower.transform(rows[part[here]]), strict=True):
                    values[i] = value
            writer.add(part, values)
            on_rows(start + len(part), len(missing))
    return len(missing)
