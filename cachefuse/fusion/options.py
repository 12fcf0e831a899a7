"""A fusion's options as the user gives them: check them and convert them to the types of their defaults."""

import math
from collections.abc import Mapping
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any

from cachefuse.errors import ConfigError
from cachefuse.registry import Options

if TYPE_CHECKING:
    from cachefuse.fusion.base import Fusion

# They come from files, classes or training rows, not from the user.
DERIVED_OPTIONS = ("architecture", "answer_tokens", "n_landmarks", "n_columns", "n_neighbours", "n_weights")
KINDS: dict[type, str] = {int: "a whole number", float: "a number", str: "text"}
NUMBERS: dict[type, tuple[type, ...]] = {int: (Integral,), float: (Real,)}  # of Python and NumPy


def typed_options(fusion: "type[Fusion]", given: Options) -> Options:
    """Return all options of a fusion. Raises ConfigError for an unknown option or a value of another type."""
    known = fusion.options()
    for name, value in given.items():
        # A text is what a user gives; these options are never texts.
        if name not in known or (name in DERIVED_OPTIONS and isinstance(value, str)):
            names = ", ".join(option for option in known if option not in DERIVED_OPTIONS)
            choices = f"its options are: {names}" if names else "it has none"
            raise ConfigError(f"fusion {fusion.name!r} has no option {name!r}; {choices}")
    return {name: _as_type(name, given.get(name, default), default) for name, default in known.items()}


def changed_options(fusion: "type[Fusion]", options: Options) -> Options:
    """Return the options that differ from the fusion's defaults, without those in ``DERIVED_OPTIONS``."""
    defaults = fusion.options()
    return {
        name: value for name, value in options.items() if name not in DERIVED_OPTIONS and value != defaults.get(name)
    }


def _as_type(name: str, value: Any, default: Any) -> Any:
    """Convert an option's value, which may be text, to the type of its default.

    An option with text as default may also be a mapping, such as pool. An option with None as default may be anything.
    """
    kind = type(default)
    if kind not in KINDS or (kind is str and isinstance(value, Mapping)):
        return value
    try:
        if isinstance(value, (str, *NUMBERS.get(kind, ()))) and not isinstance(value, bool):
            found = kind(value)
            if kind is str or math.isfinite(found):
                return found
    except ValueError:
        pass
    raise ConfigError(f"fusion option {name} must be {KINDS[kind]}. Got {value!r} instead")
