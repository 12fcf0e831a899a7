"""What an open_clip model needs beside its weights, each read or refused: preprocessing, activation, tokenizer."""

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, TypeAlias

import open_clip
import timm
import torch
from open_clip.convert import convert_state_dict
from open_clip.model import CLIPTextCfg, CLIPVisionCfg, convert_to_custom_text_state_dict
from open_clip.tokenizer import HFTokenizer, SimpleTokenizer
from open_clip.transform import PreprocessCfg
from torch import nn

from cachefuse.encoders.base import EncoderSpec
from cachefuse.encoders.beside import check_sizes, check_values, pixels
from cachefuse.encoders.clip_processor import CONFIG, PROCESSOR, RULES, from_transformers
from cachefuse.encoders.frozen import fetch
from cachefuse.encoders.model_files import Shape, Weights, check_file, check_files, read_json
from cachefuse.encoders.model_settings import check_model_settings, check_sides, check_tokenizer_settings, own_tokenizer
from cachefuse.errors import EncoderError
from cachefuse.files import JsonObject
from cachefuse.printable import listed

Tokenizer: TypeAlias = SimpleTokenizer | HFTokenizer

TOKENIZERS = ("tokenizer.json", "*.model", "vocab.txt", "vocab.json")  # a tokenizer has at least one of them
TOKENIZER_FILES = (
    "config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "*.model",
    "vocab.*",
    "merges.txt",
)
# Settings of the loss, of training and of what is returned; which tokenizer is compared by itself.
NOT_THE_MODEL = {
    "cast_dtype",
    "custom_text",
    "hf_model_pretrained",
    "hf_tokenizer_name",
    "init_logit_bias",
    "init_logit_scale",
    "nonscalar_logit_scale",
    "output_dict",
    "output_tokens",
    "quick_gelu",
    "timm_model_pretrained",
}


def published_settings(name: str, tags: Iterable[str]) -> dict[str, tuple[JsonObject, bool]]:
    """Return what open_clip publishes for a model's tags: the preprocessing, and whether it needs QuickGELU."""
    always = bool(open_clip.get_model_config(name).get("quick_gelu"))
    configs = {tag: open_clip.get_pretrained_cfg(name, tag) for tag in tags}
    return {tag: (_preprocessing(config), always or bool(config.get("quick_gelu"))) for tag, config in configs.items()}


def settings_of_file(spec: EncoderSpec, name: str, folder: Path) -> tuple[JsonObject, bool]:
    """Return the preprocessing of a weights file of a known model, and whether it needs QuickGELU.

    They are those of the tag that the spec names, else of a config in the file's folder, else of the name's published
    tags. Raises EncoderError if these differ, or if there are none.
    """
    tags = open_clip.list_pretrained_tags_by_model(name)
    if tag := spec.option("preprocess"):
        if tag not in tags:
            known = f"choose from: {listed(tags)}" if tags else f"open_clip has no tags of {name}"
            raise EncoderError(f"cannot open {spec}: unknown tag {tag!r} for {name}; {known}")
        return published_settings(name, [tag])[tag]
    published = published_settings(name, tags)
    config = read_config(spec, folder)
    preprocessing = folder_preprocessing(spec, folder, config, open_clip.get_model_config(name))
    if preprocessing is None:
        preprocessing = _common(settings for settings, _ in published.values())
    if "model_cfg" in config:
        quick_gelu: bool | None = _check_model(spec, name, config["model_cfg"])
    elif published:
        quick_gelu = _common(quick for _, quick in published.values())
    else:
        quick_gelu = bool(open_clip.get_model_config(name).get("quick_gelu"))
    if preprocessing is not None and quick_gelu is not None:
        return preprocessing, quick_gelu
    beside = f"put the {CONFIG} of the weights beside them"
    if not tags:
        raise EncoderError(f"cannot open {spec}: open_clip has no preprocessing for {name}; {beside}")
    what = "preprocessing" if preprocessing is None else "activation"
    raise EncoderError(
        f"cannot open {spec}: the {what} of these weights is not known, because open_clip's tags of {name} differ "
        f"({_groups(published)}); add the tag that the weights are like, as in ,preprocess={tags[0]}, or {beside}"
    )


