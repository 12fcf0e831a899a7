"""The settings that a sweep tries: every combination of some values, and each value of its field's type."""

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, get_args, get_type_hints

from pydantic import TypeAdapter

from cachefuse.errors import ConfigError
from cachefuse.files import JsonObject
from cachefuse.registry import Options, lookup
from cachefuse.training.config import TrainConfig

FIXED = {
    "seed": "seeds are given apart",
    "folds": "all trials are to be measured on the same rows",
    "refit": "models trained on every row have none left to be measured on",
    "view": "a sweep reads its features once",
}
KINDS = {
    float: "a number", int: "a whole number", str: "a name",
    "layers": "widths such as 2048-512", "batch_size": "a whole number, or all",
    "loss_options": "a table of numbers, in a --settings file: { gamma = 2 }",
    "fusion_options": "a table, in a --settings file: { depth = 2 }",
    "shuffle": "a table of shares, in a --settings file: { text = 0.5 }",
    "without": "a list of parts", "stages": "a list of stages",
}  # fmt: skip
TEXTS: dict[str, Callable[[str], Any]] = {
    "layers": lambda text: text.split("-"),
    "batch_size": lambda text: 0 if text == "all" else text,
    "without": lambda text: [part for part in text.split("+") if part],
}


def grid(values: Mapping[str, Sequence[Any]]) -> list[JsonObject]:
    """Return every combination of the fields' values, the last field varying fastest.

    Raises ConfigError if there are no fields, or one has no values.
    """
    for name, choices in values.items():
        if not len(choices):
            raise ConfigError(f"the grid has no values for {name}")
    if not values:
        raise ConfigError("the grid has no fields")
    return [dict(zip(values, combination, strict=True)) for combination in itertools.product(*values.values())]


def parse_setting(values: Options) -> JsonObject:
    """Return fields of TrainConfig with values of their types; text is parsed: "0.5", layers "2048-512", batches "all".

    Raises UnknownNameError for a name that is no field, ConfigError for one that a sweep has fixed, or a bad value.
    """
    types = get_type_hints(TrainConfig)
    parsed = {}
    for name, value in values.items():
        if name in FIXED:
            raise ConfigError(f"{name} can't differ between settings: {FIXED[name]}")
        kind = lookup({field: kind for field, kind in types.items() if field not in FIXED}, name, "setting")
        try:
            given = TEXTS[name](value) if name in TEXTS and isinstance(value, str) else value
            parsed[name] = TypeAdapter(kind).validate_python(given)
            if name == "loss_options":
                parsed[name] = {key: x if key == "reduction" else float(x) for key, x in parsed[name].items()}
        except ValueError:  # pydantic's is one
            what = KINDS.get(name) or KINDS[kind if isinstance(kind, type) else get_args(kind)[0]]
            raise ConfigError(f"{name} must be {what}. Got {value!r} instead") from None
    return parsed
