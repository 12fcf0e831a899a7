"""transformers models by hub name or local folder: text (BERT, T5's encoder ...) or image (ViT, DINOv2 ...)."""

import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
import transformers
from PIL import Image
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    MODEL_MAPPING,
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as library_logging

from cachefuse.encoders.base import PICKLES, EncoderSpec, Features, Tower, is_path
from cachefuse.encoders.frozen import (
    FrozenTower,
    fetch,
    fingerprint,
    flatten_map,
    library,
    opening,
    tokenizer_fingerprint,
    weights_digest,
)
from cachefuse.encoders.images import ImageTower, Split
from cachefuse.encoders.texts import Ids, Text, TextTower
from cachefuse.errors import EncoderError
from cachefuse.files import JsonObject

FILES = ("*.json", "*.txt", "*.model", "model*.safetensors")  # all files of a hub repository that a model needs
UNUSED = {"_name_or_path", "architectures", "dtype", "id2label", "label2id", "transformers_version"}
PREFIX = ("cls_token", "distillation_token", "register_tokens")  # the tokens before the patches
MAX_TOKENS = 512  # for models without a limit of their own
NO_LIMIT = 1_000_000  # tokenizers without a limit have a huge number


class ImageProcessor(Protocol):
    """What is used of a transformers image processor; those around timm's transforms have no attributes."""

    rescale_factor: float
    image_mean: Sequence[float]
    image_std: Sequence[float]

    def __call__(self, *, images: Image.Image, return_tensors: str, **options: bool) -> Mapping[str, Tensor]: ...

    def to_dict(self) -> JsonObject: ...


class HFImageTower(ImageTower):
    """Pooled: the class token after the last layer norm, else the mean of the tokens. Tokens: only the patches."""

    def __init__(self, model: nn.Module, processor: ImageProcessor, device: str, provenance: Mapping[str, str]):
        prefix = {n.rsplit(".", 1)[-1]: p.shape[-2] for n, p in model.named_parameters() if n.endswith(PREFIX)}
        self.class_token = "cls_token" in prefix
        self.n_prefix = sum(prefix.values())
        pooling = "class token" if self.class_token else "mean"
        preprocessing = f"{type(processor).__name__} {fingerprint(processor.to_dict())}"
        facts = {**provenance, "preprocessing": preprocessing, "pooling": pooling}
        super().__init__(model, device, facts, partial(_process, processor), _split_processor(processor))

    def forward(self, batch: Sequence[Tensor], tokens: bool) -> tuple[Tensor, Tensor | None]:
        hidden = self.model(pixel_values=self.stack(batch)).last_hidden_state  # (B, T, D), or (B, D, H, W) of a CNN
        if hidden.ndim == 4:
            patches = flatten_map(hidden)
            return patches.float().mean(1), patches
        patches = hidden[:, self.n_prefix :]
        return hidden[:, 0] if self.class_token else patches.float().mean(1), patches


