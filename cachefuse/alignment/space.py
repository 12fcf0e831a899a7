"""Where images and texts can be compared: the space of an alignment, or of an encoder that has both, such as CLIP."""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from cachefuse.alignment.run import Alignment
from cachefuse.alignment.tower import aligned_features, side_spec
from cachefuse.device import resolve_device
from cachefuse.encoders import open_encoder
from cachefuse.encoders.base import EncoderSpec, Tower
from cachefuse.errors import BadSampleError, EncoderError, RunError
from cachefuse.extraction.pipeline import encode_prepared, is_bad, prepare_source
from cachefuse.store.features import Features
from cachefuse.store.store import FeatureStore

BATCH = 32

OnRows = Callable[[int, int], None]


def silent(done: int, total: int) -> None:
    pass


class Space(Protocol):
    """Embeds samples, and finds a store's own embeddings; ``unit`` says that the latter have length 1."""

    name: str
    unit: bool

    def embed(self, modality: str, samples: Sequence[Any]) -> Tensor:
        """Return vectors (n, W) of raw images (sources) or texts. Raises BadSampleError for one that can't be used."""

    def stored(self, store: FeatureStore, modality: str, on_rows: OnRows = silent) -> Features:
        """Return a store's pooled features in this space, made now where they can be.

        Raises RunError if they can't, CacheError if they were made by something else of that name.
        """

    def counterpart(self, modality: str) -> str:
        """Return the modality to look for with a query of one. Raises RunError for one that is not in this space."""


class AlignedSpace:
    """The space of an alignment. Of two text encoders, the first takes queries and the second is searched."""

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
        found = [i for i, about in enumerate(self.run.sides) if about.modality == modality]
        if not found:
            raise RunError(f"alignment {self.name} has no {modality} side; it reads {self._sides}")
        return aligned_features(self.run, found[-1], store, device=self._device, on_rows=on_rows)

    def counterpart(self, modality: str) -> str:
        modalities = [side.modality for side in self.run.sides]
        if modality not in modalities:
            raise RunError(f"alignment {self.name} has no {modality} side; it reads {self._sides}")
        return modalities[1 - modalities.index(modality)]

    @property
    def _sides(self) -> str:
        return " and ".join(f"{side.encoder} ({side.modality})" for side in self.run.sides)


class EncoderSpace:
    """The space of one encoder with two towers, such as those for images and texts of ``clip:ViT-B-32``."""

    unit = False

    def __init__(self, spec: str, device: str = "auto"):
        self._spec = EncoderSpec.parse(spec).absolute()
        self.name = self._spec.short
        self._towers = open_encoder(self._spec, resolve_device(device))
        widths = {tower.width for tower in self._towers.values()}
        if len(self._towers) != 2 or len(widths) != 1:
            raise EncoderError(
                f"{self.name} has no space that images and texts share; align it with another: cachefuse align"
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
    """Return pooled features (n, W) of raw samples. Raises BadSampleError, naming it, for one that can't be used."""
    prepared = [prepare_source(tower, sample) for sample in samples]
    for sample, item in zip(samples, prepared, strict=True):
        if is_bad(item):
            name = getattr(sample, "name", repr(sample))
            raise BadSampleError(f"{name}: {item}")
    rows = encode_prepared(tower, prepared, ("pooled",), BATCH)["pooled"]
    return torch.from_numpy(np.stack([row for row in rows if row is not None]))  # none is bad by now
