"""Features computed from other features of a store. No sample is encoded again."""

from collections.abc import Callable, Mapping

import numpy as np

from cachefuse.encoders.base import DerivedTower
from cachefuse.store.features import Features
from cachefuse.store.rows import Rows
from cachefuse.store.store import FeatureStore
from cachefuse.store.writer import ViewWriter

AT_ONCE = 1 << 22  # maximum floats read at a time; some rows have many tokens
MOST_ROWS = 1024

OnRows = Callable[[int, int], None]


def base_rows(store: FeatureStore, tower: DerivedTower) -> Rows | None:
    """Return the rows from which a tower computes its features, or None if the store does not have them.

    Raises CacheError if some are damaged or not computed yet: encoding raw samples would give other last digits.
    """
    base = store.open_features(tower.base_encoder, tower.modality)
    if base is None or base.key != tower.base_key or tower.base_view not in {*base.views, *base.asked}:
        return None
    return base.rows(tower.base_view)


def derive(
    features: Features,
    tower: DerivedTower,
    rows: Rows,
    dtypes: Mapping[str, str],
    on_rows: OnRows = lambda done, total: None,
) -> int:
    """Compute the missing rows from ``rows``, another encoder's features. Return how many were missing.

    The row of a sample without the modality is zeros.
    """
    samples, view = features.samples, "pooled"
    missing = features.missing_rows(view)
    present = samples.present_rows(features.modality)
    n_tokens = rows.shape[1] if len(rows.shape) == 3 else int(getattr(rows, "lengths", np.ones(1)).max(initial=1))
    size = max(1, min(MOST_ROWS, AT_ONCE // max(1, n_tokens * rows.shape[-1])))
    with ViewWriter(features, view, ragged=False, dtype=dtypes[view]) as writer:
        for start in range(0, len(missing), size):
            chunk = missing[start : start + size]
            usable = present[chunk]
            values: list[np.ndarray | None] = [None] * len(chunk)
            if usable.any():
                for i, value in zip(np.flatnonzero(usable).tolist(), tower.transform(rows[chunk[usable]]), strict=True):
                    values[i] = value
            writer.add(chunk, values)
            on_rows(start + len(chunk), len(missing))
    return len(missing)
