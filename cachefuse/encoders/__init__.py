"""Frozen encoders. A family is one file and one entry here; `open_encoder` turns a spec into towers."""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from cachefuse.encoders.base import EncoderSpec, Tower
from cachefuse.errors import EncoderError
from cachefuse.registry import Registry, import_entry

# The values of an encoder's options, as in hf:bert-base-uncased,pooling=cls. None: any; a number: at least this.
OPTIONS: Mapping[str, tuple[str, ...] | int | None] = {
    "pooling": ("cls", "mean", "pooler", "last"),
    "max_tokens": 1,
    "long_texts": ("cut", "windows"),
    "preprocess": None,
}
NO_OPTIONS: Mapping[str, str] = MappingProxyType({})


@dataclass(frozen=True)
class Family:
    """A family of encoders. ``opener`` names a function (EncoderSpec, device) -> {modality: Tower}.

    ``options`` are the names of what a spec may say after its weights. An opener reads them by ``spec.option``.
    """

    opener: str
    example: str
    modalities: str
    about: str
    options: tuple[str, ...] = ()


FAMILIES: Registry[Family] = Registry(
    "encoder family",
    "cachefuse.encoders",
    {
        "classic": Family(
            "cachefuse.encoders.classic:open_classic",
            "classic",
            "image, text",
            "histograms and hashed n-grams: no weights, fast, works everywhere",
        ),
        "clip": Family(
            "cachefuse.encoders.clip:open_clip_towers",
            "clip:ViT-B-32@laion2b_s34b_b79k",
            "image, text",
            "open_clip models; after @ a pretrained tag or a local .safetensors file, with ,preprocess=TAG if need be",
            options=("max_tokens", "long_texts", "preprocess"),
        ),
        "hf": Family(
            "cachefuse.encoders.hf:open_hf",
            "hf:bert-base-uncased",
            "image, text",
            "transformers models by hub name or local folder; after @ a revision",
            options=("pooling", "max_tokens", "long_texts"),
        ),
        "lexical": Family(
            "cachefuse.encoders.lexical:open_lexical",
            "lexical",
            "text",
            "counts of words and n-grams of characters: sparse, no weights, for heads that read ngrams",
        ),
        "timm": Family(
            "cachefuse.encoders.vit:open_timm",
            "timm:vit_base_patch16_224",
            "image",
            "timm models, as name or name.tag; after @ a local .safetensors file",
        ),
    },
    has=("opener", "example", "modalities", "about"),
)
LEXICAL = "lexical"
DEFAULT_ENCODER = FAMILIES["clip"].example


def open_encoder(
    spec: str | EncoderSpec, device: str = "cpu", options: Mapping[str, str] = NO_OPTIONS, *, whole: bool = False
) -> dict[str, Tower]:
    """Open ``family:model[@weights][,option=value ...]`` on a device and return its towers by modality.

    ``options`` are values for options that the spec leaves open; those that its towers do not have are ignored. Unless
    it is known to be ``whole``, as one that features were made with, the encoder is tried on a dozen samples. Raises
    UnknownNameError for an unknown family, EncoderError for an option or value of the spec that the encoder does not
    have, or if the model or its weights are not available.
    """
    spec = EncoderSpec.parse(spec) if isinstance(spec, str) else spec
    family = FAMILIES[spec.family]
    for name, value in (*spec.options, *options.items()):
        check_option(name, value)
    for name, _ in spec.options:
        if name not in family.options:
            known = f"choose from: {', '.join(family.options)}" if family.options else "it has none"
            raise EncoderError(f"cannot open {spec}: {spec.family} has no option {name}; {known}")
    open_options = {name: value for name, value in options.items() if name in family.options}
    towers: dict[str, Tower] = import_entry(family.opener)(spec.with_options(open_options), device)
    for name, _ in spec.options:
        if not any(name in tower.options for tower in towers.values()):
            raise EncoderError(f"cannot open {spec}: {name} is not for {' and '.join(towers)}; leave it out")
    for tower in () if whole else towers.values():
        tower.check_whole()
    return towers


def check_option(name: str, value: str) -> None:
    """Raise EncoderError for a value that an option does not have."""
    match OPTIONS.get(name):
        case int(least) if not (value.isascii() and value.isdecimal()) or int(value) < least:
            raise EncoderError(f"{name} must be a number, at least {least}. Got {value!r} instead")
        case tuple(choices) if value not in choices:
            raise EncoderError(f"{name} must be one of {', '.join(choices)}. Got {value!r} instead")
