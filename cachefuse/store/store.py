"""The feature store: one Zarr v3 group per dataset, with rows aligned across encoders and modalities.

    samples/{id, split, target, digest, stamp, present/<modality>, items/<modality>, rows/<modality>}
    features/<encoder>/<modality>/{pooled, tokens, scales, offsets, ids, ids_offsets, journal.jsonl}

A block of rows is the unit of work and of resume, and one file. A row exists if the journal lists it. Zarr reads a
missing shard as zeros, so nothing is read that the journal does not list.
"""

import os
import shutil
from collections.abc import Mapping
from pathlib import Path

from cachefuse.errors import CacheError
from cachefuse.feature_spec import IDS
from cachefuse.files import slug
from cachefuse.printable import listed
from cachefuse.store.features import JOURNAL, Features
from cachefuse.store.format import differing_fields, provenance_key, read_lines
from cachefuse.store.samples import StoredSamples


class FeatureStore(StoredSamples):
    """A dataset's samples and all features extracted from them.

    ``FeatureStore(path)`` opens an existing store; ``cachefuse.extraction.open_store.open_store`` makes or updates one.
    """

    def features(self) -> list[Features]:
        """Return all extracted features, sorted by encoder and modality."""
        groups = (self.open_group(path) for path in self.feature_paths())
        return [features for features in groups if features is not None]

    def feature_paths(self) -> list[Path]:
        """Return the folders of all extracted features, sorted, damaged ones included."""
        return sorted(path for path in self.path.glob("features/*/*") if path.is_dir())

    def open_features(self, encoder: str, modality: str) -> Features | None:
        """Return one encoder's features of one modality, or None. ``encoder`` is a spec's short form."""
        return self.open_group(self._features_path(encoder, modality))

    def open_group(self, path: Path) -> Features | None:
        """Return the features in a folder, or None if nothing was written there. Raises CacheError for damage."""
        if not os.path.lexists(path / "zarr.json") and not os.path.lexists(path / JOURNAL):
            return None
        return Features(self, path)

    def require_features(
        self, encoder: str, modality: str, provenance: Mapping[str, str], source: str, dtypes: Mapping[str, str]
    ) -> Features:
        """Open one encoder's features of one modality, or create them. ``source`` is the spec that opens the encoder.

        Raises CacheError, listing the fields that differ, if existing features have another provenance, or views in
        other dtypes than ``dtypes`` (by view).
        """
        path = self._features_path(encoder, modality)
        try:
            features = self.open_group(path)
        except CacheError:
            if any(True for _ in read_lines(path / JOURNAL)):
                raise
            features = None
        if features is None or (features.key != provenance_key(provenance) and not features.n_written):
            shutil.rmtree(path, ignore_errors=True)  # nothing is lost: no block was written
            features = Features.create(self, path, encoder, source, modality, provenance)
        else:
            self.check_same(features, provenance, dtypes)
        features.ask(dtypes)
        return features

    def remove_features(self, encoder: str, modality: str) -> None:
        """Remove one encoder's features of one modality, if there are any. The caller holds the store's lock."""
        shutil.rmtree(self._features_path(encoder, modality), ignore_errors=True)

    def check_same(self, features: Features, provenance: Mapping[str, str], dtypes: Mapping[str, str]) -> None:
        """Raise CacheError, listing the fields that differ, if features have another provenance or dtype."""
        stored = {name: view.dtype for name, view in features.views.items()}
        mixed = [name for name in stored if "int8" in (stored[name], dtypes.get(name)) and name in dtypes]
        old = {**features.provenance, **{f"dtype of {name}": stored[name] for name in mixed}}
        new = {**provenance, **{f"dtype of {name}": dtypes[name] for name in mixed}}
        # Ids do not depend on the dtype of the other features.
        fields = [field for field in differing_fields(old, new) if field != "dtype" or set(dtypes) != {IDS}]
        differing = [f"{field} ({old.get(field)} there, {new.get(field)} here)" for field in fields]
        if differing:
            raise CacheError(
                f"{self.path} holds {features.encoder} {features.modality} features that were made differently: "
                f"{listed(differing)}; use another --workspace, or delete {features.path} to extract them again"
            )

    def _features_path(self, encoder: str, modality: str) -> Path:
        return self.path / "features" / slug(encoder) / modality
