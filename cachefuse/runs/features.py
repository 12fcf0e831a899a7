"""The features that a run reads, as its run.json lists them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from cachefuse.errors import RunError
from cachefuse.feature_spec import FLAT, IDS, NGRAMS, NUMBERED, POOLED, TOKENS, VIEWS, FeatureSpec
from cachefuse.store.features import Features
from cachefuse.training.selection import with_view


@dataclass(frozen=True)
class RunFeatures:
    """One encoder's features that a run was trained on; ``source`` opens the encoder again.

    ``width`` is the width of a pooled feature, of one token or of all flat tokens side by side; for ids and n-grams
    it is the vocabulary. ``tokens`` is the maximum of tokens per sample, for flat features their number, for pooled
    ones 0.
    """

    encoder: str
    source: str
    key: str
    dtype: str
    width: int
    tokens: int
    modality: str
    view: str


RunFeaturesByName = dict[str, tuple[RunFeatures, ...]]


def record_features(stored: Mapping[str, Sequence[Features]], specs: Mapping[str, FeatureSpec]) -> RunFeaturesByName:
    """Return the features of a run for its run.json, by name; ``stored`` are by modality, ``specs`` by name."""

    def to_run_features(f: Features, spec: FeatureSpec) -> RunFeatures:
        return RunFeatures(
            encoder=f.encoder,
            source=f.source,
            key=f.key,
            dtype=f.provenance["dtype"],
            width=f.views[POOLED].row_shape[0] if spec.view == POOLED else spec.vocabulary or spec.width,
            tokens=spec.n_tokens,
            modality=spec.modality,
            view=spec.view,
        )

    return {
        name: tuple(to_run_features(f, spec) for f in with_view(stored[spec.modality], spec.view))
        for name, spec in specs.items()
    }


def specs_of(features: RunFeaturesByName) -> dict[str, FeatureSpec]:
    """Return the specs of a run's features, by name. Raises RunError for tokens of several encoders."""
    return {name: _spec_of(name, group) for name, group in features.items()}


def _spec_of(name: str, group: Sequence[RunFeatures]) -> FeatureSpec:
    if len({(features.modality, features.view) for features in group}) != 1 or group[0].view not in VIEWS:
        raise RunError(f"{name} must have one modality and one view of: {', '.join(VIEWS)}")
    first, n_tokens, width = group[0], group[0].tokens, sum(features.width for features in group)
    parts = tuple(features.width for features in group) if len(group) > 1 else ()
    spec = FeatureSpec(first.modality, first.view, width, n_tokens, parts=parts)
    if first.view in NUMBERED:
        columns = 2 if first.view == NGRAMS else 0
        spec = FeatureSpec(first.modality, first.view, columns, n_tokens, vocabulary=width)
    if spec.name != name:
        raise RunError(f"the {first.view} of {first.modality} must be called {spec.name}. Got {name} instead")
    if first.view == FLAT and (len(group) > 1 or n_tokens < 1 or width % n_tokens):
        raise RunError(f"{name}: {width} numbers per sample cannot be {n_tokens} tokens of one encoder")
    if first.view in (TOKENS, *NUMBERED) and (len(group) > 1 or n_tokens < 1):
        raise RunError(f"{name} must be of one encoder, with at least 1 token per sample")
    return spec


def add_views(features: object) -> object:
    """Return the features of a run.json, by name, with modality and view, which old files lack.

    In old files no modality's name ends in "_tokens" or "_ids".
    """
    if not isinstance(features, Mapping):
        return features  # pydantic reports the wrong type later

    def complete(name: str, entry: object) -> object:
        if not isinstance(entry, Mapping) or "modality" in entry:
            return entry
        modality, _, view = name.rpartition("_")
        if modality and view in (TOKENS, IDS):
            return {**entry, "modality": modality, "view": view}
        return {"tokens": 0, **entry, "modality": name, "view": FLAT if entry.get("tokens") else POOLED}

    return {
        name: [complete(name, entry) for entry in group] if isinstance(group, list) else group
        for name, group in features.items()
    }
