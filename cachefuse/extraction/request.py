"""A request for an extraction: dataset, towers, views. It is checked before any work begins."""

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from cachefuse.data.dataset import Dataset
from cachefuse.device import resolve_device
from cachefuse.encoders import NO_OPTIONS, open_encoder
from cachefuse.encoders.base import EncoderSpec, Tower
from cachefuse.errors import ConfigError, EncoderError
from cachefuse.feature_spec import IDS, NGRAMS, NUMBERED
from cachefuse.files import slug
from cachefuse.store.format import FEATURE_DTYPES, VIEWS

logger = logging.getLogger(__name__)


MADE_BY = {
    IDS: "only text encoders of transformers have token ids, such as hf:bert-base-uncased",
    NGRAMS: "the encoder of n-grams is called lexical; it encodes text",
}
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
        """Return the views that a tower stores, with the dtype of each."""
        return {view: _stored_dtype(view, self.dtype) for view in _stored_views(tower, self.views)}

    def provenance(self, tower: Tower) -> dict[str, str]:
        """Return everything that a tower's features depend on. Quantised tokens and float16 views share one key."""
        return {**tower.provenance, "dtype": "float32" if self.dtype == "float32" else "float16"}


def _stored_views(tower: Tower, views: Sequence[str]) -> list[str]:
    """Return the requested views that a tower has. One that has n-grams alone stores them, whatever the views."""
    return [NGRAMS] if tower.views == (NGRAMS,) else [view for view in views if view in tower.views]


def _stored_dtype(view: str, dtype: str) -> str:
    """Return the dtype in which a view is stored: only tokens are quantised, whole numbers are always int32."""
    if view in NUMBERED:
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

    ``options`` are for the encoders that have them. Only some text encoders have ids or n-grams; an encoder without any
    requested view is skipped. An encoder with n-grams alone stores them, whatever the views. With dtype int8, pooled
    features are float16: they are small. Raises EncoderError if an encoder has no modality of the dataset. Raises
    ConfigError if one lacks a view other than ids and n-grams, if none has requested ids, n-grams or one of the
    options, or if two would be stored under one name.
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
            missing = [view for view in views if view not in (*tower.views, *NUMBERED)]
            if missing and tower.views != (NGRAMS,):
                known = ", ".join(tower.views)
                raise ConfigError(f"encoder {spec} has no {missing[0]} view of {tower.modality}; choose from: {known}")
        towers += [(spec, tower) for tower in usable if _stored_views(tower, views)]
    for name in options:
        if not any(name in tower.options for _, by_modality in opened for tower in by_modality.values()):
            raise ConfigError(f"{' and '.join(map(str, specs))} has no option {name}; leave it out")
    _check_names(names)
    _check_numbered(names, towers, views)
    return Request(
        dataset, tuple(towers), tuple(dict.fromkeys(views)), dtype, batch_size or BATCH_SIZE[device.partition(":")[0]]
    )


def _check_numbered(
    specs: Iterable[EncoderSpec], towers: Sequence[tuple[EncoderSpec, Tower]], views: Sequence[str]
) -> None:
    """Raise ConfigError if no tower has requested ids or n-grams. Warn of encoders that are skipped."""
    for view, others in MADE_BY.items():
        if view in views and not any(view in tower.views for _, tower in towers):
            raise ConfigError(f"{' or '.join(map(str, specs))} has no {view} view; {others}")
    for spec in specs:
        if spec not in [used for used, _ in towers]:
            logger.warning("%s is skipped: it has no %s, and no other view is requested", spec, " or ".join(views))


def _check_names(specs: Sequence[EncoderSpec]) -> None:
    folders = [slug(spec.short) for spec in specs]
    for spec, folder in zip(specs, folders, strict=True):
        if folders.count(folder) > 1:
            raise ConfigError(
                f"two encoders would both be stored as {spec.short}; rename one, or use another --workspace"
            )