def folder_preprocessing(spec: EncoderSpec, folder: Path, config: JsonObject, model: JsonObject) -> JsonObject | None:
    """Return the preprocessing that a folder's files state, or None. Raises EncoderError for one that is not whole.

    ``config`` is the folder's open_clip_config.json, and ``model`` the model's configuration. Without a
    ``preprocess_cfg``, transformers' file is read.
    """
    if stated := config.get("preprocess_cfg"):
        if missing := [key for key in ("mean", "std") if stated.get(key) is None]:
            raise EncoderError(
                f"cannot open {spec}: preprocess_cfg in {folder / CONFIG} has no {' and '.join(missing)}"
            )
        check_values(spec, folder / CONFIG, stated, RULES)
        return _preprocessing(stated)
    if not (folder / PROCESSOR).is_file():
        return None
    side = model["vision_cfg"].get("image_size", CLIPVisionCfg.image_size)
    return _preprocessing(from_transformers(spec, folder / PROCESSOR, side))


def read_config(spec: EncoderSpec, folder: Path) -> JsonObject:
    """Read a folder's open_clip_config.json; empty if there is none. Raises EncoderError if it is not an object."""
    path = folder / CONFIG
    if path.is_file():
        check_file(spec, path, folder)
    config = read_json(spec, path) if path.is_file() else {}
    parts = [config.get(key, {}) for key in ("model_cfg", "preprocess_cfg")]
    if not all(isinstance(part, dict) for part in parts):
        raise EncoderError(f"cannot open {spec}: {path} is not a configuration of open_clip")
    return config


def check_model(spec: EncoderSpec, path: Path, model: JsonObject, weights: Weights) -> None:
    """Raise EncoderError for a folder's model that asks for other files, or is much larger than the weights."""
    check_model_settings(spec, path, model, weights)
    check_sides(spec, path, {"image_size": (model.get("vision_cfg") or {}).get("image_size")})
    for part, key in (("vision_cfg", "timm_model_name"), ("text_cfg", "hf_model_name")):
        text = (model.get(part) or {}).get(key)
        if text is None:
            continue
        known = timm.is_model(str(text).partition(".")[0]) if key == "timm_model_name" else _is_repository(text)
        if not known:
            raise EncoderError(
                f"cannot open {spec}: {key} in {path} is {text!r}; it must be the name of a published model"
            )


def _is_repository(text: object) -> bool:
    """Whether text names a repository of the hub, and no folder, which the library would prefer."""
    return (
        isinstance(text, str) and bool(re.fullmatch(r"([\w-][\w.-]*/)?[\w-][\w.-]*", text)) and not Path(text).exists()
    )


def open_tokenizer(spec: EncoderSpec, name: str, config: JsonObject, folder: Path | None, hub: bool) -> Tokenizer:
    """Open the tokenizer of a model's configuration.

    One of transformers is read from the ``folder`` of the weights, else, if ``hub`` is allowed, from the hub or its
    cache. Raises EncoderError if it is in neither.
    """
    text = config["text_cfg"]
    source = text.get("hf_tokenizer_name")
    if not source:
        if text.get("hf_model_name"):
            raise EncoderError(f"cannot open {spec}: its configuration has hf_model_name without hf_tokenizer_name")
        return open_clip.get_tokenizer(name)
    if folder is None or not _has_tokenizer(folder):
        advice = (
            f"put its tokenizer.json and tokenizer_config.json beside the weights{f' in {folder}' if folder else ''}"
        )
        if not hub:
            raise EncoderError(f"cannot open {spec}: it has no tokenizer ({source}); {advice}")
        try:
            folder = fetch(spec, source, TOKENIZER_FILES)
        except EncoderError as error:
            raise EncoderError(
                f"cannot open {spec}: its tokenizer, {source}, is not here, and the hub does not give it; {advice}"
            ) from error
    check_files(spec, folder)
    check_tokenizer_settings(spec, folder)
    mode = {"tokenizer_mode": text["tokenizer_mode"]} if text.get("tokenizer_mode") else {}
    options = {**(text.get("tokenizer_kwargs") or {}), **mode, **own_tokenizer(folder)}
    options |= {"trust_remote_code": False, "local_files_only": True}
    return HFTokenizer(str(folder), context_length=text.get("context_length", 77), **options)


def end_token(tokenizer: Tokenizer) -> int | None:
    """Return the id of the token that ends a text."""
    inner = getattr(tokenizer, "tokenizer", tokenizer)
    ends = (getattr(inner, name, None) for name in ("eot_token_id", "eos_token_id", "sep_token_id"))
    return next((end for end in ends if end is not None), None)


