"""A common space of images and texts: of an alignment, or of an encoder of both, such as CLIP."""

import logging
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from cachefuse.alignment.run import Alignment
from cachefuse.alignment.tower import aligned_features, side_spec
from cachefuse.data.column import NAME_LENGTH
from cachefuse.device import resolve_device
from cachefuse.encoders import open_encoder
from cachefuse.encoders.base import EncoderSpec, Tower
from cachefuse.errors import BadSampleError, EncoderError, RunError
from cachefuse.extraction.pipeline import count_long_texts, encode_prepared, is_bad, prepare_source
from cachefuse.store.features import Features
from cachefuse.store.store import FeatureStore

logger = logging.getLogger(__name__)
BATCH = 32

OnRows = Callable[[int, int], None]


def silent(done: int, total: int) -> None:
    pass


class Space(Protocol):
    """Embeds samples and opens a store's embeddings; ``unit`` means that stored embeddings have length 1."""

    name: str
    unit: bool

    def embed(self, modality: str, samples: Sequence[Any]) -> Tensor:
        """Return vectors (n, W) of raw images (sources) or texts. Raises BadSampleError for an unusable sample."""

    def stored(self, store: FeatureStore, modality: str, on_rows: OnRows = silent) -> Features:
        """Return a store's pooled features in this space; computes missing ones from stored base features if it can.

        Raises RunError if it cannot, CacheError if the stored features are of another encoder with the same name.
        """

    def counterpart(self, modality: str) -> str:
        """Return the modality that a query of ``modality`` searches. Raises RunError if the space lacks the query's."""


class AlignedSpace:
    """The space of an alignment. With two text encoders, the first embeds queries and the second is searched."""

    unit = True

    def __init__(self, run: Alignment, device: str = "auto"):
        self.run, self.name = run, run.name
        self._device = resolve_device(device)
        self._towers: dict[str, Tower] = {}

    def embed(self, modality: str, samples: Sequence[Any]) -> Tensor:
        self.counterpart(modality)
        if modality not in self._towers:
            side = next(i for i, about in enumerate(self.run.sides) if about.modality == modality)
            self._towers |= open_encoder(side_spec(self.run, side), self._device)
        return encode_samples(self._towers[modality], samples)

    def stored(self, store: FeatureStore, modality: str, on_rows: OnRows = silent) -> Features:
        sides = [i for i, about in enumerate(self.run.sides) if about.modality == modality]
        if not sides:
            raise RunError(f"alignment {self.name} has no {modality} side; it reads {self._sides}")
        return aligned_features(self.run, sides[-1], store, device=self._device, on_rows=on_rows)

    def counterpart(self, modality: str) -> str:
        modalities = [side.modality for side in self.run.sides]
        if modality not in modalities:
            raise RunError(f"alignment {self.name} has no {modality} side; it reads {self._sides}")
        return modalities[1 - modalities.index(modality)]

    @property
    def _sides(self) -> str:
        return " and ".join(f"{side.encoder} ({side.modality})" for side in self.run.sides)


class EncoderSpace:
    """The space of one encoder with two towers, such as the image and the text tower of ``clip:ViT-B-32``."""

    unit = False

    def __init__(self, spec: str, device: str = "auto"):
        self._spec = EncoderSpec.parse(spec).absolute()
        self.name = self._spec.short
        self._towers = open_encoder(self._spec, resolve_device(device), whole=True)  # ``stored`` compares the keys
        widths = {tower.width for tower in self._towers.values()}
        if len(self._towers) != 2 or len(widths) != 1:
            raise EncoderError(
                f"{self.name} has no common space of images and texts; align it with another encoder: cachefuse align"
            )

    def embed(self, modality: str, samples: Sequence[Any]) -> Tensor:
        return encode_samples(self._tower(modality), samples)

    def stored(self, store: FeatureStore, modality: str, on_rows: OnRows = silent) -> Features:
        features = store.open_features(self.name, modality)
        if features is None or "pooled" not in features.views:
            raise RunError(
                f"{store.path} has no features of {self.name} ({modality}); make them with cachefuse extract "
                f"--dataset {store.dataset} --encoder {self._spec}"
            )
        provenance = {**self._tower(modality).provenance, "dtype": features.provenance["dtype"]}
        store.check_same(features, provenance, {})
        return features

    def counterpart(self, modality: str) -> str:
        self._tower(modality)
        return next(other for other in self._towers if other != modality)

    def _tower(self, modality: str) -> Tower:
        if modality not in self._towers:
            raise RunError(f"{self.name} has no {modality} side; it encodes {' and '.join(self._towers)}")
        return self._towers[modality]


def encode_samples(tower: Tower, samples: Sequence[Any]) -> Tensor:
    """Return pooled features (n, W) of raw samples. Raises BadSampleError, naming the sample, for an unusable one."""
    prepared = [prepare_source(tower, sample) for sample in samples]
    for sample, item in zip(samples, prepared, strict=True):
        if is_bad(item):
            name = repr(sample[:NAME_LENGTH]) if isinstance(sample, str) else sample.name
            raise BadSampleError(f"{name}: {item}")
    long = count_long_texts(tower, prepared)
    if long is not None and long.is_cut:
        logger.warning("%s", long.message)
    rows = encode_prepared(tower, prepared, ("pooled",), BATCH)["pooled"]
    return torch.from_numpy(np.stack([row for row in rows if row is not None]))  # bad samples have raised above
