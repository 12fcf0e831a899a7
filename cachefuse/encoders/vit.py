"""timm image models: vision transformers and convolutional networks."""

import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import timm
from safetensors import safe_open
from timm.data.config import resolve_model_data_config
from timm.data.transforms_factory import create_transform
from timm.models import PretrainedCfg
from torch import Tensor, nn

from cachefuse.encoders.base import EncoderSpec, Tower
from cachefuse.encoders.frozen import fetch, fingerprint, flatten_map, library, local_weights, opening, weights_digest
from cachefuse.encoders.images import ImageTower, split_compose
from cachefuse.errors import EncoderError


class TimmTower(ImageTower):
    """Pooled: the classifier's input. Tokens: patches without class and register tokens, or the feature map."""

    def __init__(self, model: nn.Module, device: str, provenance: Mapping[str, str]):
        data = resolve_model_data_config(model)
        transform = create_transform(**data, is_training=False)
        facts = {**provenance, "preprocessing": f"timm {fingerprint(data)}"}
        super().__init__(model, device, facts, transform, split_compose(transform))

    def forward(self, batch: Sequence[Tensor], tokens: bool) -> tuple[Tensor, Tensor | None]:
        features = self.model.forward_features(self.stack(batch))
        pooled = self.model.forward_head(features, pre_logits=True)  # (B, D)
        if not isinstance(features, Tensor):  # a few models return several scales, not one grid
            return pooled, None
        if features.ndim == 4:
            return pooled, flatten_map(features, channels_last=getattr(self.model, "output_fmt", "NCHW") == "NHWC")
        return pooled, features[:, getattr(self.model, "num_prefix_tokens", 0) :]


def open_timm(spec: EncoderSpec, device: str) -> dict[str, Tower]:
    """Open ``timm:name`` with the hub's weights, or ``timm:name@./file.safetensors``, as one image tower.

    Raises EncoderError for an unknown name, with similar ones, and for weights that are missing or do not fit.
    """
    _check_name(spec)
    with opening(spec):
        default = timm.get_pretrained_cfg(spec.model)
        assert default is not None, "the name is known"
        path = local_weights(spec)
        n_classes = default.num_classes
        if path is None:
            path = _from_hub(spec, default)
        else:
            n_classes = _n_classes(path, default.classifier)
        # Strict loading needs the right number of classes; the classifier is removed afterwards.
        overlay = {"file": str(path), "custom_load": False, "num_classes": n_classes}
        model: Any = timm.create_model(
            spec.model, pretrained=True, num_classes=n_classes, pretrained_cfg_overlay=overlay
        )
        model.reset_classifier(0)
        provenance = {
            "family": "timm",
            "architecture": default.architecture or "",
            "weights": weights_digest(model),
            "pooling": "the model's own, before its classifier",
            "library": library(timm),
        }
        return {"image": TimmTower(model, device, provenance).probe()}


def _check_name(spec: EncoderSpec) -> None:
    name, _, tag = spec.model.partition(".")
    if timm.is_model(name) and (not tag or spec.model in timm.list_pretrained(f"{name}.*")):
        return
    choices = timm.list_pretrained(f"{name}.*") if timm.is_model(name) else timm.list_models()
    close = difflib.get_close_matches(spec.model, choices, n=3) or choices[:3]
    raise EncoderError(f"unknown timm model {spec.model!r}; did you mean {', '.join(close)}?")


def _from_hub(spec: EncoderSpec, default: PretrainedCfg) -> Path:
    if spec.weights:
        raise EncoderError(
            f"cannot open {spec}: {spec.weights!r} is not a .safetensors file; write a tag as timm:name.tag"
        )
    if not default.hf_hub_id:
        raise EncoderError(
            f"timm has no pretrained weights for {spec.model}; give a file: {spec.model}@./w.safetensors"
        )
    name = Path(default.hf_hub_filename or "model").with_suffix(".safetensors").name
    path = fetch(spec, default.hf_hub_id, [name]) / name
    if not path.is_file():
        raise EncoderError(f"cannot open {spec}: {default.hf_hub_id} has no {name}; other formats are not safe to load")
    return path


def _n_classes(path: Path, classifier: str | Sequence[str] | None) -> int:
    """Return the number of classes of a weights file; 0 if it has no classifier."""
    first = classifier if isinstance(classifier, str) else (classifier or ("",))[0]
    with safe_open(path, "pt") as file:
        return file.get_slice(f"{first}.weight").get_shape()[0] if f"{first}.weight" in set(file.keys()) else 0
