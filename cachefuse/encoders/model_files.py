"""Which files of a model's folder its library will read. Each is checked before the library opens anything.

A library decides by names in the folder and in its JSON files what it reads, and unpickles what is not safetensors.
So the list of files is made here first: regular files in the folder itself, small enough, and weights in safetensors.
"""

import json
import math
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, TypeAlias

from safetensors import safe_open

from cachefuse.device import total_memory
from cachefuse.encoders.base import PICKLES, EncoderSpec
from cachefuse.errors import EncoderError
from cachefuse.files import JsonObject, format_bytes, read_bounded

Shape: TypeAlias = tuple[int, ...]

MAX_JSON = 16 << 20  # bytes of a configuration, or of an index of weights
MAX_RULES = 128 << 20  # bytes of a tokenizer's file; those of models with 256,000 tokens have 35 MB
MAX_DEPTH = 100  # of lists and objects in each other
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"  # which transformers looks for, in this order
JSON_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "preprocessor_config.json",
    "processor_config.json",
    "video_preprocessor_config.json",
    "modules.json",
    "config_sentence_transformers.json",
    "sentence_*_config.json",
    INDEX,
)
TOKENIZER_FILES = (
    "tokenizer*",
    "vocab*",
    "*vocab.*",
    "*vocabulary*",
    "merges*",
    "*.model",
    "*.spm",
    "*.tiktoken",
    "*.codes",
    "*.jinja",
    "dict.txt",
    "*tokenizer",
    "unigram.json",
    "normalizer.json",
    "emoji.json",
    "tekken.json",
)
ADAPTER = "adapter_config.json"  # of PEFT, whose weights belong to a model that it names


@dataclass(frozen=True)
class Weights:
    """The files of a model's weights, in the library's order, and what they hold: shapes and types by name."""

    files: tuple[Path, ...]
    shapes: dict[str, Shape]
    dtypes: dict[str, str]  # as safetensors calls them: "F32", "I8"
    n_elements: int

    @property
    def integers(self) -> dict[str, str]:
        """The types of those tensors that are not floats."""
        return {name: dtype for name, dtype in self.dtypes.items() if not dtype.startswith(("F", "BF"))}

    @property
    def longest(self) -> int:
        """The largest dimension of any tensor."""
        return max((n for shape in self.shapes.values() for n in shape), default=0)


def read_json(spec: EncoderSpec, path: Path) -> JsonObject:
    """Read a file's object. Raises EncoderError, with the file, for another content or another kind of file."""
    content = read_any_json(spec, path)
    if not isinstance(content, dict):
        raise EncoderError(f"cannot open {spec}: {path} is not a JSON object")
    return content


def read_any_json(spec: EncoderSpec, path: Path) -> Any:
    """Read a JSON file of at most 16 MB. Raises EncoderError, with the file, if it is none."""
    try:
        content = json.loads(read_bounded(path, MAX_JSON).decode("utf-8"))
    except OSError as error:
        raise EncoderError(f"cannot open {spec}: {path} {error.strerror}") from error
    except ValueError as error:
        raise EncoderError(f"cannot open {spec}: {path} is not valid JSON: {error}") from error
    except RecursionError:
        raise EncoderError(f"cannot open {spec}: {path} is nested too deeply") from None
    if _is_deeper(content, MAX_DEPTH):
        raise EncoderError(f"cannot open {spec}: {path} is nested deeper than {MAX_DEPTH} levels")
    return content


def check_files(spec: EncoderSpec, folder: Path, root: Path | None = None) -> None:
    """Check all files of a folder that a library may read as settings or as a tokenizer.

    Raises EncoderError for one that is not a regular file, that is too large, or that is a link out of ``root``, by
    default the folder itself.
    """
    for path in _entries(folder, (*JSON_FILES, *TOKENIZER_FILES)):
        is_json = any(fnmatchcase(path.name, pattern) for pattern in JSON_FILES)
        check_file(spec, path, root or folder, MAX_JSON if is_json else MAX_RULES)
    templates = folder / "additional_chat_templates"
    for path in _entries(templates, ("*",)) if templates.is_dir() else ():
        check_file(spec, path, root or folder, MAX_RULES)


def check_file(spec: EncoderSpec, path: Path, root: Path, most: int | None = None) -> None:
    """Raise EncoderError if a file is not a regular one inside ``root``, or has more than ``most`` bytes."""
    try:
        status = path.stat()
    except OSError as error:
        raise EncoderError(f"cannot open {spec}: {path}: {error.strerror}") from error
    if not stat.S_ISREG(status.st_mode):
        raise EncoderError(f"cannot open {spec}: {path} is not a regular file")
    if not is_inside(path, root):
        raise EncoderError(f"cannot open {spec}: {path} is a link out of its folder; put a copy of the file there")
    if most is not None and status.st_size > most:
        size, limit = format_bytes(status.st_size), format_bytes(most)
        raise EncoderError(f"cannot open {spec}: {path} has {size}; at most {limit} are read")


