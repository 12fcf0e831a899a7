"""open_clip models: an image and a text tower with pooled features in one shared space."""

import copy
import difflib
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import open_clip
import torch
from open_clip.tokenizer import SimpleTokenizer
from open_clip.transform import PreprocessCfg, image_transform_v2
from open_clip.transformer import text_global_pool
from torch import Tensor, nn

from cachefuse.encoders.base import EncoderSpec, Tower, is_path
from cachefuse.encoders.building import check_floats, no_larger_than
from cachefuse.encoders.clip_parts import (
    Tokenizer,
    check_model,
    check_tokenizer,
    check_weights,
    end_token,
    folder_preprocessing,
    open_tokenizer,
    published_settings,
    read_config,
    settings_of_file,
)
from cachefuse.encoders.clip_processor import CONFIG, PROCESSOR
from cachefuse.encoders.frozen import (
    fetch,
    fingerprint,
    flatten_map,
    library,
    local_weights,
    opening,
    tokenizer_fingerprint,
    weights_digest,
)
from cachefuse.encoders.images import ImageTower, split_compose
from cachefuse.encoders.model_files import read_weights
from cachefuse.encoders.texts import Ids, Text, TextTower
from cachefuse.encoders.vit import patch_tokens
from cachefuse.errors import EncoderError
from cachefuse.files import JsonObject

DEFAULT_TAG = "laion2b_s34b_b79k"
WEIGHTS = ("open_clip_model.safetensors", "open_clip_pytorch_model.safetensors")


class ClipImageTower(ImageTower):
    """Pooled: the projected embedding, not normalised. Tokens: the patches that the model's pooling takes.

    They are without class and register tokens, and not projected.
    """

    options = ("preprocess",)

    def __init__(self, model: nn.Module, device: str, provenance: Mapping[str, str]):
        config = open_clip.get_model_preprocess_cfg(model)
        transform = image_transform_v2(PreprocessCfg(**config), is_train=False)
        facts = {**provenance, "preprocessing": f"open_clip {fingerprint(config)}", "pooling": "projected embedding"}
        visual: Any = model.visual
        self.trunk = getattr(visual, "trunk", None)  # a model of timm
        # An attention pooling, and some poolings by the mean, take patches before the last norm.
        mean_first = getattr(visual, "final_ln_after_pool", False)
        self.normed = getattr(visual, "attn_pool", None) is None and not mean_first
        if hasattr(self.trunk, "final_conv") or mean_first:
            facts["tokens"] = "what the pooling takes"
        super().__init__(model, device, facts, transform, split_compose(transform))

    def forward(self, batch: Sequence[Tensor], tokens: bool) -> tuple[Tensor, Tensor | None]:
        images, visual = self.stack(batch), self.model.visual
        if tokens and self.trunk is not None:
            features = self.trunk.forward_features(images)
            return visual.head(self.trunk.forward_head(features)), patch_tokens(self.trunk, features)
        if not tokens or not hasattr(visual, "forward_intermediates"):
            return self.model.encode_image(images, normalize=False), None
        out = visual.forward_intermediates(images, indices=1, normalize_intermediates=self.normed)
        return out["image_features"], flatten_map(out["image_intermediates"][-1])


