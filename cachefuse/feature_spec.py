"""The specification of features: modality, view and sizes."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

# The views of a modality: one vector per sample, token vectors, token ids, counts of hashed n-grams. A training may
# also read tokens as one concatenated vector (flat).
POOLED, TOKENS, IDS, NGRAMS, FLAT = "pooled", "tokens", "ids", "ngrams", "flat"
VIEWS = (POOLED, TOKENS, IDS, NGRAMS, FLAT)
NUMBERED = (
    IDS,
    NGRAMS,
)  # views of whole numbers below a vocabulary, ragged and int32; only some text encoders have them


@dataclass(frozen=True)
class FeatureSpec:
    """Features of a modality in a view, and their sizes. A size is 0 if it does not apply or is unknown.

    Pooled features are (N, D), tokens (N, T, D), flat tokens (N, T * D), ids (N, T), n-grams (N, T, 2). ``width`` is
    the last dimension, 0 of ids. Ids, and the columns of n-grams, are less than ``vocabulary``. ``n_tokens`` is T, the
    maximum of a sample. ``parts`` are the widths of pooled features of several encoders side by side, which add to D.
    """

    modality: str
    view: str
    width: int = 0
    n_tokens: int = 0
    vocabulary: int = 0
    parts: tuple[int, ...] = ()

    @property
    def name(self) -> str:
        """The name of the features: see ``feature_name``."""
        return feature_name(self.modality, self.view)


def feature_name(modality: str, view: str) -> str:
    """Return the name of features: the modality for pooled features and flat tokens, else such as "image_tokens"."""
    return modality if view in (POOLED, FLAT) else f"{modality}_{view}"


def modalities_of(specs: Iterable[FeatureSpec]) -> tuple[str, ...]:
    """Return the modalities of features, each once, in alphabetical order."""
    return tuple(sorted({spec.modality for spec in specs}))


def pooled_specs(widths: Mapping[str, int]) -> dict[str, FeatureSpec]:
    """Return the specs of pooled features, by modality, from their widths."""
    return {modality: FeatureSpec(modality, POOLED, width) for modality, width in widths.items()}