def is_inside(path: Path, root: Path) -> bool:
    """Whether a path is in a folder, links followed. The hub's cache has links to the same repository's blobs."""
    root, target = root.resolve(), path.resolve()
    blobs = root.parent.parent / "blobs"
    return target.is_relative_to(root) or (root.parent.name == "snapshots" and target.is_relative_to(blobs))


def find_weights(spec: EncoderSpec, folder: Path, root: Path | None = None) -> Weights:
    """Return what transformers will load of a folder: model.safetensors, or the files that its index names.

    Raises EncoderError if a name leads anywhere else than to a safetensors file in the folder, or if one is missing.
    """
    root = root or folder
    if (folder / WEIGHTS).is_file():
        return read_weights(spec, [folder / WEIGHTS], root)
    if not (folder / INDEX).is_file():
        pickles = sorted(path.name for path in folder.iterdir() if path.suffix in PICKLES)
        advice = f", only {pickles[0]}, a pickle, which can run code; convert it to safetensors" if pickles else ""
        raise EncoderError(f"cannot open {spec}: it has no .safetensors weights named {WEIGHTS}{advice}")
    check_file(spec, folder / INDEX, root, MAX_JSON)
    names = read_json(spec, folder / INDEX).get("weight_map")
    if not isinstance(names, dict) or not names:
        raise EncoderError(f"cannot open {spec}: {folder / INDEX} has no weight_map")
    for key, name in names.items():
        if not isinstance(name, str) or not is_bare(name) or not name.endswith(".safetensors"):
            raise EncoderError(
                f"cannot open {spec}: weight_map in {folder / INDEX} says that {key} is in {name!r}; it must be a "
                f".safetensors file of the folder"
            )
    weights = read_weights(spec, [folder / name for name in sorted(set(names.values()))], root)
    if lacking := sorted(names.keys() - weights.shapes.keys()):
        raise EncoderError(f"cannot open {spec}: its weights lack {lacking[0]}, which {folder / INDEX} names")
    return weights


def read_weights(spec: EncoderSpec, files: list[Path], root: Path | None = None) -> Weights:
    """Read the headers of safetensors files, which must lie in ``root`` if it is given.

    Raises EncoderError for a file that is damaged or of another kind, and for more than fits into memory.
    """
    shapes: dict[str, Shape] = {}
    dtypes: dict[str, str] = {}
    for path in files:
        check_file(spec, path, root or path.resolve().parent)
        if not path.stat().st_size:  # a placeholder: the model may be refused by its kind, and the library refuses it
            continue
        try:
            with safe_open(path, "pt") as file:  # the library checks the header and all offsets
                for name in file.keys():  # noqa: SIM118 (not a dictionary)
                    stored = file.get_slice(name)
                    shapes[name], dtypes[name] = tuple(stored.get_shape()), stored.get_dtype()
        except Exception as error:  # the library's error is an Exception without a class of its own in some versions
            raise EncoderError(f"cannot open {spec}: {path} is not a whole safetensors file: {error}") from error
    n_elements = sum(math.prod(shape) for shape in shapes.values())
    if 4 * n_elements > total_memory():
        raise EncoderError(
            f"cannot open {spec}: its weights take {format_bytes(4 * n_elements)} in float32; this machine has "
            f"{format_bytes(total_memory())} of memory"
        )
    return Weights(tuple(files), shapes, dtypes, n_elements)


def is_bare(name: str) -> bool:
    """Whether a name is that of a file in the same folder, on any system."""
    return not set(name) & {"/", "\\", ":", "\0"} and name not in ("", ".", "..")


def _entries(folder: Path, patterns: tuple[str, ...]) -> Iterator[Path]:
    """Yield what is in a folder by these names, without folders."""
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
        if any(fnmatchcase(entry.name, pattern) for pattern in patterns) and not entry.is_dir():
            yield Path(entry.path)


def _is_deeper(content: Any, most: int) -> bool:
    """Whether lists and objects lie in each other more than ``most`` times."""
    level = [content]
    for _ in range(most):
        level = [inner for outer in level if isinstance(outer, dict | list) for inner in _values(outer)]
        if not level:
            return False
    return any(isinstance(one, dict | list) for one in level)


def _values(outer: dict[str, Any] | list[Any]) -> list[Any]:
    return list(outer.values()) if isinstance(outer, dict) else outer
