"""The settings that a sweep tries: every combination of some values, and each value of its field's type."""

import itertools
import logging
import re
from collections.abc import Mapping, Sequence

from cachefuse.errors import ConfigError
from cachefuse.files import JsonObject
from cachefuse.registry import Options, unknown
from cachefuse.settings import Setting, settings_of
from cachefuse.training.config import TrainConfig

logger = logging.getLogger(__name__)

FIXED = {
    "seed": "seeds are given apart",
    "folds": "all trials are to be measured on the same rows",
    "refit": "models trained on every row have none left to be measured on",
    "views": "a sweep reads its features once",
}


def grid(values: Mapping[str, Sequence[object]]) -> list[JsonObject]:
    """Return every combination of the fields' values, the last field varying fastest.

    Raises ConfigError if there are no fields, or one has no values.
    """
    for name, choices in values.items():
        if not len(choices):
            raise ConfigError(f"the grid has no values for {name}")
    if not values:
        raise ConfigError("the grid has no fields")
    return [dict(zip(values, combination, strict=True)) for combination in itertools.product(*values.values())]


def grid_values(name: str, text: str, config: type = TrainConfig) -> tuple[str, ...]:
    """Return the values of a setting in a grid, each as the command line takes it: "0,0.5", or of lists "512 2048,512".

    Values have commas between them; those that may hold commas themselves, lists and options, have spaces. Earlier
    spellings of lists, "512,2048-512" and "one,two+three", are taken with a warning.
    """
    one = _find(name, config)
    if one.kind not in (tuple, Mapping):
        return tuple(part.strip() for part in text.split(","))
    values, joint = tuple(text.split()), "-" if one.item is int else "+"
    if one.kind is tuple and len(values) == 1 and "," in text:
        parts = text.split(",")
        if joint in text or name != one.name:
            values = tuple(part.strip().replace(joint, ",") for part in parts)
            spelled = " ".join(values)
            logger.warning(
                '%s=%s is an old spelling, which is still taken: write "%s=%s"', name, text, one.name, spelled
            )
        else:
            two = " ".join(parts)
            logger.warning('%s=%s is one setting; to try %d write "%s=%s"', name, text, len(parts), name, two)
    return values


def parse_setting(values: Options, config: type = TrainConfig) -> JsonObject:
    """Return fields with values of their types; text is parsed as the command line does: "0.5", "2048,512", "all".

    Raises UnknownNameError for a name that is no field, ConfigError for one that a sweep has fixed, or a bad value.
    """
    parsed = {}
    for name, one in {name: _find(name, config) for name in values}.items():
        value = values[name]
        if one.name in FIXED:
            raise ConfigError(f"{name} can't differ between settings: {FIXED[one.name]}")
        if name != one.name:
            logger.warning("setting %s is called %s now; the old name is still taken", name, one.name)
        if one.kind is tuple and one.item is int and isinstance(value, str) and re.fullmatch(r"\d+(-\d+)+", value):
            logger.warning(
                "%s=%s is an old spelling, which is still taken: write %s", name, value, value.replace("-", ",")
            )
            value = value.replace("-", ",")
        if one.kind is Mapping and isinstance(value, str):
            value = (value,)
        parsed[one.name] = one.parse(value)
        one.check(parsed[one.name])
    return parsed


def _find(name: str, config: type) -> Setting:
    """Return a setting by its name, or an earlier one. Raises UnknownNameError if there is none."""
    known = settings_of(config)
    every = {key: one for one in known.values() for key in (one.stored, one.name)}
    if name not in every:
        raise unknown((one for one in known if one not in FIXED), name, "setting")
    return every[name]
