"""Folders of sentence-transformers: which modules follow the transformer, and with what settings.

``modules.json`` and each module's own ``config.json`` are read whole. What they ask for and is not done here is
refused: vectors of half a model would look right.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from cachefuse.encoders.base import EncoderSpec
from cachefuse.encoders.frozen import weights_digest
from cachefuse.encoders.model_files import check_file, is_inside, read_any_json, read_weights
from cachefuse.encoders.pooling import POOLINGS
from cachefuse.errors import EncoderError
from cachefuse.files import JsonObject

LEGACY_POOLINGS = {  # each a flag of its own, before sentence-transformers 6
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}
TRANSFORMER_CONFIGS = tuple(
    f"sentence_{name}_config.json"
    for name in ("bert", "roberta", "distilbert", "camembert", "albert", "xlm-roberta", "xlnet")
)
# What a transformer's settings may say. Lengths and expansions of queries need a task, which nobody gives here.
TASK_SETTINGS = {"query_length", "document_length", "query_expansion", "unpad_inputs"}
FORWARD = {"method": "forward", "method_output_name": "last_hidden_state"}
HARMLESS = {"trust_remote_code", "torch_dtype", "dtype", "attn_implementation"}  # which change no feature in float32


@dataclass
class SentenceFolder:
    """What a folder asks for. A folder of plain transformers asks for nothing."""

    transformer: Path  # the folder of the weights and the tokenizer
    poolings: tuple[str, ...] = ()  # of POOLINGS, to concatenate
    include_prompt: bool = True  # whether the prompt's tokens count
    after: nn.Sequential = field(default_factory=nn.Sequential)  # from pooled (B, D) to (B, D')
    names: tuple[str, ...] = ()  # of the modules in ``after``
    prompt: str = ""  # written before every text
    max_length: int | None = None
    lower_case: bool = False

    def takes(self) -> int | None:
        """Return the width that the modules after the pooling take; None for any."""
        for layer in self.after:
            if isinstance(layer, Dense):
                return layer.linear.in_features
            if isinstance(layer, nn.LayerNorm):
                return layer.normalized_shape[0]
        return None

    def facts(self) -> dict[str, str]:
        """Return what of it a key records, beside the pooling. Nothing for a folder with a pooling only."""
        facts = {}
        if self.names:
            weights = f" {weights_digest(self.after)}" if self.after.state_dict() else ""
            facts["modules"] = ", ".join(self.names) + weights
        if self.prompt:
            facts["prompt"] = self.prompt if self.include_prompt else f"{self.prompt} (not pooled)"
        return facts


class Dense(nn.Module):
    """A linear layer and an activation; with ``residual``, its input is added, by a layer of its own where needed."""

    def __init__(self, width: int, out: int, bias: bool, activation: nn.Module, residual: bool):
        super().__init__()
        self.linear = nn.Linear(width, out, bias=bias)
        self.activation_function = activation
        self.use_residual = residual
        if residual and width != out:
            self.residual = nn.Linear(width, out, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """From (B, D) to (B, D')."""
        y: Tensor = self.activation_function(self.linear(x))
        if self.use_residual:
            y = y + (self.residual(x) if hasattr(self, "residual") else x)
        return y


class Normalize(nn.Module):
    """Scale vectors (B, D) to length 1."""

    def forward(self, x: Tensor) -> Tensor:
        """Keep the shape."""
        return F.normalize(x, dim=-1)


class Truncate(nn.Module):
    """Keep the first features of vectors (B, D)."""

    def __init__(self, width: int):
        super().__init__()
        self.width = width

    def forward(self, x: Tensor) -> Tensor:
        """From (B, D) to (B, width), or as it is if D is less."""
        return x[:, : self.width]


def transformer_folder(spec: EncoderSpec, folder: Path) -> Path:
    """Return the folder of the weights: the folder, or the subfolder that modules.json names first.

    Raises EncoderError for a folder elsewhere.
    """
    modules = _read(spec, folder, folder / "modules.json")
    path = str(modules[0].get("path", "")) if _is_list_of_modules(modules) else ""
    inside = folder / path
    if not is_inside(inside, folder):
        raise EncoderError(f"cannot open {spec}: path in its modules.json is {path!r}, which is not in the folder")
    return inside if path and (inside / "config.json").is_file() else folder


def read_sentence_folder(spec: EncoderSpec, folder: Path) -> SentenceFolder:
    """Read a folder's modules. Raises EncoderError for a module or a setting that is not done here, by its name."""
    modules = _read(spec, folder, folder / "modules.json")
    if (folder / "modules.json").is_file() and not _is_list_of_modules(modules):
        raise EncoderError(f"cannot open {spec}: its modules.json must list a Transformer, a Pooling, and what follows")
    if not modules:  # older folders, and copies of them, have the pooling alone
        pooling = _read(spec, folder, folder / "1_Pooling" / "config.json")
        modules = [{"path": "", "type": "sentence_transformers.models.Transformer"}]
        modules += [{"path": "1_Pooling", "type": "sentence_transformers.models.Pooling"}] if pooling else []
    asked = SentenceFolder(transformer_folder(spec, folder))
    names: list[str] = []
    for i, module in enumerate(modules):
        package, _, kind = str(module.get("type", "")).rpartition(".")
        path = folder / str(module.get("path", ""))
        if not is_inside(path, folder):
            where = module.get("path")
            raise EncoderError(f"cannot open {spec}: path in its modules.json is {where!r}, which is not in the folder")
        if not package.startswith("sentence_transformers"):
            raise EncoderError(f"cannot open {spec}: its modules.json asks for {kind or module}, code of its own")
        match kind:
            case "Transformer" if i == 0:
                _read_transformer(spec, folder, path, asked)
            case "Pooling" if i == 1:
                _read_pooling(spec, folder, path, asked)
            case "Dense" | "Normalize" | "LayerNorm" if i > 1:
                layer, name = _layer(spec, folder, kind, path)
                asked.after.append(layer)
                names.append(name)
            case "Dropout":  # it changes nothing outside training
                pass
            case _:
                raise EncoderError(
                    f"cannot open {spec}: its modules.json asks for {kind} as module {i}, which hf lacks"
                )
    truncated = _read_settings(spec, folder, asked)
    asked.names = (*names, *truncated)
    return asked


def _read_transformer(spec: EncoderSpec, root: Path, path: Path, asked: SentenceFolder) -> None:
    config: JsonObject = next((found for name in TRANSFORMER_CONFIGS if (found := _read(spec, root, path / name))), {})
    asked.max_length = config.pop("max_seq_length", None)
    if asked.max_length is not None and type(asked.max_length) is not int:
        raise EncoderError(f"cannot open {spec}: its max_seq_length must be a number. Got {asked.max_length!r} instead")
    asked.lower_case = bool(config.pop("do_lower_case", False))
    for name, value in config.items():
        match name:
            case "transformer_task":
                known = value == "feature-extraction"
            case "modality_config":
                known = {key: value["text"][key] for key in FORWARD} == FORWARD
            case "module_output_name":
                known = value == "token_embeddings"
            case "model_args" | "model_kwargs":
                known = set(value or {}) <= HARMLESS
            case "tokenizer_args" | "processor_kwargs" | "config_args" | "config_kwargs":
                known = set(value or {}) <= {"trust_remote_code"}
            case _:
                known = name in TASK_SETTINGS or not value
        if not known:
            raise EncoderError(f"cannot open {spec}: its Transformer module asks for {name} {value}, which hf lacks")


def _read_pooling(spec: EncoderSpec, root: Path, path: Path, asked: SentenceFolder) -> None:
    config = _config(spec, root, path)
    modes = config.get("pooling_mode", "") or ()
    if "pooling_mode" not in config:
        unknown = [key for key, on in config.items() if key.startswith("pooling_mode_") and on]
        modes = [mode for key, mode in LEGACY_POOLINGS.items() if config.get(key)]
        modes += sorted(set(unknown) - set(LEGACY_POOLINGS))  # refused by name below
        modes = modes or ["mean"]
    asked.poolings = (modes,) if isinstance(modes, str) else tuple(modes)
    if not asked.poolings:
        raise EncoderError(f"cannot open {spec}: its Pooling module names no pooling_mode")
    for mode in asked.poolings:
        if mode not in POOLINGS:
            raise EncoderError(f"cannot open {spec}: its Pooling module asks for {mode}; hf has {', '.join(POOLINGS)}")
    asked.include_prompt = bool(config.get("include_prompt", True))


def _layer(spec: EncoderSpec, root: Path, kind: str, path: Path) -> tuple[nn.Module, str]:
    """Return a module after the pooling, with its weights, and what a key calls it."""
    config = _config(spec, root, path) if kind != "Normalize" else _read(spec, root, path / "config.json")
    for name in ("module_input_name", "module_output_name"):
        if config.get(name) not in (None, "sentence_embedding"):
            raise EncoderError(f"cannot open {spec}: its {kind} module is for {config[name]}, which hf lacks")
    if kind == "Normalize":
        return Normalize(), "normalize"
    weights = _weights(spec, root, path)
    layer: nn.Module
    if kind == "LayerNorm":
        with torch.device("meta"):
            layer, name = nn.LayerNorm(int(config["dimension"])), "layer norm"
        weights = {key.removeprefix("norm."): value for key, value in weights.items()}
    else:
        sizes = int(config["in_features"]), int(config["out_features"])
        activation = _activation(spec, config.get("activation_function", "torch.nn.modules.activation.Tanh"))
        with torch.device("meta"):  # shapes only: the values come from the file
            layer = Dense(*sizes, bool(config.get("bias", True)), activation, bool(config.get("use_residual")))
        name = f"dense {sizes[0]} to {sizes[1]} {type(activation).__name__}"
    # Strict: none is missing, and none is left.
    layer.load_state_dict({key: value.float() for key, value in weights.items()}, assign=True)
    return layer, name


def _activation(spec: EncoderSpec, name: str) -> nn.Module:
    package, _, kind = str(name).rpartition(".")
    found = getattr(nn, kind, None)
    if not package.startswith("torch.nn") or not (isinstance(found, type) and issubclass(found, nn.Module)):
        raise EncoderError(f"cannot open {spec}: its Dense module asks for the activation {name}, which hf lacks")
    activation: nn.Module = found()
    return activation


def _weights(spec: EncoderSpec, root: Path, path: Path) -> Mapping[str, Tensor]:
    file = path / "model.safetensors"
    if not file.is_file():
        raise EncoderError(f"cannot open {spec}: there is no model.safetensors in {path.name}; a pickle can run code")
    for name, dtype in read_weights(spec, [file], root).integers.items():
        raise EncoderError(f"cannot open {spec}: {name} in {file} is stored as integers ({dtype}); expected floats")
    return load_file(file)


def _is_list_of_modules(modules: Any) -> bool:
    return isinstance(modules, list) and len(modules) > 1 and all(isinstance(module, dict) for module in modules)


def _read_settings(spec: EncoderSpec, folder: Path, asked: SentenceFolder) -> tuple[str, ...]:
    """Read what holds for the whole folder: a prompt, and how many features to keep. Return the name of the latter."""
    config = _read(spec, folder, folder / "config_sentence_transformers.json")
    kind = config.get("model_type", "SentenceTransformer")
    if kind != "SentenceTransformer":
        raise EncoderError(f"cannot open {spec}: it is a {kind}; expected a SentenceTransformer")
    name = config.get("default_prompt_name")
    if name is not None:
        prompts = config.get("prompts") or {}
        if name not in prompts:
            raise EncoderError(f"cannot open {spec}: its default prompt {name} is none of its prompts")
        asked.prompt = prompts[name] or ""
    width = config.get("truncate_dim")
    if width is None:
        return ()
    if type(width) is not int or width < 1:
        raise EncoderError(f"cannot open {spec}: its truncate_dim must be a number, at least 1. Got {width!r} instead")
    asked.after.append(Truncate(width))
    return (f"first {width}",)


def _config(spec: EncoderSpec, root: Path, path: Path) -> JsonObject:
    config: JsonObject = _read(spec, root, path / "config.json")
    if not config:
        raise EncoderError(f"cannot open {spec}: there is no config.json in {path.name}, which modules.json names")
    return config


def _read(spec: EncoderSpec, root: Path, path: Path) -> Any:
    """Return the content of a JSON file in a folder, nothing if it is missing.

    Raises EncoderError for a file that is damaged, too large, or elsewhere.
    """
    if not path.is_file():
        return {}
    check_file(spec, path, root)
    return read_any_json(spec, path)
