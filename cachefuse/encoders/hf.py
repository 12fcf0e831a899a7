"""transformers models by hub name or local folder: text (BERT, T5's encoder ...), image (ViT, DINOv2 ...) or both."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoTokenizer, PretrainedConfig, PreTrainedTokenizerBase
from transformers.utils import logging as library_logging

from cachefuse.encoders.base import EncoderSpec, Tower, is_path
from cachefuse.encoders.building import check_floats, no_larger_than
from cachefuse.encoders.frozen import (
    FrozenTower,
    brief,
    fetch,
    fingerprint,
    library,
    opening,
    tokenizer_fingerprint,
    weights_digest,
)
from cachefuse.encoders.hf_images import HFImageTower, choose_pooling
from cachefuse.encoders.hf_models import Part, load_parts
from cachefuse.encoders.hf_processor import open_processor
from cachefuse.encoders.hf_texts import HFTextTower, choose_poolings, lower_case, n_embeddings
from cachefuse.encoders.model_files import Weights, check_files, find_weights
from cachefuse.encoders.model_settings import check_settings, own_tokenizer
from cachefuse.encoders.sentence_folder import read_sentence_folder, transformer_folder
from cachefuse.errors import EncoderError

# All files of a hub repository that a model needs. Modules of sentence-transformers are in folders of their own.
FILES = ("*.json", "*.txt", "*.model", "model*.safetensors", "[0-9]_*/model*.safetensors")
UNUSED = {"_name_or_path", "architectures", "dtype", "id2label", "label2id", "transformers_version"}
OFFLINE = {"trust_remote_code": False, "local_files_only": True}


def open_hf(spec: EncoderSpec, device: str) -> dict[str, Tower]:
    """Open ``hf:name[@revision]`` or ``hf:./folder`` as an image tower, a text tower, or both for models such as CLIP.

    Raises EncoderError for a folder that is not whole, a model of other inputs, or one that needs its own code.
    """
    root = _root(spec)
    with opening(spec), quiet():
        folder = transformer_folder(spec, root)
        weights = _check(spec, folder, root)
        config = AutoConfig.from_pretrained(folder, **OFFLINE)
        with no_larger_than(spec, weights):
            parts = load_parts(spec, folder, config, OFFLINE)
        for part in parts.values():
            check_floats(spec, weights, part.model)
        towers: dict[str, Tower] = {}
        for modality, part in parts.items():
            build = _image_tower if modality == "image" else _text_tower
            with _naming(modality if len(parts) > 1 else "", spec):
                tower = build(spec, root, folder, part, device)
                if _overflows(config):
                    tower.half = torch.bfloat16
                # The probe also makes the tokenizer's first call, which sets its truncation: later calls only read it.
                towers[modality] = tower.probe()
        return towers


def model_folder(spec: EncoderSpec) -> Path:
    """Return the folder of a model's files: a local one, or a download from the hub.

    Raises EncoderError if it is not available, has no safetensors, or would let a library read other files.
    """
    return model_and_weights(spec)[0]


def model_and_weights(spec: EncoderSpec) -> tuple[Path, Weights]:
    """Return what ``model_folder`` does, and the weights that are there."""
    root = _root(spec)
    folder = transformer_folder(spec, root)
    return folder, _check(spec, folder, root)


def open_tokenizer(folder: Path) -> Any:
    """Open the tokenizer of a folder that ``model_folder`` gave."""
    return AutoTokenizer.from_pretrained(folder, **own_tokenizer(folder), **OFFLINE)


def _root(spec: EncoderSpec) -> Path:
    """Return the folder of a repository. In some, that of the model is inside."""
    if not spec.model:
        raise EncoderError("hf needs a model: hf:bert-base-uncased, or a local folder such as hf:./folder")
    if not is_path(spec.model):
        return fetch(spec, spec.model, FILES, spec.weights or None)
    folder = Path(spec.model).expanduser()
    if not folder.is_dir():
        raise EncoderError(f"cannot open {spec}: there is no folder {folder}")
    if spec.weights:
        raise EncoderError(f"cannot open {spec}: a local folder has no revision {spec.weights!r}")
    return folder


def _check(spec: EncoderSpec, folder: Path, root: Path) -> Weights:
    """Check all files of a folder that the library will read, and return its weights."""
    check_files(spec, folder, root)
    if not (folder / "config.json").is_file():
        raise EncoderError(f"cannot open {spec}: there is no config.json in {folder}")
    weights = find_weights(spec, folder, root)
    check_settings(spec, folder, weights)
    return weights


def _image_tower(spec: EncoderSpec, root: Path, folder: Path, part: Part, device: str) -> FrozenTower:
    processor = open_processor(spec, folder, part.config, OFFLINE)
    pooling = choose_pooling(spec, part, processor)
    if pooling != "pooler":
        part.drop_pooler()
    return HFImageTower(part, processor, device, _provenance(part), pooling)


def _text_tower(spec: EncoderSpec, root: Path, folder: Path, part: Part, device: str) -> FrozenTower:
    asked = read_sentence_folder(spec, root)
    try:
        tokenizer = open_tokenizer(folder)
    except Exception as error:
        raise EncoderError(f"cannot open {spec}: its tokenizer is missing or broken: {brief(error)}") from error
    _check_tokenizer(spec, folder, tokenizer)
    if asked.lower_case:
        lower_case(tokenizer)
    rules = tokenizer_fingerprint(tokenizer)  # before the first call: a fast tokenizer keeps that call's truncation
    _check_vocabulary(spec, part, tokenizer)
    poolings = choose_poolings(spec, part, tokenizer, asked)
    if "pooler" not in poolings:
        part.drop_pooler()
    return HFTextTower(spec, part, tokenizer, asked, device, {**_provenance(part), "tokenizer": rules}, poolings)


def _provenance(part: Part) -> dict[str, str]:
    settings = {key: value for key, value in part.config.to_dict().items() if key not in UNUSED}
    return {
        "family": "hf",
        "architecture": f"{type(part.model).__name__} {fingerprint(settings)}",
        "weights": weights_digest(part.model),
        "library": library(transformers),
    }


def _check_tokenizer(spec: EncoderSpec, folder: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse a folder without a tokenizer's files, for which the library has defaults."""
    names = tokenizer.vocab_files_names
    needed = [names[kind] for kind in ("vocab_file", "merges_file") if kind in names] or ["tokenizer_config.json"]
    whole = names.get("tokenizer_file", "tokenizer.json")
    if not (folder / whole).is_file() and not all((folder / name).is_file() for name in needed):
        raise EncoderError(f"cannot open {spec}: its tokenizer is missing: neither {whole} nor {' and '.join(needed)}")
    if not (folder / "tokenizer_config.json").is_file() and not _is_as_stated(folder / whole, tokenizer):
        raise EncoderError(
            f"cannot open {spec}: without tokenizer_config.json, the library prepares texts in another way than its "
            f"tokenizer may; put that file there"
        )


