"""A dataset's features for notebooks: a view per split, indexed like an array, as scikit-learn expects X."""

import os
from collections.abc import Iterator, KeysView, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import DTypeLike
from torch import Tensor

from cachefuse.data.splits import ordered_splits
from cachefuse.data.targets import is_labelled
from cachefuse.errors import DataError
from cachefuse.feature_spec import pooled_specs
from cachefuse.files import JsonObject
from cachefuse.printable import listed
from cachefuse.registry import lookup
from cachefuse.store.rows import FeatureRows
from cachefuse.store.store import FeatureStore
from cachefuse.training.data import open_training_data
from cachefuse.training.feature_table import LOAD_ROWS, FeatureTable
from cachefuse.workspace import WorkspacePaths

FLOATS = ("float16", "float32", "float64")


class PickedRows:
    """Selected rows of features, (n, D), read on demand."""

    device = torch.device("cpu")

    def __init__(self, source: FeatureRows, rows: Tensor) -> None:
        """``rows`` (n,) int64 may be in any order and may repeat."""
        self.source = source
        self.rows = rows
        self.shape = (len(rows), source.shape[1])
        self.block_rows = getattr(source, "block_rows", 1)
        self.nbytes = source.nbytes * len(rows) // max(1, source.shape[0])

    def index_select(self, dim: int, index: Tensor) -> Tensor:
        """Return the rows (B, D) at ``index`` (B,)."""
        return self.source.index_select(dim, self.rows[index])

    def to(self, device: torch.device | str) -> "PickedRows | Tensor":
        """Return self for the CPU, and a tensor on any other device."""
        if torch.device(device).type == "cpu":
            return self
        return torch.cat([self.source.index_select(0, rows).to(device) for rows in self.rows.split(LOAD_ROWS)])


class FeatureView:
    """n rows of features, indexed like an array (n, D_1 + ... + D_M) or a dictionary {modality: (n, D_m)}.

    ``X[10:20]``, ``X[mask]`` and ``X[numbers]`` are views of rows, without copies; ``rows`` (n,) are row numbers in the
    store. ``X["image"]`` is an array, with NaN in rows without an image; ``dict(X)`` has all modalities, and
    ``np.asarray(X)`` puts them side by side.
    """

    def __init__(self, table: FeatureTable, rows: np.ndarray) -> None:
        self.table = table
        self.rows = rows

    @classmethod
    def from_arrays(cls, features: Mapping[str, Any]) -> "FeatureView":
        """Return a view of arrays {modality: (n, D_m)}. A row of only NaN means that the sample lacks the modality.

        Raises DataError if the arrays are not numbers (n, D), differ in n, or have other NaN or infinite values.
        """
        arrays = {modality: _as_array(modality, x) for modality, x in features.items()}
        lengths = {modality: len(x) for modality, x in arrays.items()}
        if len(set(lengths.values())) != 1:
            got = listed(f"{modality}: {n}" for modality, n in lengths.items()) or "none"
            raise DataError(f"features must be arrays by modality, all with the same number of rows. Got {got} instead")
        n = next(iter(lengths.values()))
        table = FeatureTable(
            specs=pooled_specs({modality: x.shape[1] for modality, x in arrays.items()}),
            features={modality: torch.from_numpy(x) for modality, x in arrays.items()},
            present={modality: torch.from_numpy(_present(modality, x)) for modality, x in arrays.items()},
            targets=torch.zeros(n, 0),
            labelled=np.zeros(n, bool),
            splits=np.array([""] * n),
        )
        return cls(table, np.arange(n))

    @property
    def shape(self) -> tuple[int, int]:
        return len(self), sum(x.shape[1] for x in self.table.features.values())

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[str]:
        return iter(self.keys())

    def keys(self) -> KeysView[str]:
        """Return the modalities."""
        return self.table.features.keys()

    def __getitem__(self, key: Any) -> Any:
        """Return a modality's features (n, D) as an array, or a view of rows."""
        if isinstance(key, str):
            picked = torch.from_numpy(self.rows)
            source = lookup(self.table.features, key, "modality")
            values = source.index_select(0, self.table.feature_rows(key, picked)).numpy()
            values[~self.table.present[key][picked].numpy()] = np.nan
            return values
        rows = np.ascontiguousarray(self.rows[key])  # (1,) for a single row
        if rows.ndim > 1:
            raise IndexError(f"an index must be row numbers (n,), a mask or a slice. Got {key!r} instead")
        return FeatureView(self.table, rows)

    def __array__(self, dtype: DTypeLike | None = None, copy: bool | None = None) -> np.ndarray:
        return np.concatenate([self[modality] for modality in self], axis=1, dtype=dtype)

    def __reduce__(self) -> tuple[object, ...]:
        # As arrays of these rows: memory maps cannot go to another process.
        return FeatureView.from_arrays, (dict(self),)

    def __repr__(self) -> str:
        widths = listed(f"{modality} ({x.shape[1]})" for modality, x in self.table.features.items())
        return f"FeatureView of {len(self):,} rows: {widths}"

    def to_table(self, targets: Tensor, splits: np.ndarray) -> FeatureTable:
        """Return these rows as a table, with targets (n, C) and splits (n,)."""
        rows = torch.from_numpy(self.rows)
        pooled: Any = self.table.features
        features: JsonObject = {m: PickedRows(x, self.table.feature_rows(m, rows)) for m, x in pooled.items()}
        return FeatureTable(
            features=features,
            specs=self.table.specs,
            present={modality: x[rows] for modality, x in self.table.present.items()},
            targets=targets,
            labelled=np.ones(len(self), bool),
            splits=splits,
        )


