"""The feature store: one Zarr v3 group per dataset, with rows aligned across encoders and modalities.

    samples/{id, split, target, digest, stamp, present/<modality>, items/<modality>, rows/<modality>}
    features/<encoder>/<modality>/{pooled, tokens, scales, offsets, ids, ids_offsets, ngrams, ngrams_offsets,
                                   journal.jsonl}

A block of rows is the unit of work and of resume, and one file. A row exists if the journal lists it. Zarr reads a
missing shard as zeros, so nothing is read that the journal does not list.
"""

import os
import shutil
from collections.abc import Mapping
from pathlib import Path

from cachefuse.errors import CacheError
from cachefuse.feature_spec import NUMBERED
from cachefuse.files import slug
from cachefuse.printable import listed
from cachefuse.store.features import JOURNAL, Features
from cachefuse.store.format import differing_fields, provenance_key, read_lines, seal
from cachefuse.store.samples import StoredSamples
from cachefuse.store.views import declare_group


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

    @property
    def asked(self) -> dict[str, dict[str, str]]:
        """The encoders that extract was asked for, each with the spec that opens it by modality."""
        return {encoder: dict(sources) for encoder, sources in self._meta.get("asked", {}).items()}

    def lost_features(self) -> dict[tuple[str, str], str]:
        """Return what to do, by (encoder, modality), of features that were asked for and are not there at all."""
        return {
            (encoder, modality): f"it is not there; extract it again (--encoder {source}), or remove the encoder: "
            f"cachefuse verify --dataset {self.dataset} --forget {encoder}"
            for encoder, sources in self.asked.items()
            for modality, source in sources.items()
            if not _is_begun(self._features_path(encoder, modality))
        }

    def forget_encoder(self, encoder: str) -> None:
        """Remove an encoder's features, and the note that they were asked for. The caller holds the store's lock.

        ``encoder`` is its name, or that of its folder.
        Raises CacheError for an encoder that the store does not know.
        """
        folder = self.path / "features" / slug(encoder)
        kept = {name: sources for name, sources in self.asked.items() if slug(name) != slug(encoder)}
        if len(kept) == len(self.asked) and not folder.is_dir():
            known = {path.parent.name for path in self.feature_paths()} - {slug(name) for name in self.asked}
            raise CacheError(f"{self.path} has no encoder {encoder!r}; it has: {listed([*self.asked, *sorted(known)])}")
        self._meta["asked"] = kept
        declare_group(self.path, {"cachefuse": seal(self._meta)})
        shutil.rmtree(folder, ignore_errors=True)

    def open_features(self, encoder: str, modality: str) -> Features | None:
        """Return one encoder's features of one modality, or None. ``encoder`` is a spec's short form."""
        return self.open_group(self._features_path(encoder, modality))

    def open_group(self, path: Path) -> Features | None:
        """Return the features in a folder, or None if nothing was written there. Raises CacheError for damage."""
        if not _is_begun(path):
            return None
        features = Features(self, path)
        place = self._features_path(features.encoder, features.modality)
        if path != place:
            raise CacheError(
                f"{path} holds features of {features.encoder} ({features.modality}), whose place is {place}; delete a "
                f"copy, or give the folder its own name again"
            )
        return features

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
        # Ids and n-grams do not depend on the dtype of the other features.
        fields = [field for field in differing_fields(old, new) if field != "dtype" or not set(dtypes) <= {*NUMBERED}]
        differing = [f"{field} ({old.get(field)} there, {new.get(field)} here)" for field in fields]
        if differing:
            raise CacheError(
                f"{self.path} holds {features.encoder} {features.modality} features that were made differently: "
                f"{listed(differing)}; use another --workspace, or delete {features.path} to extract them again"
            )

    def _features_path(self, encoder: str, modality: str) -> Path:
        return self.path / "features" / slug(encoder) / modality


def _is_begun(folder: Path) -> bool:
    return os.path.lexists(folder / "zarr.json") or os.path.lexists(folder / JOURNAL)