def _check_vocabulary(spec: EncoderSpec, part: Part, tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse a tokenizer with tokens that the model does not know. Special tokens count if every text has them."""
    limit = n_embeddings(part)
    ids = {*tokenizer.get_vocab().values()} - {*tokenizer.all_special_ids} | {*tokenizer("")["input_ids"]}
    if limit is not None and any(i >= limit for i in ids):
        raise EncoderError(
            f"cannot open {spec}: its tokenizer has more tokens than the {limit:,} of its model; it may be another's"
        )


def _is_as_stated(path: Path, tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether a tokenizer prepares texts as its file states. Without settings, the library has defaults of its own."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or not path.is_file():
        return False
    stated, opened = json.loads(path.read_text(encoding="utf-8")), json.loads(backend.to_str())
    return all(stated.get(part) == opened.get(part) for part in ("normalizer", "pre_tokenizer"))


def _overflows(config: PretrainedConfig) -> bool:
    """Whether a model's activations exceed float16: T5's do, and those of models trained in bfloat16."""
    kind = config.model_type
    return config.is_encoder_decoder or "t5" in kind or "switch" in kind or str(config.dtype).endswith("bfloat16")


@contextmanager
def _naming(modality: str, spec: EncoderSpec) -> Iterator[None]:
    """Let an error of a model with two encoders say which one it is about."""
    try:
        yield
    except EncoderError as error:
        if not modality:
            raise
        both = ", and pooling is for both" if spec.option("pooling") else ""
        raise EncoderError(f"{error}; this is its {modality} encoder{both}") from error


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
