"""What a model's JSON files may say: no other file or folder, and no numbers that its weights cannot have."""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from cachefuse.encoders.base import PICKLES, EncoderSpec
from cachefuse.encoders.beside import is_number
from cachefuse.encoders.model_files import ADAPTER, Weights, check_file, read_json
from cachefuse.errors import EncoderError

# Text under these keys names nothing that is read: where a model came from, code that is never run, names of classes,
# tokens and templates.
NOT_READ = re.compile(
    r"name_or_path$|^auto_map$|^special_tokens_map_file$|^(id2label|label2id|task_specific_params|pretrained_cfg)$"
    r"|chat_template|_tokens?$|^added_tokens_decoder$|^prompts$|^licen[cs]e"
)
ELSEWHERE = re.compile(
    r"[/~\\]|\.\.?[/\\]|[A-Za-z]:[/\\]|(local-dir|hf-hub|hf_hub|file):", re.IGNORECASE
)  # at the start
CLIMBS = re.compile(r"(^|[/\\])\.\.([/\\]|$)")
SUFFIXES = {*PICKLES, ".safetensors", ".h5", ".msgpack", ".npz", ".npy", ".gguf", ".onnx", ".so", ".py"}
REPOSITORIES = re.compile(r"implementation|backbone")  # keys whose org/name would be downloaded
LOADING = {  # what makes a library load other weights than those of the folder
    "transformers_weights",
    "use_pretrained_backbone",
    "pretrained",
    "pretrained_cfg_overlay",
    "pretrained_model_args",
    "checkpoint_path",
    "cache_dir",
    "gguf_file",
}

MAX_COUNT = 16_384  # of anything, where no tensor has a larger dimension
MAX_LAYERS = 1_024  # where there are not more tensors: layers may share their weights
MAX_COMPUTED = 1 << 24  # positions and tokens: some models compute them, so that no tensor shows their number
MAX_LABELS = 1_000_000  # each gets a name
MAX_TOKENIZER_COUNT = 1_000_000
MAX_SIDE = 4_096  # pixels of an image's side
LAYERS = re.compile(r"(^|_)(layers?|depths?|blocks|repeats|groups)$")
DEPTHS = {"num_hidden_layers", "num_layers", "n_layer", "n_layers", "depth", "depths"}
LABELS = re.compile(r"num_labels$")
COMPUTED = re.compile(r"position|ctx|context|seq_len|max_len|vocab")
# Not sizes: numbers of tokens, bases of positions, spans of attention, lengths of texts to write.
OTHER_NUMBERS = re.compile(r"_ids?$|theta|base$|length|sliding_window|distance|pixels|version|seed|budget|index|rate$")
TOKENIZER_NUMBERS = re.compile(r"length|max_len|_id$")
NOT_PIXELS = re.compile(r"pixels|_ids?$|^num_|^max_")


def check_settings(spec: EncoderSpec, folder: Path, weights: Weights) -> None:
    """Check all JSON files of a folder of transformers that are there.

    Raises EncoderError, with the key, for one that names what lies elsewhere, or for a number that is too large.
    """
    if (folder / ADAPTER).exists():
        raise EncoderError(
            f"cannot open {spec}: {ADAPTER} makes it an adapter of another model; merge it into its base model"
        )
    check_model_settings(spec, folder / "config.json", read_json(spec, folder / "config.json"), weights)
    check_tokenizer_settings(spec, folder)
    for name in ("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json"):
        if (folder / name).is_file():
            stated = read_json(spec, folder / name)
            check_names(spec, folder / name, stated)
            check_sides(spec, folder / name, stated)


def check_model_settings(spec: EncoderSpec, path: Path, stated: Any, weights: Weights) -> None:
    """Check what a file states of a model's sizes, against the weights.

    Whether each tensor fits is known once the model is built. This is so that building it takes no more time and memory
    than the weights do.
    """
    check_names(spec, path, stated)
    most = max(MAX_COUNT, weights.longest)
    for key, value in _numbers(stated):
        if key in DEPTHS and value < 1:
            raise EncoderError(f"cannot open {spec}: {key} in {path} is {value}; a model has at least 1 layer")
        if LAYERS.search(key):
            limit, why = max(MAX_LAYERS, len(weights.shapes)), f"the weights have {len(weights.shapes):,} tensors"
        elif LABELS.search(key):
            limit, why = MAX_LABELS, f"at most {MAX_LABELS:,} are taken"
        elif COMPUTED.search(key):
            limit, why = max(MAX_COMPUTED, weights.longest), f"at most {MAX_COMPUTED:,} are taken"
        elif OTHER_NUMBERS.search(key):
            continue
        else:
            limit, why = most, f"the weights' largest dimension is {weights.longest:,}"
        if value > limit:
            raise EncoderError(f"cannot open {spec}: {key} in {path} is {_shown(value)}, but {why}")