class HFTextTower(TextTower):
    """Pooled: the mean of the real tokens (as in sentence-transformers), or the first token.

    Ids: the tokenizer's, cut to the model's maximum length.
    """

    views = ("pooled", "tokens", "ids")

    def __init__(
        self,
        spec: EncoderSpec,
        model: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        folder: Path,
        device: str,
        provenance: Mapping[str, str],
    ):
        self.tokenizer = tokenizer
        pooling = _read(folder / "1_Pooling" / "config.json")
        self.first = bool(pooling.get("pooling_mode_cls_token")) or pooling.get("pooling_mode") == "cls"
        ids = (tokenizer.pad_token_id, getattr(model.config, "pad_token_id", None), 0)
        self.pad_id = next(i for i in ids if i is not None)
        # Models often have a few rows more than the tokenizer has tokens, and some tokenizers skip numbers.
        self.vocabulary = max(len(tokenizer), getattr(model.config, "vocab_size", None) or 0)
        facts = {
            **provenance,
            "tokenizer": tokenizer_fingerprint(tokenizer),
            "pooling": "first token" if self.first else "mean",
        }
        super().__init__(spec, model, device, facts, _limits(model, tokenizer, folder))

    def split(self, text: str) -> tuple[list[Ids], int]:
        # Always the same options: a fast tokenizer keeps them, and threads share it.
        encoded = self.tokenizer(
            text, truncation=True, max_length=self.max_tokens, padding=False, return_overflowing_tokens=True
        )
        if self.tokenizer.is_fast:
            windows = list(encoded["input_ids"])
            return windows, sum(map(len, windows)) - (len(windows) - 1) * self.n_special()
        rest, step = encoded.get("overflowing_tokens", []), self.max_tokens - self.n_special()
        chunks = [rest[start : start + step] for start in range(0, len(rest), step)]
        windows = [encoded["input_ids"], *map(self.tokenizer.build_inputs_with_special_tokens, chunks)]
        return windows, len(windows[0]) + len(rest)

    def n_special(self) -> int:
        return int(self.tokenizer.num_special_tokens_to_add())

    def encode(self, batch: Sequence[Text], views: Collection[str]) -> Features:
        computed = [view for view in views if view != "ids"]
        features = super().encode(batch, computed) if computed else {}
        if "ids" in views:
            features["ids"] = [np.array(text.windows[0], np.int32) for text in batch]
        return features

    def forward(self, batch: Sequence[Text], tokens: bool) -> tuple[Tensor, Tensor | None]:
        rows = [torch.tensor(text.windows[0]) for text in batch]
        ids = pad_sequence(rows, batch_first=True, padding_value=self.pad_id)  # (B, T)
        mask = torch.arange(ids.shape[1]) < torch.tensor([[len(row)] for row in rows])
        ids, mask = ids.to(self.device), mask.long().to(self.device)
        hidden = self.model(input_ids=ids, attention_mask=mask).last_hidden_state  # (B, T, D)
        if self.first:
            return hidden[:, 0], hidden
        real = mask.unsqueeze(-1)  # (B, T, 1)
        return (hidden.float() * real).sum(1) / real.sum(1), hidden


def open_hf(spec: EncoderSpec, device: str) -> dict[str, Tower]:
    """Open ``hf:name[@revision]`` or ``hf:./folder`` as one tower, image or text.

    Raises EncoderError for a folder without safetensors, a model of both modalities, or one that needs its own code.
    """
    folder = model_folder(spec)
    offline = {"trust_remote_code": False, "local_files_only": True}
    with opening(spec), quiet():
        config = AutoConfig.from_pretrained(folder, **offline)
        modality = _modality(spec, config)
        # Models trained in bfloat16 overflow float16, and so do T5's activations.
        overflows = config.is_encoder_decoder or str(config.dtype) in ("torch.bfloat16", "bfloat16")
        model = _load(spec, folder, config, offline)
        settings = {key: value for key, value in config.to_dict().items() if key not in UNUSED}
        provenance = {
            "family": "hf",
            "architecture": f"{type(model).__name__} {fingerprint(settings)}",
            "weights": weights_digest(model),
            "library": library(transformers),
        }
        tower: FrozenTower
        if modality == "image":
            processor = AutoImageProcessor.from_pretrained(folder, **offline)
            tower = HFImageTower(model, processor, device, provenance)
            sizes = {tuple(tower.prepare(Image.new("RGB", size)).shape) for size in ((64, 48), (48, 64))}
            if len(sizes) > 1:
                raise EncoderError(f"cannot open {spec}: its image processor gives images of different sizes")
        else:
            tokenizer = AutoTokenizer.from_pretrained(folder, **offline)
            tower = HFTextTower(spec, model, tokenizer, folder, device, provenance)
        if overflows:
            tower.half = torch.bfloat16
        # The probe also makes the tokenizer's first call, which sets its truncation: later calls only read it.
        return {modality: tower.probe()}


def model_folder(spec: EncoderSpec) -> Path:
    """Return the folder of a model's files: a local one, or a download from the hub.

    Raises EncoderError if it is not available, or has no safetensors.
    """
    if not spec.model:
        raise EncoderError("hf needs a model: hf:bert-base-uncased, or a local folder such as hf:./folder")
    if not is_path(spec.model):
        return _check(spec, fetch(spec, spec.model, FILES, spec.weights or None))
    folder = Path(spec.model).expanduser()
    if not folder.is_dir():
        raise EncoderError(f"cannot open {spec}: there is no folder {folder}")
    if spec.weights:
        raise EncoderError(f"cannot open {spec}: a local folder has no revision {spec.weights!r}")
    return _check(spec, folder)


