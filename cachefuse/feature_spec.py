"""What features are: of which modality, in which view, and how large."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

# What a store has of a modality: a vector a sample, vectors of its tokens, or their numbers; and as a training may read
# tokens, side by side in place of a vector.
POOLED, TOKENS, IDS, FLAT = "pooled", "tokens", "ids", "flat"
VIEWS = (POOLED, TOKENS, IDS, FLAT)


@dataclass(frozen=True)
class FeatureSpec:
    """Features of a modality in a view, and their sizes; 0 is what a view lacks, or what is not known.

    Pooled features are (N, D), tokens (N, T, D), flat tokens (N, T * D), ids (N, T). ``width`` is that of the last
    dimension, but of ids, which have a ``vocabulary``. ``n_tokens`` is T, the most that a sample has.
    """

    modality: str
    view: str
    width: int = 0
    n_tokens: int = 0
    vocabulary: int = 0

    @property
    def name(self) -> str:
        """What the features are called: see ``feature_name``."""
        return feature_name(self.modality, self.view)


def feature_name(modality: str, view: str) -> str:
    """Return what a modality's features of a view are called: "image", "image_tokens". Flat tokens stand for pooled."""
    return modality if view in (POOLED, FLAT) else f"{modality}_{view}"


def modalities_of(specs: Iterable[FeatureSpec]) -> tuple[str, ...]:
    """Return the modalities of features, each once, in alphabetical order."""
    return tuple(sorted({spec.modality for spec in specs}))


def pooled_specs(widths: Mapping[str, int]) -> dict[str, FeatureSpec]:
    """Return what pooled features of such widths by modality are, by name."""
    return {modality: FeatureSpec(modality, POOLED, width) for modality, width in widths.items()}
