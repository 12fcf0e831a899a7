"""timm image models: vision transformers and convolutional networks."""

import difflib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import timm
from timm.data.config import resolve_model_data_config
from timm.data.transforms_factory import create_transform
from timm.models import PretrainedCfg
from torch import Tensor, nn

from cachefuse.encoders.base import EncoderSpec, Tower
from cachefuse.encoders.beside import Rule, check_sizes, check_values, is_number, numbers, one_of, pixels
from cachefuse.encoders.building import check_floats, no_larger_than
from cachefuse.encoders.frozen import fetch, fingerprint, flatten_map, library, local_weights, opening, weights_digest
from cachefuse.encoders.images import ImageTower, split_compose
from cachefuse.encoders.model_files import Shape, Weights, check_file, read_json, read_weights
from cachefuse.encoders.model_settings import check_model_settings, check_sides
from cachefuse.errors import EncoderError
from cachefuse.files import JsonObject

CONFIG = "config.json"  # of timm
TABLE, CLIP_TABLE = "pos_embed", "visual.positional_embedding"
# What of a pretrained configuration reaches the features, beside the weights.
DATA = ("input_size", "fixed_input_size", "interpolation", "crop_pct", "crop_mode", "mean", "std")
STATED = ("input_size", "interpolation", "crop_pct", "mean", "std")  # a config beside a file must have them

# What timm can do with an image. It takes any other crop_mode as "center".
RULES: dict[str, Rule] = {
    "input_size": (
        lambda size: isinstance(size, list) and len(size) == 3 and size[0] == 3 and all(type(n) is int for n in size),
        "3, height, width",
    ),
    "interpolation": one_of("nearest", "bilinear", "bicubic", "box", "hamming", "lanczos"),
    "crop_mode": one_of("center", "squash", "border"),
    "crop_pct": (lambda part: is_number(part) and part > 0, "a number above 0"),
    "mean": numbers(1, 3),
    "std": numbers(1, 3, above=0),
}

Settings: TypeAlias = tuple[JsonObject, JsonObject, str | None]
NOTHING_STATED: Settings = ({}, {}, None)


class TimmTower(ImageTower):
    """Pooled: the classifier's input. Tokens: the last layer's patches, without class and register tokens.

    They are what the model's own pooling takes: of most vision transformers after the last norm.
    """

    def __init__(self, model: nn.Module, device: str, provenance: Mapping[str, str]):
        data = resolve_model_data_config(model)
        transform = create_transform(**data, is_training=False)
        facts = {**provenance, "preprocessing": f"timm {fingerprint(data)}"}
        if not hasattr(model, "num_prefix_tokens") and _n_class_tokens(model):
            facts["tokens"] = "without class tokens"
        super().__init__(model, device, facts, transform, split_compose(transform))

    def forward(self, batch: Sequence[Tensor], tokens: bool) -> tuple[Tensor, Tensor | None]:
        features = self.model.forward_features(self.stack(batch))
        pooled = self.model.forward_head(features, pre_logits=True)  # (B, D)
        return pooled, patch_tokens(self.model, features)


def patch_tokens(model: nn.Module, features: object) -> Tensor | None:
    """Turn what a timm model's ``forward_features`` returns into patches (B, T, D), row by row.

    Returns None where there is no one grid of patches: a list of scales, or only class tokens.
    """
    if not isinstance(features, Tensor):
        return None
    if features.ndim == 4:
        return flatten_map(features, channels_last=getattr(model, "output_fmt", "NCHW") == "NHWC")
    declared = getattr(model, "num_prefix_tokens", None)
    patches = features[:, _n_class_tokens(model) if declared is None else declared :]
    return patches if patches.shape[1] else None


def _n_class_tokens(model: nn.Module) -> int:
    """Return how many class tokens a model has that does not declare its number of prefix tokens."""
    return max((p.shape[1] for name, p in model.named_parameters() if name.startswith("cls_token")), default=0)