class ClipTextTower(TextTower):
    """Pooled: the projected embedding, not normalised. Tokens: the last layer's up to the end token, not projected.

    They are after the last norm, and have the start and the end token.
    """

    options = ("preprocess", *TextTower.options)  # a tag says the activation too

    def __init__(
        self, spec: EncoderSpec, model: nn.Module, tokenizer: Tokenizer, device: str, provenance: Mapping[str, str]
    ):
        self.tokenizer = tokenizer
        inner = getattr(tokenizer, "tokenizer", tokenizer)
        self.end, self.pad = end_token(tokenizer), getattr(inner, "pad_token_id", None) or 0
        self.context = tokenizer.context_length
        self.counter = copy.deepcopy(inner)  # its options never change: a tokenizer keeps them, and threads share it
        self.plain = isinstance(tokenizer, SimpleTokenizer) and tokenizer.reduction_fn is None
        if not self.plain and any(map(spec.option, TextTower.options)):
            raise EncoderError(f"cannot open {spec}: only models with CLIP's own tokenizer read texts in another way")
        # With causal attention, tokens after the end token have no effect and are not computed. The highest id is the
        # end token's in open_clip's own tokenizer; in others it may be after the end.
        self.causal = isinstance(model, open_clip.CLIP) and model.attn_mask is not None
        pools = ("argmax", "eos", "first") if isinstance(tokenizer, SimpleTokenizer) else ("eos", "first")
        self.causal = self.causal and model.text_pool_type in pools
        facts = {
            **provenance,
            "tokenizer": tokenizer_fingerprint(inner) if inner is not tokenizer else _bpe_fingerprint(tokenizer),
            "pooling": "projected embedding",
        }
        super().__init__(spec, model, device, facts, (self.context, self.context))

    def split(self, text: str) -> tuple[list[Ids], int]:
        if isinstance(self.tokenizer, SimpleTokenizer):
            ids = self.tokenizer.encode(text)
            n_tokens = len(ids) + self.n_special()
        else:
            n_tokens = len(self.counter(self.tokenizer.clean_fn(text))["input_ids"])
        if not self.plain:
            return [self.tokenizer([text])[0].tolist()], n_tokens
        step = self.max_tokens - self.n_special()
        start, end = self.tokenizer.sot_token_id, self.tokenizer.eot_token_id
        return [[start, *ids[i : i + step], end] for i in range(0, max(1, len(ids)), step)], n_tokens

    def n_special(self) -> int:
        return 2

    def length(self, prepared: Text) -> int:
        return max(map(self._until_end, prepared.windows))

    def _until_end(self, ids: Ids) -> int:
        """Return the number of ids up to the end token: what follows has no effect."""
        if self.end in ids:
            return ids.index(self.end) + 1
        real = [i for i, token in enumerate(ids) if token != self.pad]  # some models take the end token out
        return real[-1] + 1 if real else len(ids)

    def forward(self, batch: Sequence[Text], tokens: bool) -> tuple[Tensor, Tensor | None]:
        ids = torch.zeros(len(batch), self.context, dtype=torch.long)
        for row, text in zip(ids, batch, strict=True):
            row[: len(text.windows[0])] = torch.tensor(text.windows[0])
        ids = ids.to(self.device)  # (B, context length)
        if isinstance(self.model, open_clip.CLIP):
            return self._forward_clip(ids[:, : max(map(self.length, batch))] if self.causal else ids)
        if not tokens or not hasattr(self.model.text, "forward_intermediates"):
            return self.model.encode_text(ids, normalize=False), None
        out = self.model.text.forward_intermediates(ids, indices=1, normalize_intermediates=True, output_fmt="NLC")
        return out["text_features"], out["text_intermediates"][-1]

    def _forward_clip(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Do what ``CLIP.encode_text`` does, on ids (B, T): T is the longest text's length, or the whole context."""
        model, n_tokens = self.model, ids.shape[1]
        hidden = model.token_embedding(ids) + model.positional_embedding[:n_tokens]  # (B, T, width)
        mask = None if model.attn_mask is None else model.attn_mask[:n_tokens, :n_tokens]
        hidden = model.ln_final(model.transformer(hidden, attn_mask=mask))
        pooled = text_global_pool(hidden, ids, model.text_pool_type, eos_token_id=model.text_eos_id)
        projection = model.text_projection
        if projection is not None:
            pooled = projection(pooled) if isinstance(projection, nn.Linear) else pooled @ projection
        return pooled, hidden


def open_clip_towers(spec: EncoderSpec, device: str) -> dict[str, Tower]:
    """Open ``clip:name[@tag or .safetensors file]``, or a folder with open_clip_config.json, as image and text towers.

    Raises EncoderError for an unknown name or tag, with similar ones, and for weights that are missing or do not fit.
    """
    with opening(spec), _quiet():
        name, config, model, folder = _from_folder(spec) if is_path(spec.model) else _from_name(spec)
        tokenizer = open_tokenizer(spec, name, config, folder, hub=not is_path(spec.model))
        check_tokenizer(spec, model, config, tokenizer)
        provenance = {
            "family": "clip",
            "architecture": f"{type(model).__name__} {fingerprint(config)}",
            "weights": weights_digest(model),
            "library": library(open_clip),
        }
        return {
            "image": ClipImageTower(model, device, provenance).probe(),
            "text": ClipTextTower(spec, model, tokenizer, device, provenance).probe(),
        }


def _from_folder(spec: EncoderSpec) -> tuple[str, JsonObject, nn.Module, Path | None]:
    folder = Path(spec.model).expanduser()
    if not folder.is_dir():
        raise EncoderError(f"cannot open {spec}: there is no folder {folder}")
    if spec.weights:
        raise EncoderError(f"cannot open {spec}: a folder has its own weights; drop {spec.weights!r}")
    if spec.option("preprocess"):
        raise EncoderError(f"cannot open {spec}: a folder has its own preprocessing; drop preprocess")
    config = read_config(spec, folder)
    if "model_cfg" not in config:
        raise EncoderError(f"cannot open {spec}: there is no {CONFIG} with a model_cfg in {folder}")
    # open_clip prefers a pickle to a .safetensors file of another name.
    path = next((folder / file for file in WEIGHTS if (folder / file).is_file()), None)  # in open_clip's order
    if path is None:
        raise EncoderError(f"cannot open {spec}: there is no open_clip_model.safetensors in {folder}")
    weights = read_weights(spec, [path], folder)
    check_model(spec, folder / CONFIG, config["model_cfg"], weights)
    preprocessing = folder_preprocessing(spec, folder, config, config["model_cfg"])
    if preprocessing is None:
        raise EncoderError(
            f"cannot open {spec}: {folder / CONFIG} has no preprocess_cfg; add one with mean and std, or put the "
            f"model's {PROCESSOR} beside it"
        )
    name = f"local-dir:{folder}"
    with no_larger_than(spec, weights):
        model = open_clip.create_model(name, require_pretrained=True, force_preprocess_cfg=preprocessing)
    check_floats(spec, weights, model)
    check_weights(spec, weights, model, f"state their own sizes in model_cfg of {folder / CONFIG}")
    return name, config["model_cfg"], model, folder


def _from_name(spec: EncoderSpec) -> tuple[str, JsonObject, nn.Module, Path | None]:
    name = spec.model.replace("/", "-")
    if name not in open_clip.list_models():
        close = difflib.get_close_matches(name, open_clip.list_models(), n=3) or ["ViT-B-32"]
        raise EncoderError(f"unknown open_clip model {spec.model!r}; did you mean {', '.join(close)}?")
    path, folder = local_weights(spec), None
    if path is not None:
        folder = path.parent
        preprocessing, quick_gelu = settings_of_file(spec, name, folder)
    else:
        tag = _tag(spec, name)
        preprocessing, quick_gelu = published_settings(name, [tag])[tag]
        path = _download(spec, open_clip.get_pretrained_cfg(name, tag)["hf_hub"])
    # A tag's weights need its preprocessing and activation: OpenAI's need QuickGELU under any model name.
    model = open_clip.create_model(
        name, str(path), require_pretrained=True, force_quick_gelu=quick_gelu, force_preprocess_cfg=preprocessing
    )
    if folder is not None:
        advice = f"name the model of that size, or open a folder, clip:./folder, whose {CONFIG} states it in model_cfg"
        weights = read_weights(spec, [path])
        check_floats(spec, weights, model)
        check_weights(spec, weights, model, advice)
    return name, {**open_clip.get_model_config(name), "quick_gelu": quick_gelu}, model, folder


def _tag(spec: EncoderSpec, name: str) -> str:
    """Return the tag that a spec names, or the default one. Raises EncoderError for one that is not published."""
    if spec.option("preprocess"):
        raise EncoderError(f"cannot open {spec}: preprocess is for a .safetensors file; a tag has its own")
    tags = open_clip.list_pretrained_tags_by_model(name)
    if not tags:
        raise EncoderError(f"open_clip has no weights for {name}; give a file: clip:{name}@./weights.safetensors")
    tag = spec.weights or (DEFAULT_TAG if DEFAULT_TAG in tags else tags[0])
    if not open_clip.get_pretrained_cfg(name, tag):
        raise EncoderError(f"unknown weights {tag!r} for {name}; choose from: {', '.join(tags)}")
    return tag


def _download(spec: EncoderSpec, location: str) -> Path:
    """Download a published tag: safetensors, or else the file that open_clip unpickles as plain tensors."""
    repo, _, filename = location.rpartition("/")
    stems = [Path(filename).stem] if filename else ["open_clip_model", "open_clip_pytorch_model"]
    for names in ([f"{stem}.safetensors" for stem in stems], [f"{stem}.bin" for stem in stems]):
        folder = fetch(spec, repo, names)
        for name in names:
            if (folder / name).is_file():
                return folder / name
    raise EncoderError(f"cannot open {spec}: none of {', '.join(stems)} is in {repo}")


def _bpe_fingerprint(tokenizer: SimpleTokenizer) -> str:
    rules = [tokenizer.encoder, list(tokenizer.bpe_ranks), tokenizer.clean_fn.__name__]
    return f"{type(tokenizer).__name__} {fingerprint(rules)}"


@contextmanager
def _quiet() -> Iterator[None]:
    """Stop open_clip, which logs to the root logger, from adding a handler that prints to the terminal."""
    handler = logging.NullHandler()
    logging.getLogger().addHandler(handler)
    try:
        yield
    finally:
        logging.getLogger().removeHandler(handler)