def check_tokenizer_settings(spec: EncoderSpec, folder: Path) -> None:
    """Check the settings of a folder's tokenizer. A file that they name must be one of the folder."""
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        path = folder / name
        if not path.is_file():
            continue
        stated = read_json(spec, path)
        for key, text in _texts(stated):
            if key.endswith("_file") and not NOT_READ.search(key) and not _is_own(spec, folder, key, text):
                raise EncoderError(
                    f"cannot open {spec}: {key} in {path} is {text!r}, which is not a file of the folder"
                )
        check_names(spec, path, stated, skip="_file")
        for key, value in _numbers(stated):
            if value > MAX_TOKENIZER_COUNT and not TOKENIZER_NUMBERS.search(key):
                raise EncoderError(
                    f"cannot open {spec}: {key} in {path} is {_shown(value)}; at most {MAX_TOKENIZER_COUNT:,} are taken"
                )


def check_names(spec: EncoderSpec, path: Path, stated: Any, skip: str | None = None) -> None:
    """Raise EncoderError, with the key, for text that names a file, a folder or a repository."""
    for key, value in _below(stated):
        if key in LOADING and value not in (None, False, "", [], {}):
            raise EncoderError(f"cannot open {spec}: {key} in {path} would load other weights; leave it out")
    for key, text in _texts(stated):
        if skip is not None and key.endswith(skip):
            continue
        elsewhere = ELSEWHERE.match(text) or CLIMBS.search(text) or Path(text).suffix.lower() in SUFFIXES
        if elsewhere or (REPOSITORIES.search(key) and "/" in text):
            raise EncoderError(
                f"cannot open {spec}: {key} in {path} is {text!r}; a file or folder elsewhere is not read: leave it out"
            )


def check_sides(spec: EncoderSpec, path: Path, stated: Any) -> None:
    """Raise EncoderError for images of more pixels than any model takes, before or after they are cropped."""
    numbers = [(key, value) for key, value in _below(stated) if is_number(value)]
    part = min((value for key, value in numbers if key == "crop_pct" and value > 0), default=1)
    for key, value in numbers:
        if max(value, value / min(part, 1)) > MAX_SIDE and not NOT_PIXELS.search(key):
            raise EncoderError(
                f"cannot open {spec}: {key} in {path} is {value:.6g}{f', and crop_pct {part:g}' if part < 1 else ''}; "
                f"images of at most {MAX_SIDE:,} px a side are prepared"
            )


def own_tokenizer(folder: Path) -> Mapping[str, str]:
    """Return what makes a tokenizer of transformers read a folder's own rules, whatever its settings name."""
    path = folder / "tokenizer.json"
    return {"tokenizer_file": str(path)} if path.is_file() else {}


def _is_own(spec: EncoderSpec, folder: Path, key: str, text: str) -> bool:
    """Whether a setting of a tokenizer names a file of the folder. A tokenizer.json is read wherever it says it is."""
    if key == "tokenizer_file" and (folder / "tokenizer.json").is_file():
        return True
    if Path(text).name != text or not (folder / text).is_file():
        return False
    check_file(spec, folder / text, folder)
    return True


def _below(stated: Any) -> Iterator[tuple[str, Any]]:
    """Yield all keys that are read, with their values; for a list, its key with each of its values."""
    rest = [("", stated)]
    while rest:
        key, value = rest.pop()
        if NOT_READ.search(key):
            continue
        yield key, value
        if isinstance(value, dict):
            rest += value.items()
        elif isinstance(value, list):
            rest += [(key, one) for one in value]


def _texts(stated: Any) -> Iterator[tuple[str, str]]:
    return ((key, value) for key, value in _below(stated) if isinstance(value, str))


def _numbers(stated: Any) -> Iterator[tuple[str, int]]:
    return ((key, value) for key, value in _below(stated) if isinstance(value, int) and not isinstance(value, bool))


def _shown(value: int) -> str:
    return f"{value:,}" if abs(value) < 10**15 else f"{value:.3g}" if abs(value) < 10**300 else "a huge number"
