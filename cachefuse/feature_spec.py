"""What features are called: a modality, and which view of it."""

from collections.abc import Iterable


def feature_name(modality: str, view: str) -> str:
    """Return what a modality's features of a view are called."""
    return modality if view == POOLED else f"{modality}_{view}"


def split_name(name: str) -> tuple[str, str]:
    """Return the modality and the view of features."""
    modality, _, view = name.rpartition("_")
    return (modality, view) if modality and view in (TOKENS, IDS) else (name, POOLED)


def modalities_of(names: Iterable[str]) -> tuple[str, ...]:
    """Return the modalities of features, each once, in alphabetical order."""
    return tuple(sorted({split_name(name)[0] for name in names}))


# What a store has of a modality: a vector a sample, vectors of its tokens, or their numbers; and as a training may read
# tokens, side by side in place of a vector.
POOLED, TOKENS, IDS, FLAT = "pooled", "tokens", "ids", "flat"
