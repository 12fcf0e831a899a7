"""A fusion's options as they are given: checked, of the types of their defaults, and told apart from what was found."""

from collections.abc import Mapping
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any

from cachefuse.errors import ConfigError
from cachefuse.registry import Options

if TYPE_CHECKING:
    from cachefuse.fusion.base import Fusion

FOUND = ("architecture", "answer_tokens")  # options that are not given, but found in files or classes
KINDS: dict[type, str] = {int: "a whole number", float: "a number", str: "text"}
NUMBERS: dict[type, tuple[type, ...]] = {int: (Integral,), float: (Real,)}  # of Python and NumPy


def typed_options(fusion: "type[Fusion]", given: Options) -> Options:
    """Return all options of a fusion. Raises ConfigError for one that it does not have, or of another type."""
    known = fusion.options()
    for name in given:
        if name not in known:
            choices = f"its options are: {', '.join(known)}" if known else "it has none"
            raise ConfigError(f"fusion {fusion.name!r} has no option {name!r}; {choices}")
    return {name: _as_type(name, given.get(name, default), default) for name, default in known.items()}


def changed_options(fusion: "type[Fusion]", options: Options) -> Options:
    """Return options that differ from the fusion's own; what was found is left out."""
    usual = fusion.options()
    return {name: value for name, value in options.items() if name not in FOUND and value != usual.get(name)}


def _as_type(name: str, value: Any, default: Any) -> Any:
    """Return an option's value, which may be given as text, as one of its default's type.

    One that is written as text may also be a mapping, such as pool; of one that is None by default anything goes.
    """
    kind = type(default)
    if kind not in KINDS or (kind is str and isinstance(value, Mapping)):
        return value
    try:
        if isinstance(value, (str, *NUMBERS.get(kind, ()))) and not isinstance(value, bool):
            return kind(value)
    except ValueError:
        pass
    raise ConfigError(f"fusion option {name} must be {KINDS[kind]}. Got {value!r} instead")
