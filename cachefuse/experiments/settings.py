"""The settings of a sweep: combinations of values, parsed to the types of their fields."""

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
    "seed": "use --seeds",
    "folds": "all trials must be evaluated on the same rows",
    "duplicates": "all trials must be evaluated on the same folds",
    "refit": "models trained on every row have no held-out rows",
    "views": "a sweep reads its features once",
}


def grid(values: Mapping[str, Sequence[object]]) -> list[JsonObject]:
    """Return every combination of the fields' values; the last field varies fastest.

    Raises ConfigError if there are no fields, or if a field has no values.
    """
    for name, choices in values.items():
        if not len(choices):
            raise ConfigError(f"the grid has no values for {name}; give at least one")
    if not values:
        raise ConfigError("the grid is empty; give values of at least one setting")
    return [dict(zip(values, combination, strict=True)) for combination in itertools.product(*values.values())]


def grid_values(name: str, text: str, config: type = TrainConfig) -> tuple[str, ...]:
    """Return the values of a setting in a grid, in the command line's spelling: "0,0.5", or lists "512 2048,512".

    Commas separate simple values. Spaces separate lists and options, which may contain commas. Old spellings of lists,
    "512,2048-512" and "one,two+three", are accepted with a warning.
    """
    setting = _find(name, config)
    if setting.kind not in (tuple, Mapping):
        return tuple(value.strip() for value in text.split(","))
    values, old_joint = tuple(text.split()), "-" if setting.item is int else "+"
    if setting.kind is tuple and len(values) == 1 and "," in text:
        items = text.split(",")
        if old_joint in text or name != setting.name:
            values = tuple(item.strip().replace(old_joint, ",") for item in items)
            spelled = " ".join(values)
            logger.warning('%s=%s is an old spelling; write "%s=%s" instead', name, text, setting.name, spelled)
        else:
            spaced = " ".join(items)
            logger.warning('%s=%s is one value; to try %d values write "%s=%s"', name, text, len(items), name, spaced)
    return values


def parse_setting(values: Options, config: type = TrainConfig) -> JsonObject:
    """Return values in the types of their fields; text is in the command line's spelling: "0.5", "2048,512", "all".

    Raises UnknownNameError for an unknown name, ConfigError for a field that a sweep fixes, or a wrong value.
    """
    parsed = {}
    for name, setting in {name: _find(name, config) for name in values}.items():
        value = values[name]
        if setting.name in FIXED:
            raise ConfigError(f"{name} must be the same in all settings: {FIXED[setting.name]}")
        if name != setting.name:
            logger.warning("%s is an old name; write %s instead", name, setting.name)
        is_widths = setting.kind is tuple and setting.item is int
        if is_widths and isinstance(value, str) and re.fullmatch(r"\d+(-\d+)+", value):
            logger.warning("%s=%s is an old spelling; write %s instead", name, value, value.replace("-", ","))
            value = value.replace("-", ",")
        if setting.kind is Mapping and isinstance(value, str):
            value = (value,)
        parsed[setting.name] = setting.parse(value)
        setting.check(parsed[setting.name])
    return parsed


def _find(name: str, config: type) -> Setting:
    """Return a setting by its name or old name. Raises UnknownNameError for an unknown name."""
    known = settings_of(config)
    every = {key: setting for setting in known.values() for key in (setting.stored, setting.name)}
    if name not in every:
        raise unknown((known_name for known_name in known if known_name not in FIXED), name, "setting")
    return every[name]
