"""Load transformers models: one part a modality, and what its forward pass gives."""

import copy
import inspect
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from torch import Tensor, nn
from transformers import MODEL_MAPPING, AutoModel, PretrainedConfig

from cachefuse.encoders.base import EncoderSpec
from cachefuse.errors import EncoderError

# Inputs that say that a model is not of texts alone, or not of images alone. Libraries fill some in with zeros.
OTHERS = {
    "bbox": "the boxes of words",
    "image": "an image beside the text",
    "pixel_values": "an image beside the text",
    "pixel_values_videos": "a video",
    "pixel_attention_mask": "patches of images that keep their shape",
    "input_features": "audio",
    "input_values": "audio",
    "input_ids": "a text beside the image",
    "visual_embeds": "image features beside the text",
    "visual_feats": "image features beside the text",
    "xpath_tags_seq": "the tags of a page",
}


LAYER = re.compile(r"\.\d+")  # the number of a layer in the name of a weight


class Outputs(NamedTuple):
    """What a model gives for B samples."""

    hidden: Tensor  # last_hidden_state: (B, T, D), or (B, D, H, W) of a CNN
    pooler: Tensor | None  # pooler_output, (B, D)
    shared: Tensor | None = None  # in the space that images and texts share, (B, D)


@dataclass
class Part:
    """The part of a model for one modality."""

    model: nn.Module
    config: PretrainedConfig
    outputs: Callable[..., Outputs]  # takes inputs by name, those in ``accepts``
    accepts: Collection[str]
    has_pooler: bool = True  # False if the model has a pooler that its weights lack

    def drop_pooler(self) -> None:
        """Remove a pooler with weights of its own: features that do not use it do not depend on it."""
        pooler = getattr(self.model, "pooler", None)
        if isinstance(pooler, nn.Module) and any(True for _ in pooler.parameters()):
            self.model.pooler = nn.Identity()


def load_parts(
    spec: EncoderSpec, folder: Path, config: PretrainedConfig, offline: Mapping[str, bool]
) -> dict[str, Part]:
    """Load a model in float32 and return its parts by modality: image, text or both.

    Raises EncoderError for a model of other inputs, or if weights are missing.
    """
    kind: Any = MODEL_MAPPING.get(type(config), None)
    loader: Any = AutoModel
    named = str((config.architectures or [""])[0])
    if isinstance(kind, tuple):  # Funnel with and without its decoder
        kind = next((one for one in kind if one.__name__ == named), kind[0])
    # AutoModel lacks some models, and would leave the projection of others out.
    if (kind is None or named.endswith("WithProjection")) and hasattr(transformers, named):
        kind = loader = getattr(transformers, named)
    dual = all(hasattr(kind, f"get_{modality}_features") for modality in ("image", "text"))
    if dual:
        for takes, features in (("pixel_values", kind.get_image_features), ("input_ids", kind.get_text_features)):
            _refuse_others(f"{spec} ({config.model_type})", _parameters(features) - {takes})
    modality = "" if dual else _modality(spec, config, kind)
    if "noise" in _parameters(getattr(kind, "forward", None)):
        config.mask_ratio = 0.0  # masked autoencoders hide patches at random, but when they are fine-tuned
    model, report = loader.from_pretrained(
        folder,
        config=config,
        dtype=torch.float32,
        use_safetensors=True,
        output_loading_info=True,
        ignore_mismatched_sizes=True,  # refused below: the library's error leaves them to a report that it prints
        **offline,
    )
    _refuse_other_sizes(spec, report["mismatched_keys"])
    _refuse_more(spec, model, report["unexpected_keys"])
    unused: tuple[str, ...] = ("pooler.",)  # weights often lack it
    if not dual and hasattr(model, "encoder") and hasattr(model, "decoder"):
        encoder = model.get_encoder() if hasattr(model, "get_encoder") else model.encoder
        if kind.main_input_name in _parameters(encoder.forward):  # Funnel's decoder is a part of its encoder
            model, unused = encoder, (*unused, "decoder.")
        elif modality == "image":
            raise EncoderError(
                f"{spec} ({config.model_type}) decodes objects, not patches; hf opens encoders of images"
            )
    missing = sorted(key for key in report["missing_keys"] if not key.startswith(unused))
    if missing:
        raise EncoderError(f"cannot open {spec}: {len(missing)} weights of the model are missing, such as {missing[0]}")
    if dual:
        return {modality: _side(spec, model, config, modality) for modality in ("image", "text")}
    has_pooler = not any(key.startswith("pooler.") for key in report["missing_keys"])
    return {modality: Part(model, config, _plain(model), _parameters(model.forward), has_pooler)}


