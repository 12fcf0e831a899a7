"""A request for an extraction: dataset, towers, views. It is checked before any work begins."""

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from cachefuse.data.dataset import Dataset
from cachefuse.device import resolve_device
from cachefuse.encoders import NO_OPTIONS, open_encoder
from cachefuse.encoders.base import EncoderSpec, Tower
from cachefuse.errors import ConfigError, EncoderError
from cachefuse.feature_spec import IDS
from cachefuse.files import slug
from cachefuse.store.format import FEATURE_DTYPES, VIEWS

logger = logging.getLogger(__name__)


BATCH_SIZE = {"cpu": 32, "cuda": 256}


@dataclass(frozen=True)
class Request:
    """A dataset, the towers that encode it, the views to store, their dtype, and samples per batch."""

    dataset: Dataset
    towers: tuple[tuple[EncoderSpec, Tower], ...]
    views: tuple[str, ...]
    dtype: str
    batch_size: int

    def dtypes(self, tower: Tower) -> dict[str, str]:
        """Return the requested views that a tower has, with the dtype in which each is stored."""
        return {view: _stored_dtype(view, self.dtype) for view in self.views if view in tower.views}

    def provenance(self, tower: Tower) -> dict[str, str]:
        """Return everything that a tower's features depend on. Quantised tokens and float16 views share one key."""
        return {**tower.provenance, "dtype": "float32" if self.dtype == "float32" else "float16"}


def _stored_dtype(view: str, dtype: str) -> str:
    """Return the dtype in which a view is stored: only tokens are quantised, and ids are always int32."""
    if view == IDS:
        return "int32"
    return "float16" if dtype == "int8" and view != "tokens" else dtype


def check_options(encoders: Sequence[str], views: Sequence[str], batch_size: int | None, dtype: str) -> None:
    """Raise ConfigError for options that are not valid, before any model is opened."""
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
    dataset: Dataset,
    encoders: Sequence[str],
    views: Sequence[str],
    device: str,
    batch_size: int | None,
    dtype: str,
    options: Mapping[str, str] = NO_OPTIONS,
) -> Request:
    """Open each encoder once, on "auto" or a named device.

    ``options`` are for the encoders that have them. Only some text encoders have ids; an encoder without any requested
    view is skipped. With dtype int8, pooled features are float16: they are small. Raises EncoderError if an encoder has
    no modality of the dataset. Raises ConfigError if one lacks a view other than ids, if none has requested ids or one
    of the options, or if two would be stored under one name.
    """
    check_options(encoders, views, batch_size, dtype)
    device = resolve_device(device)
    specs = dict.fromkeys(EncoderSpec.parse(text).absolute() for text in encoders)
    opened = [(spec, open_encoder(spec, device, options)) for spec in specs]
    towers: list[tuple[EncoderSpec, Tower]] = []
    names: list[EncoderSpec] = []  # the specs with the options that they use
    for spec, by_modality in opened:
        usable = [by_modality[modality] for modality in dataset.modalities if modality in by_modality]
        if not usable:
            raise EncoderError(
                f"encoder {spec} encodes {' and '.join(by_modality)}, but {dataset.name} has only "
                f"{' and '.join(dataset.modalities) or 'labels'}"
            )
        used = {name for tower in usable for name in tower.options} & options.keys()
        names.append(spec := spec.with_options({name: options[name] for name in used}))
        for tower in usable:
            missing = [view for view in views if view not in tower.views and view != IDS]
            if missing:
                known = ", ".join(tower.views)
                raise ConfigError(f"encoder {spec} has no {missing[0]} view of {tower.modality}; choose from: {known}")
        towers += [(spec, tower) for tower in usable if set(views) & set(tower.views)]
    for name in options:
        if not any(name in tower.options for _, by_modality in opened for tower in by_modality.values()):
            raise ConfigError(f"{' and '.join(map(str, specs))} has no option {name}; leave it out")
    _check_names(names)
    _check_ids(names, towers, views)
    return Request(
        dataset, tuple(towers), tuple(dict.fromkeys(views)), dtype, batch_size or BATCH_SIZE[device.partition(":")[0]]
    )


def _check_ids(specs: Iterable[EncoderSpec], towers: Sequence[tuple[EncoderSpec, Tower]], views: Sequence[str]) -> None:
    """Raise ConfigError if no tower has the requested ids. Warn of encoders that are skipped."""
    if IDS in views and not any(IDS in tower.views for _, tower in towers):
        raise ConfigError(
            f"{' or '.join(map(str, specs))} has no ids view; only text encoders of transformers have token ids, "
            f"such as hf:bert-base-uncased"
        )
    for spec in specs:
        if spec not in [used for used, _ in towers]:
            logger.warning("%s is skipped: it has no token ids, and no other view is requested", spec)


def _check_names(specs: Sequence[EncoderSpec]) -> None:
    folders = [slug(spec.short) for spec in specs]
    for spec, folder in zip(specs, folders, strict=True):
        if folders.count(folder) > 1:
            raise ConfigError(
                f"two encoders would both be stored as {spec.short}; rename one, or use another --workspace"
            )
