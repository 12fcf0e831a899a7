"""The features that a run reads: described in its file, and found again in a store."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from cachefuse.errors import RunError
from cachefuse.feature_spec import FLAT, POOLED, split_name
from cachefuse.store.features import Features
from cachefuse.store.rows import TokenWidth
from cachefuse.store.tokens import SequenceWidth


@dataclass(frozen=True)
class RunFeatures:
    """One encoder's features that a run was trained on; ``source`` opens the encoder again.

    ``tokens`` is the most tokens that a sample had, 0 for pooled features; where those lie side by side in the width,
    in place of pooled features, just so many.
    """

    encoder: str
    source: str
    key: str
    dtype: str
    width: int
    tokens: int = 0


RunFeaturesByName = dict[str, tuple[RunFeatures, ...]]


def read_view(name: str, features: RunFeatures) -> str:
    """Return which view is read of features that go by a name."""
    view = split_name(name)[1]
    return FLAT if view == POOLED and features.tokens else view


def describe_features(stored: Mapping[str, Sequence[Features]], widths: Mapping[str, int]) -> RunFeaturesByName:
    """Describe the stored features, by modality, that a run is trained on, of the given widths by name."""

    def describe(f: Features, width: int) -> RunFeatures:
        tokens = getattr(width, "n_tokens", 0)
        return RunFeatures(
            encoder=f.encoder,
            source=f.source,
            key=f.key,
            dtype=f.provenance["dtype"],
            width=int(width) if tokens else f.views[POOLED].row_shape[0],
            tokens=tokens,
        )

    return {name: tuple(describe(f, width) for f in stored[split_name(name)[0]]) for name, width in widths.items()}


def widths_of(features: RunFeaturesByName) -> dict[str, int]:
    """Return the widths of a run's features by name. Raises RunError for tokens of several encoders, or not whole."""
    return {name: _width_of(name, group) for name, group in features.items()}


def _width_of(name: str, group: Sequence[RunFeatures]) -> int:
    if split_name(name)[1] != POOLED:
        if len(group) != 1 or group[0].tokens < 1:
            raise RunError(f"{name} must be of one encoder, with the most tokens that a sample has")
        return SequenceWidth(group[0].width, group[0].tokens)
    width, tokens = sum(features.width for features in group), group[0].tokens if group else 0
    if tokens and (len(group) > 1 or tokens < 0 or width % tokens):
        raise RunError(f"{width} numbers a sample are not {tokens} tokens of one encoder")
    return TokenWidth(width, tokens) if tokens else width
