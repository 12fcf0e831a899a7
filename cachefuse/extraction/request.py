"""What is asked of an extraction: a dataset, its towers, the views to make of each; checked before anything is done."""

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from cachefuse.data.dataset import Dataset
from cachefuse.device import resolve_device
from cachefuse.encoders import open_encoder
from cachefuse.encoders.base import EncoderSpec, Tower
from cachefuse.errors import ConfigError, EncoderError
from cachefuse.feature_spec import IDS
from cachefuse.files import slug
from cachefuse.store.format import FEATURE_DTYPES, VIEWS

logger = logging.getLogger(__name__)


BATCH_SIZE = {"cpu": 32, "cuda": 256}


@dataclass(frozen=True)
class Request:
    """A dataset, the towers to pass it through, the views to keep, their dtype, and samples a batch."""

    dataset: Dataset
    towers: tuple[tuple[EncoderSpec, Tower], ...]
    views: tuple[str, ...]
    dtype: str
    batch_size: int

    def dtypes(self, tower: Tower) -> dict[str, str]:
        """Return the views to make by a tower, those of all that it has, and the dtype that each is kept in."""
        return {view: _kept_dtype(view, self.dtype) for view in self.views if view in tower.views}

    def provenance(self, tower: Tower) -> dict[str, str]:
        """Return what a tower's features depend on. Quantised tokens stand beside float16 ones: same key."""
        return {**tower.provenance, "dtype": "float32" if self.dtype == "float32" else "float16"}


def _kept_dtype(view: str, dtype: str) -> str:
    """Return what a view is kept in: only tokens are quantised, and ids are whole numbers whatever is asked for."""
    if view == IDS:
        return "int32"
    return "float16" if dtype == "int8" and view != "tokens" else dtype


def check_options(encoders: Sequence[str], views: Sequence[str], batch_size: int | None, dtype: str) -> None:
    """Raise ConfigError for what can't be asked for, before any model is opened."""
    if not encoders:
        raise ConfigError("extract needs at least one encoder")
    unknown = [view for view in views if view not in VIEWS]
    if unknown or not views:
        raise ConfigError(f"unknown view {unknown[0] if unknown else ''!r}; choose from: {', '.join(VIEWS)}")
    if batch_size is not None and batch_size < 1:
        raise ConfigError(f"batch size must be at least 1. Got {batch_size} instead")
    if dtype not in FEATURE_DTYPES:
        raise ConfigError(f"unknown dtype {dtype!r}; choose from: {', '.join(FEATURE_DTYPES)}")
    if dtype == "int8" and "tokens" not in views:
        raise ConfigError("dtype int8 is for tokens; add --views tokens, or pooled,tokens")


def open_request(
    dataset: Dataset, encoders: Sequence[str], views: Sequence[str], device: str, batch_size: int | None, dtype: str
) -> Request:
    """Open the encoders, each once, on "auto" or a named device.

    Ids are made by those that have them, which images have not; an encoder that is left with nothing to make is left
    out. Raises EncoderError if one encodes nothing that the dataset has, ConfigError if one can't give another view,
    none has ids that are asked for, or two would be kept under one name. With dtype int8 the pooled features, which are
    few, are float16.
    """
    check_options(encoders, views, batch_size, dtype)
    device = resolve_device(device)
    specs = dict.fromkeys(EncoderSpec.parse(text).absolute() for text in encoders)
    opened = [(spec, open_encoder(spec, device)) for spec in specs]
    _check_names([spec for spec, _ in opened])
    towers: list[tuple[EncoderSpec, Tower]] = []
    for spec, by_modality in opened:
        usable = [by_modality[modality] for modality in dataset.modalities if modality in by_modality]
        if not usable:
            raise EncoderError(
                f"encoder {spec} encodes {' and '.join(by_modality)}, but {dataset.name} has only "
                f"{' and '.join(dataset.modalities) or 'labels'}"
            )
        for tower in usable:
            lacking = [view for view in views if view not in tower.views and view != IDS]
            if lacking:
                known = ", ".join(tower.views)
                raise ConfigError(f"encoder {spec} has no {lacking[0]} view of {tower.modality}; choose from: {known}")
        towers += [(spec, tower) for tower in usable if set(views) & set(tower.views)]
    _check_ids(specs, towers, views)
    return Request(
        dataset, tuple(towers), tuple(dict.fromkeys(views)), dtype, batch_size or BATCH_SIZE[device.partition(":")[0]]
    )


def _check_ids(specs: Iterable[EncoderSpec], towers: Sequence[tuple[EncoderSpec, Tower]], views: Sequence[str]) -> None:
    """Raise ConfigError if ids are asked for and no tower has them; say which encoders have nothing to do."""
    if IDS in views and not any(IDS in tower.views for _, tower in towers):
        raise ConfigError(
            f"no ids view of {' or '.join(map(str, specs))}; token ids are those of a text encoder of transformers, "
            f"such as hf:bert-base-uncased"
        )
    for spec in specs:
        if spec not in [used for used, _ in towers]:
            logger.warning("%s is left out: it has no token ids, and nothing else is asked for", spec)


def _check_names(specs: Sequence[EncoderSpec]) -> None:
    folders = [slug(spec.short) for spec in specs]
    for spec, folder in zip(specs, folders, strict=True):
        if folders.count(folder) > 1:
            raise ConfigError(
                f"two encoders would both be kept as {spec.short}; rename one, or use another --workspace"
            )
