"""Frozen encoders. A family is one file and one entry here; `open_encoder` turns a spec into towers."""

from dataclasses import dataclass

from cachefuse.encoders.base import EncoderSpec, Tower
from cachefuse.registry import Registry, import_entry


@dataclass(frozen=True)
class Family:
    """A family of encoders. ``opener`` names a function (EncoderSpec, device) -> {modality: Tower}."""

    opener: str
    example: str
    modalities: str
    about: str


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
            "open_clip models; after @ a pretrained tag or a local .safetensors file",
        ),
        "hf": Family(
            "cachefuse.encoders.hf:open_hf",
            "hf:bert-base-uncased",
            "image or text",
            "transformers models by hub name or local folder; after @ a revision",
        ),
        "timm": Family(
            "cachefuse.encoders.vit:open_timm",
            "timm:vit_base_patch16_224",
            "image",
            "timm models; after @ a local .safetensors file",
        ),
    },
    has=("opener", "example", "modalities", "about"),
)
DEFAULT_ENCODER = FAMILIES["clip"].example


def open_encoder(spec: str | EncoderSpec, device: str = "cpu") -> dict[str, Tower]:
    """Open ``family:model[@weights]`` on a device and return its towers by modality.

    Raises UnknownNameError for an unknown family, EncoderError if the model or its weights are not available.
    """
    spec = EncoderSpec.parse(spec) if isinstance(spec, str) else spec
    towers: dict[str, Tower] = import_entry(FAMILIES[spec.family].opener)(spec, device)
    return towers
