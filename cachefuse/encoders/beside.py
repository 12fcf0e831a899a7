"""Files beside weights, checked against what their library knows, and the sizes of the weights against the model's."""

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeAlias

from torch import nn

from cachefuse.encoders.base import EncoderSpec
from cachefuse.encoders.model_files import Shape
from cachefuse.errors import EncoderError

Rule: TypeAlias = tuple[Callable[[Any], bool], str]  # whether a value is known, and which are


def one_of(*values: str) -> Rule:
    return (lambda value: isinstance(value, str) and value in values), ", ".join(values)


def is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def numbers(*lengths: int, above: float = -math.inf, alone: bool = False) -> Rule:
    """Return the rule for a list of numbers, one a channel, or for one number for all if it may be ``alone``."""
    words = f"{' or '.join(map(str, lengths))} numbers{'' if above == -math.inf else f' above {above:g}'}"

    def known(value: Any) -> bool:
        channels = [value] if alone and is_number(value) else value
        is_list = isinstance(channels, list | tuple) and (channels is not value or len(channels) in lengths)
        return is_list and all(is_number(x) and x > above for x in channels)

    return known, words


def check_values(spec: EncoderSpec, path: Path, stated: Mapping[str, Any], rules: Mapping[str, Rule]) -> None:
    """Raise EncoderError for a value that a file states and its library does not know, or would not read as stated."""
    for name, (known, words) in rules.items():
        if stated.get(name) is not None and not known(stated[name]):
            raise EncoderError(f"cannot open {spec}: {name} in {path} is {stated[name]!r}; it must be: {words}")


def check_sizes(
    spec: EncoderSpec,
    stored: Mapping[str, Shape],
    model: nn.Module,
    words: Callable[[str, Shape], str],
    advice: str,
    same: Callable[[str, Shape], bool] = lambda name, shape: False,
) -> None:
    """Raise EncoderError if weights are of another size than the model: its library would resample or cut them.

    ``stored`` are the shapes of the file, by the model's names. Another shape of as many numbers is the same, and so is
    what ``same`` says. ``words`` says what a shape means, as in "224 px", if it knows.
    """
    for name, tensor in model.state_dict().items():
        shape = tuple(tensor.shape)
        if name in stored and math.prod(stored[name]) != math.prod(shape) and not same(name, stored[name]):
            theirs, ours = (_describe(one, words(name, one)) for one in (stored[name], shape))
            raise EncoderError(
                f"cannot open {spec}: the library would resize its weights: {name} is {theirs} in the file, and "
                f"{ours} in the model; {advice}"
            )


def pixels(n_rows: int, n_prefix: int, patch: int) -> str:
    """Say which images a table of positions is for: their side if it is square, else the number of positions."""
    side = round(max(0, n_rows - n_prefix) ** 0.5)
    return f"{side * patch} px" if side and side * side + n_prefix == n_rows else f"{n_rows} positions"


def _describe(shape: Shape, words: str) -> str:
    return " x ".join(map(str, shape)) + (f" ({words})" if words else "")