def _check(spec: EncoderSpec, folder: Path) -> Path:
    if not (folder / "config.json").is_file():
        raise EncoderError(f"cannot open {spec}: there is no config.json in {folder}")
    if not list(folder.glob("*.safetensors")):
        pickles = sorted(path.name for path in folder.iterdir() if path.suffix in PICKLES)
        advice = f", only {pickles[0]}, a pickle, which can run code; convert it to safetensors" if pickles else ""
        raise EncoderError(f"cannot open {spec}: it has no .safetensors weights{advice}")
    return folder


def _modality(spec: EncoderSpec, config: PretrainedConfig) -> str:
    if hasattr(config, "text_config") and hasattr(config, "vision_config"):
        raise EncoderError(
            f"{spec} ({config.model_type}) is an image-text model; open such models with clip:, as in clip:ViT-B-32"
        )
    takes = getattr(MODEL_MAPPING.get(type(config), None), "main_input_name", "nothing known")
    if takes not in ("pixel_values", "input_ids"):
        raise EncoderError(f"{spec} ({config.model_type}) takes {takes}; expected an image or a text model")
    return "image" if takes == "pixel_values" else "text"


def _load(spec: EncoderSpec, folder: Path, config: PretrainedConfig, offline: Mapping[str, bool]) -> nn.Module:
    """Load in float32, without decoder and pooler: features do not need them, and weights often lack them."""
    model, report = AutoModel.from_pretrained(
        folder, config=config, dtype=torch.float32, use_safetensors=True, output_loading_info=True, **offline
    )
    unused: tuple[str, ...] = ("pooler.",)
    if hasattr(model, "encoder") and hasattr(model, "decoder"):
        unused += ("decoder.",)
        model = model.get_encoder()
    elif isinstance(getattr(model, "pooler", None), nn.Module) and any(True for _ in model.pooler.parameters()):
        model.pooler = nn.Identity()
    missing = sorted(key for key in report["missing_keys"] if not key.startswith(unused))
    if missing:
        raise EncoderError(f"cannot open {spec}: {len(missing)} weights of the model are missing, such as {missing[0]}")
    encoder: nn.Module = model
    return encoder


def _process(processor: ImageProcessor, image: Image.Image, **options: bool) -> Tensor:
    return processor(images=image, return_tensors="pt", **options)["pixel_values"][0]  # (3, H, W)


def _split_processor(processor: ImageProcessor) -> Split:
    """Split off scaling and normalising. ``ImageTower`` detects processors that work in another order."""
    resize = partial(_process, processor, do_rescale=False, do_normalize=False)
    white = 1 / processor.rescale_factor if getattr(processor, "do_rescale", False) else 1.0
    normalizes = getattr(processor, "do_normalize", False)  # processors of timm's transforms lack these options
    mean, std = (processor.image_mean, processor.image_std) if normalizes else (0.0, 1.0)
    return Split(resize, white, mean, std)


def _limits(model: nn.Module, tokenizer: PreTrainedTokenizerBase, folder: Path) -> tuple[int, int]:
    """Return the usual number of tokens, and the greatest.

    The greatest is that of the position table. The usual is the smallest of this, of the tokenizer's limit, and of a
    sentence-transformers folder's.
    """
    limits = [getattr(model.config, "max_position_embeddings", None)]
    for name, module in model.named_modules():
        # RoBERTa's positions start after the padding position: 514 rows hold 512 tokens.
        if name.endswith("position_embeddings") and getattr(module, "padding_idx", None) is not None:
            limits.append(module.num_embeddings - module.padding_idx - 1)
    usual = [tokenizer.model_max_length, _read(folder / "sentence_bert_config.json").get("max_seq_length")]
    hard, soft = ([int(n) for n in numbers if n is not None and 0 < n < NO_LIMIT] for numbers in (limits, usual))
    return min([*hard, *soft], default=MAX_TOKENS), min(hard, default=NO_LIMIT)


def _read(path: Path) -> JsonObject:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


@contextmanager
def quiet() -> Iterator[None]:
    """Hide the library's progress bars and load reports, and restore its settings at the end."""
    level, bars = library_logging.get_verbosity(), library_logging.is_progress_bar_enabled()
    library_logging.set_verbosity_error()
    library_logging.disable_progress_bar()
    try:
        yield
    finally:
        library_logging.set_verbosity(level)
        if bars:
            library_logging.enable_progress_bar()
