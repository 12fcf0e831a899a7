"""The features that a run reads: described in its file, and found again in a store."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cachefuse.errors import RunError
from cachefuse.feature_spec import FLAT, IDS, POOLED, TOKENS, VIEWS, FeatureSpec
from cachefuse.store.features import Features


@dataclass(frozen=True)
class RunFeatures:
    """One encoder's features that a run was trained on; ``source`` opens the encoder again.

    ``width`` is that of a sample's pooled feature, of one token, of all flat tokens side by side, or the vocabulary of
    ids. ``tokens`` is the most tokens that a sample had, of flat ones just so many, and 0 of pooled features.
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


def describe_features(stored: Mapping[str, Sequence[Features]], specs: Mapping[str, FeatureSpec]) -> RunFeaturesByName:
    """Describe the stored features, by modality, that a run is trained on, with their specs by name."""

    def describe(f: Features, spec: FeatureSpec) -> RunFeatures:
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

    return {name: tuple(describe(f, spec) for f in stored[spec.modality]) for name, spec in specs.items()}


def specs_of(features: RunFeaturesByName) -> dict[str, FeatureSpec]:
    """Return what a run's features are, by name. Raises RunError for tokens of several encoders, or not whole."""
    return {name: _spec_of(name, group) for name, group in features.items()}


def _spec_of(name: str, group: Sequence[RunFeatures]) -> FeatureSpec:
    if len({(one.modality, one.view) for one in group}) != 1 or group[0].view not in VIEWS:
        raise RunError(f"{name} must be of one modality and view, of: {', '.join(VIEWS)}")
    first, n_tokens, width = group[0], group[0].tokens, sum(one.width for one in group)
    spec = FeatureSpec(first.modality, first.view, width, n_tokens)
    if first.view == IDS:
        spec = FeatureSpec(first.modality, first.view, n_tokens=n_tokens, vocabulary=width)
    if spec.name != name:
        raise RunError(f"the {first.view} of {first.modality} must be called {spec.name}. Got {name} instead")
    if first.view == FLAT and (len(group) > 1 or n_tokens < 1 or width % n_tokens):
        raise RunError(f"{width} numbers a sample are not {n_tokens} tokens of one encoder")
    if first.view in (TOKENS, IDS) and (len(group) > 1 or n_tokens < 1):
        raise RunError(f"{name} must be of one encoder, with the most tokens that a sample has")
    return spec


def add_views(features: Any) -> Any:
    """Return features as run.json has them, by name, with the modality and view of those that do not say them.

    Runs that were saved without them had modalities whose names do not end in "_tokens" or "_ids".
    """
    if not isinstance(features, Mapping):
        return features  # not what it should be: to be told where all is checked

    def complete(name: str, one: Any) -> Any:
        if not isinstance(one, Mapping) or "modality" in one:
            return one
        modality, _, view = name.rpartition("_")
        if modality and view in (TOKENS, IDS):
            return {**one, "modality": modality, "view": view}
        return {"tokens": 0, **one, "modality": name, "view": FLAT if one.get("tokens") else POOLED}

    return {
        name: [complete(name, one) for one in group] if isinstance(group, list) else group
        for name, group in features.items()
    }
