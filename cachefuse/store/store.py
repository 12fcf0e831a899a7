"""The feature store: one Zarr v3 group a dataset, rows aligned across encoders and modalities.

    samples/{id, split, target, digest, stamp, present/<modality>, items/<modality>, rows/<modality>}
    features/<encoder>/<modality>/{pooled, tokens, scales, offsets, ids, ids_offsets, journal.jsonl}

A block of rows is the unit of work, of resume and of a file. A row exists if the journal says so: a shard that is
absent would read as zeros, so nothing is read that the journal does not list.
"""

import shutil
from collections.abc import Mapping
from pathlib import Path

from cachefuse.errors import CacheError
from cachefuse.feature_spec import IDS
from cachefuse.files import slug
from cachefuse.store.features import JOURNAL, Features
from cachefuse.store.format import differing_fields, provenance_key, read_lines
from cachefuse.store.samples import StoredSamples


class FeatureStore(StoredSamples):
    """A dataset's samples and every feature extracted from them.

    Open an existing store with ``FeatureStore(path)``; make or update one with
    ``cachefuse.extraction.open_store.open_store``.
    """

    def features(self) -> list[Features]:
        """Return what has been extracted, sorted by encoder and modality."""
        found = (self.open_group(group) for group in self.feature_paths())
        return [features for features in found if features is not None]

    def feature_paths(self) -> list[Path]:
        """Return the folders of what has been extracted, sorted; one that is damaged can't be opened."""
        return sorted(path for path in self.path.glob("features/*/*") if path.is_dir())

    def open_features(self, encoder: str, modality: str) -> Features | None:
        """Return one encoder's features of one modality, or None; ``encoder`` is a spec's short form."""
        return self.open_group(self._features_path(encoder, modality))

    def open_group(self, path: Path) -> Features | None:
        """Return the features in a folder, or None if nothing was written there. Raises CacheError for damage."""
        if not path.is_dir():
            return None
        try:
            return Features(self, path)
        except CacheError:
            if any(True for _ in read_lines(path / JOURNAL)):
                raise
            return None  # cut short before anything was written to it: as good as not there

    def require_features(
        self, encoder: str, modality: str, provenance: Mapping[str, str], source: str, dtypes: Mapping[str, str]
    ) -> Features:
        """Open one encoder's features of one modality, making them if they are new; ``source`` opens the encoder.

        Raises CacheError, listing the fields that differ, if they were made by something else under the same name, or
        if views are there in other dtypes than ``dtypes`` (by view).
        """
        features = self.open_features(encoder, modality)
        if features is None or (features.key != provenance_key(provenance) and not features.n_written):
            path = self._features_path(encoder, modality)
            shutil.rmtree(path, ignore_errors=True)  # an attempt that wrote nothing stands in nobody's way
            return Features.create(self, path, encoder, source, modality, provenance)
        self.check_same(features, provenance, dtypes)
        return features

    def check_same(self, features: Features, provenance: Mapping[str, str], dtypes: Mapping[str, str]) -> None:
        """Raise CacheError, listing the fields that differ, if features were not made by what is asked for."""
        stored = {name: view.dtype for name, view in features.views.items()}
        mixed = [name for name in stored if "int8" in (stored[name], dtypes.get(name)) and name in dtypes]
        old = {**features.provenance, **{f"dtype of {name}": stored[name] for name in mixed}}
        new = {**provenance, **{f"dtype of {name}": dtypes[name] for name in mixed}}
        # Ids are the same whatever the other features are kept in.
        fields = [field for field in differing_fields(old, new) if field != "dtype" or set(dtypes) != {IDS}]
        differing = [f"{field} ({old.get(field)} there, {new.get(field)} here)" for field in fields]
        if differing:
            raise CacheError(
                f"{self.path} holds {features.encoder} {features.modality} features that were made differently: "
                f"{', '.join(differing)}; use another --workspace, or delete {features.path} to extract them again"
            )

    def _features_path(self, encoder: str, modality: str) -> Path:
        return self.path / "features" / slug(encoder) / modality