def _refuse_other_sizes(spec: EncoderSpec, mismatched: Collection[Any]) -> None:
    """Refuse weights of other sizes than config.json has. The library reports names and shapes, or names alone."""
    for name, *shapes in sorted([key] if isinstance(key, str) else [*key] for key in mismatched):
        file, model = [" x ".join(map(str, shape)) for shape in shapes] or ["of one size", "of another"]
        raise EncoderError(
            f"cannot open {spec}: its weights are of other sizes than its config.json: {name} is {file} in the file, "
            f"and {model} in the model; put the config.json of the weights there"
        )


def _refuse_more(spec: EncoderSpec, model: Any, unexpected: Collection[str]) -> None:
    """Refuse weights of more layers than config.json has. Others that are left over are of heads."""
    known = {LAYER.sub(".*", name) for name, _ in model.named_parameters()}
    for key in sorted(unexpected):
        if LAYER.sub(".*", key.removeprefix(f"{model.base_model_prefix}.")) in known:
            raise EncoderError(f"cannot open {spec}: its weights have more layers than its config.json, such as {key}")


def _modality(spec: EncoderSpec, config: PretrainedConfig, kind: Any) -> str:
    """Return the modality of a model that has one. Raises EncoderError for one of another, or of several."""
    name = f"{spec} ({config.model_type})"
    if hasattr(config, "text_config") and hasattr(config, "vision_config"):
        raise EncoderError(f"{name} is an image-text model; hf opens those that encode each on its own, as CLIP does")
    takes = "a video" if hasattr(config, "num_frames") else getattr(kind, "main_input_name", "nothing known")
    if takes not in ("pixel_values", "input_ids"):
        raise EncoderError(f"{name} takes {takes}; expected an image or a text model")
    _refuse_others(name, _parameters(kind.forward) - {takes})
    return "image" if takes == "pixel_values" else "text"


def _refuse_others(name: str, parameters: Collection[str]) -> None:
    for other in parameters:
        if other in OTHERS:
            raise EncoderError(f"{name} also takes {other}, {OTHERS[other]}; expected a model of images or texts alone")


def _side(spec: EncoderSpec, model: Any, config: PretrainedConfig, modality: str) -> Part:
    """Return one side of a dual encoder, with the weights that the other side does not use."""
    stem, others = ("vision", ("text",)) if modality == "image" else ("text", ("vision", "visual", "image"))
    backbone, own_config = getattr(model, f"{stem}_model", None), getattr(config, f"{stem}_config", None)
    if backbone is None or own_config is None:
        name = f"{spec} ({config.model_type})"
        raise EncoderError(f"{name} is an image-text model; hf opens those that encode each on its own, as CLIP does")
    features = getattr(model, f"get_{modality}_features")
    side = copy.copy(model)
    side._modules = {key: module for key, module in model._modules.items() if not key.startswith(others)}
    side._parameters = {}  # the temperature of the loss
    return Part(side, own_config, _dual(features, backbone), _parameters(features))


def _plain(model: Any) -> Callable[..., Outputs]:
    """Return the forward pass of a model of one modality."""
    masked = model.config.model_type == "vit_mae"

    def outputs(**inputs: Tensor) -> Outputs:
        if masked:  # without masking, patches would still be shuffled, by the order of their noise
            images, size = inputs["pixel_values"], model.config.patch_size
            n_patches = (images.shape[-2] // size) * (images.shape[-1] // size)
            inputs["noise"] = torch.arange(n_patches, device=images.device).float().expand(len(images), n_patches)
        out = model(**inputs)
        shared = getattr(out, "image_embeds", None)
        return Outputs(
            out.last_hidden_state, _vectors(out), getattr(out, "text_embeds", None) if shared is None else shared
        )

    return outputs


def _dual(features: Callable[..., Any], backbone: nn.Module) -> Callable[..., Outputs]:
    """Return the forward pass of one side of a dual encoder: ``features``, the library's own, runs ``backbone``."""
    kept: list[tuple[Tensor, Tensor | None]] = []
    # transformers 5 returns the backbone's output with another pooler_output, 4 a tensor. The hook sees it before that.
    backbone.register_forward_hook(lambda module, inputs, out: kept.append((out.last_hidden_state, _vectors(out))))

    def outputs(**inputs: Tensor) -> Outputs:
        kept.clear()
        shared = features(**inputs)
        hidden, pooler = kept.pop()
        return Outputs(hidden, pooler, shared if isinstance(shared, Tensor) else shared.pooler_output)

    return outputs


def _vectors(out: Any) -> Tensor | None:
    """Return pooler_output as (B, D), if it is a vector."""
    pooler: Tensor | None = getattr(out, "pooler_output", None)
    if pooler is None or pooler.shape[2:].numel() != 1:  # some are maps of several places
        return None
    return pooler.flatten(1)


def _parameters(function: Callable[..., Any] | None) -> set[str]:
    return set() if function is None else set(inspect.signature(function).parameters)