def check_tokenizer(spec: EncoderSpec, model: nn.Module, config: JsonObject, tokenizer: Tokenizer) -> None:
    """Raise EncoderError if a tokenizer is plainly not the model's."""
    text: Any = getattr(model, "text", model)
    expected = config["text_cfg"].get("vocab_size", CLIPTextCfg.vocab_size)
    if isinstance(tokenizer, SimpleTokenizer) and tokenizer.vocab_size != expected:
        raise EncoderError(
            f"cannot open {spec}: the model has {expected} tokens, and open_clip's own tokenizer "
            f"{tokenizer.vocab_size}; say hf_tokenizer_name in its {CONFIG}, and put that tokenizer beside it"
        )
    pool = getattr(text, "pool_type", getattr(text, "text_pool_type", None))
    end = getattr(text, "eos_id", getattr(text, "text_eos_id", None))
    if pool == "eos" and end != end_token(tokenizer):
        raise EncoderError(
            f"cannot open {spec}: texts end with token {end} for the model, and {end_token(tokenizer)} for the "
            "tokenizer beside it; put the model's own tokenizer there"
        )


def _preprocessing(config: Mapping[str, Any]) -> JsonObject:
    """Return a whole preprocessing, without the size: the model has it. What is not stated has the format's default."""
    stated = {key: config[key] for key in asdict(PreprocessCfg()) if config.get(key) is not None}
    whole = asdict(PreprocessCfg(**stated))
    del whole["size"]
    return {key: list(value) if isinstance(value, tuple) else value for key, value in whole.items()}


def _common(values: Iterable[Any]) -> Any:
    """Return the value that all have; None if they differ, or if there are none."""
    first, *others = [*values] or [None]
    return first if all(other == first for other in others) else None


def _groups(published: Mapping[str, tuple[JsonObject, bool]]) -> str:
    """Name one tag of each group that has the same settings: at most four."""
    firsts = {json.dumps(published[tag]): tag for tag in reversed(list(published))}
    return listed(sorted(firsts.values(), key=list(published).index)[:4])


def _check_model(spec: EncoderSpec, name: str, beside: JsonObject) -> bool:
    """Return whether a file needs QuickGELU: a config beside it may say so, even if the name's model does without.

    Raises EncoderError if the config describes another model than the spec's name.
    """
    config = open_clip.get_model_config(name)
    ours, theirs = _resolved(config), _resolved(beside)
    different = sorted(key for key in ours | theirs if ours.get(key) != theirs.get(key))
    quick_gelu = bool(beside.get("quick_gelu"))
    if config.get("quick_gelu") and not quick_gelu:
        different.insert(0, "quick_gelu")  # open_clip can only switch it on
    if different:
        raise EncoderError(
            f"cannot open {spec}: the {CONFIG} beside the file is of another model than {name} "
            f"({listed(different[:3])}); open its folder, as in clip:./folder, or move the file"
        )
    return quick_gelu


def _resolved(config: JsonObject) -> JsonObject:
    """Return all settings of a model that reach its features, with open_clip's defaults."""
    flat = {key: value for key, value in config.items() if key not in NOT_THE_MODEL and not isinstance(value, dict)}
    text = config.get("text_cfg") or {}
    flat["text_cfg.hf_tokenizer_name"] = bool(text.get("hf_tokenizer_name"))  # else open_clip's own; it may be moved
    for part, kind in (("vision_cfg", CLIPVisionCfg), ("text_cfg", CLIPTextCfg), ("multimodal_cfg", None)):
        defaults = {field.name: field.default for field in fields(kind)} if kind else {}
        stated = {**defaults, **(config.get(part) or {})}
        flat |= {f"{part}.{key}": value for key, value in stated.items() if key not in NOT_THE_MODEL}
    return flat


def check_weights(spec: EncoderSpec, weights: Weights, model: nn.Module, advice: str) -> None:
    """Raise EncoderError if a file's weights are for images or texts of other sizes: open_clip resamples them."""
    stored: Any = {
        name.removeprefix("module."): torch.empty(shape, device="meta") for name, shape in weights.shapes.items()
    }
    stored = convert_state_dict(model, stored)  # names of other libraries
    if "positional_embedding" in stored and not hasattr(model, "positional_embedding"):
        stored = convert_to_custom_text_state_dict(stored)
    visual: Any = model.visual

    def words(name: str, shape: Shape) -> str:
        if name.endswith("positional_embedding") and not name.startswith("visual"):
            return f"{shape[0]} tokens"
        patch = getattr(visual, "patch_size", None)
        return pixels(shape[0], 1, patch[0]) if patch and name == "visual.positional_embedding" else ""

    check_sizes(spec, {name: tuple(tensor.shape) for name, tensor in stored.items()}, model, words, advice)


def _has_tokenizer(folder: Path) -> bool:
    return (folder / "tokenizer_config.json").is_file() and any(any(folder.glob(name)) for name in TOKENIZERS)