def open_timm(spec: EncoderSpec, device: str) -> dict[str, Tower]:
    """Open ``timm:name`` with the hub's weights, or ``timm:name@./file.safetensors``, as one image tower.

    Raises EncoderError for an unknown name, with similar ones, and for weights that are missing or do not fit.
    """
    _check_name(spec)
    with opening(spec):
        default = timm.get_pretrained_cfg(spec.model)
        assert default is not None, "the name is known"
        path = local_weights(spec)
        own = path is not None  # a file of the user's
        path = path or _from_hub(spec, default)
        weights = read_weights(spec, [path])
        data, arguments, pool = _settings_of_file(spec, path.parent, weights) if own else NOTHING_STATED
        n_classes = _n_classes(weights, default.classifier) if own else default.num_classes
        # Strict loading needs the right number of classes; the classifier is removed afterwards.
        overlay = {**data, "file": str(path), "custom_load": False, "num_classes": n_classes}
        with no_larger_than(spec, weights):
            model: Any = timm.create_model(
                spec.model, pretrained=True, pretrained_cfg_overlay=overlay, **{**arguments, "num_classes": n_classes}
            )
        pools_by = getattr(model, "global_pool", pool)
        pools_by = getattr(pools_by, "pool_type", pools_by)  # of CNNs it is a module
        if pool and isinstance(pools_by, str) and pool != pools_by:
            raise EncoderError(
                f"cannot open {spec}: {CONFIG} beside it says global_pool {pool}, but the model pools by {pools_by}; "
                f"say it in model_args"
            )
        model.reset_classifier(0)
        check_floats(spec, weights, model)
        if own:
            _check_weights(spec, weights, model)
        provenance = {
            "family": "timm",
            "architecture": " ".join([default.architecture or "", *([fingerprint(arguments)] if arguments else [])]),
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


def _settings_of_file(spec: EncoderSpec, folder: Path, weights: Weights) -> Settings:
    """Return what a weights file's model needs: a pretrained configuration's data, arguments, the pooling if stated.

    The tag in the spec's name says them, else a config.json of timm beside the file, else the tags of the name, where
    all agree. Raises EncoderError where they do not, or where there are none.
    """
    name, _, tag = spec.model.partition(".")
    if tag:
        return NOTHING_STATED
    if (stated := _config_beside(spec, name, folder, weights)) is not None:
        pool = stated.get("global_pool")
        data = {key: stated["pretrained_cfg"][key] for key in DATA if key in stated["pretrained_cfg"]}
        return data, stated.get("model_args") or {}, pool if isinstance(pool, str) else None
    groups = published_data(name)
    if len(groups) == 1:
        return NOTHING_STATED
    beside = f"put the {CONFIG} of the weights, in timm's format, beside them"
    if not groups:
        raise EncoderError(f"cannot open {spec}: timm has no preprocessing for {name}; {beside}")
    firsts = [tags[0] for tags in groups.values()]
    raise EncoderError(
        f"cannot open {spec}: the preprocessing of these weights is not known, because timm's tags of {name} differ "
        f"({', '.join(first.partition('.')[2] for first in firsts[:4])}); name the one that they are like, as in "
        f"timm:{firsts[0]}@{spec.weights}, or {beside}"
    )


def published_data(name: str) -> dict[str, list[str]]:
    """Group a model's published names, ``name.tag``, by what reaches the features beside the weights."""
    groups: dict[str, list[str]] = {}
    for published in sorted({*timm.list_pretrained(f"{name}.*"), *timm.list_pretrained(name)}):
        config: Any = timm.get_pretrained_cfg(published)
        groups.setdefault(json.dumps([getattr(config, key) for key in DATA]), []).append(published)
    return groups


def _config_beside(spec: EncoderSpec, name: str, folder: Path, weights: Weights) -> JsonObject | None:
    """Read a folder's config.json if it is timm's. Raises EncoderError if it is another model's, or lacks something."""
    path = folder / CONFIG
    if path.is_file():
        check_file(spec, path, folder)
    stated = read_json(spec, path) if path.is_file() else {}
    if not isinstance(stated.get("pretrained_cfg"), dict):
        return None
    if stated.get("architecture", name) != name:
        raise EncoderError(f"cannot open {spec}: {path} is of another model, {stated['architecture']}")
    if missing := [key for key in STATED if not stated["pretrained_cfg"].get(key)]:
        raise EncoderError(f"cannot open {spec}: pretrained_cfg in {path} has no {' and '.join(missing)}")
    check_values(spec, path, stated["pretrained_cfg"], RULES)
    check_sides(spec, path, {key: stated["pretrained_cfg"].get(key) for key in DATA})
    check_model_settings(spec, path, stated.get("model_args") or {}, weights)
    return stated


def _n_classes(weights: Weights, classifier: str | Sequence[str] | None) -> int:
    """Return the number of classes of a weights file; 0 if it has no classifier."""
    first = classifier if isinstance(classifier, str) else (classifier or ("",))[0]
    names = (f"{first}.weight", f"module.{first}.weight")  # timm takes either
    return max((shape[0] for name in names if (shape := weights.shapes.get(name))), default=0)


def _check_weights(spec: EncoderSpec, weights: Weights, model: Any) -> None:
    """Raise EncoderError if a file's weights are for images, patches or windows of other sizes: timm resamples them."""
    stored = _by_the_names_of(model, weights.shapes)
    patch, n_prefix = getattr(model, "patch_embed", None), getattr(model, "num_prefix_tokens", 0)
    n_patches, side = getattr(patch, "num_patches", 0), (getattr(patch, "patch_size", None) or (0,))[0]

    def words(name: str, shape: Shape) -> str:
        rows = shape[1] if len(shape) == 3 else 0
        n_others = model.pos_embed.shape[1] - n_patches if name == TABLE and rows else 0
        return pixels(rows, n_others, side) if name == TABLE and rows and side else ""

    def same(name: str, shape: Shape) -> bool:
        """Whether a table only has other rows for class and register tokens, which timm adds to these tokens."""
        return name == TABLE and len(shape) == 3 and 0 < n_patches <= shape[1] <= n_patches + n_prefix

    advice = (
        f"name the model and tag of that size, or put a {CONFIG} with it beside the weights (model_args, as "
        f'{{"img_size": 64}}, and input_size in pretrained_cfg)'
    )
    check_sizes(spec, stored, model, words, advice, same)


def _by_the_names_of(model: nn.Module, stored: dict[str, Shape]) -> dict[str, Shape]:
    """Return a file's shapes by the names of the model: files may have a prefix, or CLIP's name for the positions."""
    names = list(model.state_dict())
    ends = {key.removesuffix(name) for name in names[:3] for key in stored if key.endswith(name)}
    start = max(sorted(ends), key=lambda end: sum(end + name in stored for name in names), default="")
    found = {name: stored[start + name] for name in names if start + name in stored}
    if TABLE in names and TABLE not in found and CLIP_TABLE in stored:
        found[TABLE] = (1, *stored[CLIP_TABLE])
    return found