class FeatureSet:
    """A store's features with its labels: ``X, y = features.split("train")``."""

    def __init__(self, store: FeatureStore, encoders: Sequence[str] = ()) -> None:
        """``encoders`` names the features to use, by default all complete ones.

        Raises the errors of ``open_training_data``.
        """
        self.store = store
        self.table = open_training_data(store, encoders, "cpu").table

    @property
    def classes(self) -> tuple[str, ...]:
        return self.store.classes

    @property
    def modalities(self) -> tuple[str, ...]:
        return tuple(self.table.features)

    @property
    def splits(self) -> list[str]:
        return ordered_splits(self.store.splits)

    def split(self, *names: str) -> tuple[FeatureView, np.ndarray]:
        """Return X and y of the labelled rows of the splits, in the store's order.

        For multi-label, y is (n, C) int8, 0 or 1; for multi-class, class numbers (n,) int32; for questions, class
        numbers of the answers (n, 10). Raises UnknownNameError for an unknown split, DataError without labelled rows.
        """
        rows = self.rows(*names).rows
        rows = rows[is_labelled(self.store.targets)[rows]]
        if not len(rows):
            raise DataError(
                f"{self.store.dataset} has no labelled rows in {' or '.join(names)}; use rows() for unlabelled rows"
            )
        return FeatureView(self.table, rows), self.store.targets[rows]

    def rows(self, *names: str) -> FeatureView:
        """Return X of all rows of the splits, labelled or not. Raises UnknownNameError for an unknown split."""
        for name in names:
            lookup(dict.fromkeys(self.splits), name, "split")
        return FeatureView(self.table, np.flatnonzero(np.isin(self.store.splits, names)))

    def __repr__(self) -> str:
        widths = listed(f"{modality} ({x.shape[1]})" for modality, x in self.table.features.items())
        splits = listed(f"{split} ({len(self.rows(split)):,})" for split in self.splits)
        return f"FeatureSet of {self.store.dataset}: {widths}; splits {splits}; {len(self.classes)} classes"


def open_features(dataset: str, *, encoders: Sequence[str] = (), workspace: Path | str | None = None) -> FeatureSet:
    """Open the extracted features of a dataset; ``encoders`` names the features to use, by default all.

    The default workspace is ``CACHEFUSE_WORKSPACE`` or ``./workspace``, as on the command line. Raises CacheError
    without extracted features, ConfigError for an unknown encoder or a dataset without labels.
    """
    if workspace is None:
        workspace = os.environ.get("CACHEFUSE_WORKSPACE") or "workspace"
    return FeatureSet(FeatureStore(WorkspacePaths(Path(workspace)).store(dataset)), encoders)


def _as_array(modality: object, x: Any) -> np.ndarray:
    if not isinstance(modality, str) or not modality or "." in modality:  # a dot separates names of weights
        raise DataError(f"a modality cannot have the name {modality!r}; use a word such as image")
    x = np.asarray(x)
    if x.ndim != 2 or not x.shape[1] or x.dtype.kind not in "buif":
        raise DataError(f"features of {modality!r} must be numbers of shape (n, D). Got {x.dtype} {x.shape} instead")
    # Torch needs writeable memory; joblib's arrays are read-only.
    return np.require(x, x.dtype.name if x.dtype.name in FLOATS else "float32", ["C", "W"])


def _present(modality: str, x: np.ndarray) -> np.ndarray:
    present: np.ndarray = ~np.isnan(x).all(axis=1)
    wrong = np.flatnonzero(present & ~np.isfinite(x).all(axis=1))
    if len(wrong):
        raise DataError(
            f"features of {modality!r} must be finite, or NaN in the whole row if the sample lacks them. "
            f"Got NaN or infinity in row {wrong[0]} instead"
        )
    return present
