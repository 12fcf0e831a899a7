"""What a tokenizer of transformers does to texts beside its rules: a key records it."""

import hashlib
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from transformers import PreTrainedTokenizerBase

from cachefuse.files import JsonObject

# Settings of a call, and what they usually are. A key names only others, so that the keys of older stores stay.
USUAL = {"truncation_side": "right", "split_special_tokens": False}
# Arguments of a slow tokenizer that change no token: where it was read from, or what a key records elsewhere.
ELSEWHERE = {"backend", "chat_template", "is_local", "local_files_only", "model_max_length", "name_or_path"}


def unusual_settings(tokenizer: Any) -> str:
    """Return the settings of a call that are not the usual ones, as ``, name=value``; nothing if all are."""
    values = {name: getattr(tokenizer, name, usual) for name, usual in USUAL.items()}
    return "".join(f", {name}={value}" for name, value in values.items() if value != USUAL[name])


def slow_rules(tokenizer: PreTrainedTokenizerBase) -> JsonObject:
    """Return all that a slow tokenizer cuts texts by: its files, such as merges, its tokens and its arguments."""
    with TemporaryDirectory() as folder:
        saved = tokenizer.save_vocabulary(folder) or ()
        files = {Path(path).name: hashlib.blake2b(Path(path).read_bytes()).hexdigest() for path in saved if path}
    plain = {
        name: value for name, value in tokenizer.init_kwargs.items() if isinstance(value, bool | int | float | str)
    }
    left_out = {name for name in plain if name in ELSEWHERE or name.endswith(("_file", "_token"))}
    return {
        "files": files,
        "vocabulary": sorted(tokenizer.get_vocab().items()),
        "added": {number: repr(token) for number, token in tokenizer.added_tokens_decoder.items()},
        "special": {name: str(token) for name, token in tokenizer.special_tokens_map.items()},
        "arguments": {name: value for name, value in plain.items() if name not in left_out},
    }


def unusual_padding(token: int, usual: int | None, side: str, masked: bool) -> str:
    """Return what texts are padded with, if it is not the usual token at the end and without a mask.

    Nothing if it is. It matters to models that also read the padding.
    """
    return ", ".join([f"token {token}"] * (token != usual) + [side] * (side != "right") + ["masked"] * masked)
