"""Settings: fields of a dataclass with help, choices and limits beside their defaults.

    epochs: int = setting(50, "Maximum number of epochs.", panel="Training", least=1)

This line is the whole definition of a setting. The command line makes an option of it, a sweep's grid parses its
values, the dataclass checks its limits (``check_settings``), and the model card prints it in the command line's
spelling.
"""

import types
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields
from functools import cache
from numbers import Integral, Real
from operator import ge, gt, le, lt
from typing import Any, Union, get_args, get_origin, get_type_hints

from cachefuse.errors import ConfigError
from cachefuse.printable import listed
from cachefuse.registry import Options, Registry, import_entry, unknown

NOTHING = "none"  # a list of no names, in words
CLASSES: dict[object, type | tuple[type, ...]] = {  # that values are of
    int: Integral, float: Real, tuple: (tuple, list), Mapping: Mapping,
}  # fmt: skip
WHAT: dict[object, str] = {
    int: "a whole number", float: "a number", str: "a name", bool: "true or false",
    Mapping: "a table such as { gamma = 2 }",
}  # fmt: skip


@dataclass(frozen=True)
class About:
    """The metadata of a setting, beside its type and default.

    ``help`` is a sentence; {choices} in it becomes the names of the choices. ``choices`` are the valid values: names, a
    table of them, or "module:attribute" of a table that is imported on demand. ``unfit`` are choices that this field
    does not accept, with the reason. ``words`` are names of values, such as "all" for 0. A number, and each of a list,
    is at least ``least``, at most ``most``, and strictly between ``above`` and ``below``. ``shown`` describes a default
    that depends on other settings. ``old`` is an old name: files keep it, and the command line accepts it with a note.
    A list of names has each name once, unless it ``repeats`` names. ``before`` is the value in files that are older
    than the setting, if it is not the default.
    """

    help: str | Callable[[], str] = ""
    panel: str | None = None
    metavar: str = ""
    choices: Iterable[str] | str | None = None
    unfit: Mapping[str, str] = field(default_factory=dict)
    words: Options = field(default_factory=dict)
    least: float | None = None
    most: float | None = None
    above: float | None = None
    below: float | None = None
    shown: str | Callable[[], str] = ""
    old: str = ""
    repeats: bool = False
    before: Any = None


def setting(default: Any, help: str | Callable[[], str] = "", **about: Any) -> Any:
    """Return a dataclass field with a default, or a type that makes one, and the fields of ``About``."""
    metadata = {"about": About(help, **about)}
    if isinstance(default, type):
        return field(default_factory=default, metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class Setting:
    """A field of a dataclass, with its metadata ``about``.

    ``kind`` is int, float, bool, str, tuple or Mapping; for the last two, ``item`` is the type of their values.
    """

    name: str
    kind: type
    item: Any
    optional: bool
    default: Any
    about: About

    @property
    def option(self) -> str:
        """The name on the command line, without the leading dashes."""
        return self.name.replace("_", "-")

    @property
    def stored(self) -> str:
        """The name in files."""
        return self.about.old or self.name

    @property
    def choices(self) -> Options | Sequence[str]:
        """The table of choices, or their names; empty if every value is valid."""
        given: Any = self.about.choices
        return import_entry(given) or ()

    @property
    def what(self) -> str:
        """A description of a valid value."""
        if self.kind is tuple:
            return "whole numbers such as 2048,512" if self.item is int else "names with commas between them"
        if not self.about.words:
            return WHAT.get(self.kind, "a value")
        least = self.about.least or 0
        least += least in self.about.words.values()
        return f"{WHAT[self.kind]} of at least {least}, or {' or '.join(self.about.words)}"

    def help(self) -> str:
        """Return the sentence of the help, with the names of the choices."""
        text = self.about.help() if callable(self.about.help) else self.about.help
        if "{choices}" not in text:
            return text
        return text.replace("{choices}", ", ".join(name for name in self.choices if name not in self.about.unfit))

    def shown(self) -> str:
        """Return the description of the default; "" means that its value is shown."""
        return self.about.shown() if callable(self.about.shown) else self.about.shown

    def parse(self, given: object) -> Any:
        """Return a value of its type: of a text as the command line takes it, of a list of such, or of TOML's values.

        Raises ConfigError for a value that is not valid.
        """
        if given is None:
            return self.default if self.kind in (tuple, Mapping) else None
        if self.kind is tuple:
            return self._parse_list(given.split(",") if isinstance(given, str) else given)
        if self.kind is Mapping:
            return self._parse_table(given)
        if isinstance(given, str) and given in self.about.words:
            return self.about.words[given]
        value = self._parse_one(self.kind, given)
        if isinstance(given, str) and value in self.about.words.values():
            raise self._refusal(given)  # only the word is valid: "all", not "0"
        return value

    def _parse_list(self, given: object) -> tuple[object, ...]:
        given = _plain(given)
        if not isinstance(given, Sequence):
            raise self._refusal(given)
        items = [item.split(",") if isinstance(item, str) else (str(item),) for item in given]
        texts = [text.strip() for item in items for text in item if text.strip()]
        if self.item is str:
            return () if texts == [NOTHING] else tuple(texts if self.about.repeats else dict.fromkeys(texts))
        try:
            return tuple(self._parse_one(self.item, text) for text in texts)
        except ConfigError:
            raise self._refusal(",".join(map(str, given))) from None

    def _parse_table(self, given: object) -> Options:
        """Return {name: value} of a table, or of texts name=value; values that can be numbers are numbers."""
        if isinstance(given, Mapping):
            return {str(name): self._parse_value(name, _plain(value)) for name, value in given.items()}
        values: dict[str, object] = {}
        for text in given if isinstance(given, tuple | list) else (given,):
            name, equals, value = str(text).partition("=")
            if not equals:
                raise ConfigError(
                    f"{self.option} must be given as {self.about.metavar or 'name=value'}. Got {text!r} instead"
                )
            if name in values:
                raise ConfigError(f"{self.option} {name} is given twice; give it once")
            values[name] = self._parse_value(name, value)
        return values

    def _parse_value(self, name: str, given: Any) -> object:
        if self.item is Any:
            return given
        try:
            return float(given)
        except (TypeError, ValueError):
            if isinstance(given, str) and str in get_args(self.item):
                return given
            raise ConfigError(f"{self.option} {name} must be a number. Got {given!r} instead") from None

    def _parse_one(self, kind: type, given: Any) -> object:
        if kind is bool and isinstance(given, str):
            given = {"true": True, "false": False}.get(given.lower(), given)
        if kind in (int, float) and isinstance(given, str):
            try:
                return kind(given)
            except ValueError:
                raise self._refusal(given) from None
        given = _plain(given)
        self._check_kind(kind, given)
        return float(given) if kind is float else given

    def text(self, value: object) -> str:
        """Return a value in the command line's spelling."""
        return next((word for word, meant in self.about.words.items() if value == meant), None) or as_text(value)

    def check(self, value: Any) -> None:
        """Raise ConfigError for a value of a wrong type or out of range, UnknownNameError for an unknown choice."""
        if value is None and self.optional:
            return
        if isinstance(value, str) and value in self.about.words:
            raise ConfigError(f"{self.option} must be {self.about.words[value]} for {value}. Got {value!r} instead")
        self._check_kind(self.kind, value)
        if self.about.choices is not None:
            self._check_choice(value)
        if self.kind is Mapping:
            for name, item in value.items():
                self._check_limits(f"{self.option} {name}", item)
        for item in value if self.kind is tuple else ():
            self._check_kind(self.item, item)
            self._check_limits(self.option, item)
        if self.kind in (int, float):
            self._check_limits(self.option, value)

    def _check_kind(self, kind: type, value: object) -> None:
        fits = isinstance(value, CLASSES.get(kind, kind))
        if not fits or (isinstance(value, bool) and kind is not bool):
            raise self._refusal(value)

    def _check_choice(self, value: str) -> None:
        choices = self.choices
        if isinstance(choices, Registry):
            choices.check(value)
        elif value not in choices:
            if isinstance(choices, Mapping):
                raise unknown(choices, value, self.name.replace("_", " "))
            raise ConfigError(f"{self.option} must be one of {listed(choices)}. Got {value!r} instead")
        if value in self.about.unfit:
            raise ConfigError(f"{self.option} {value!r} {self.about.unfit[value]}")

    def _check_limits(self, name: str, value: Any) -> None:
        about, number = self.about, isinstance(value, Real) and not isinstance(value, bool)
        every = (
            ("at least", about.least, ge),
            ("above", about.above, gt),
            ("at most", about.most, le),
            ("below", about.below, lt),
        )
        limits = [(words, limit, fits) for words, limit, fits in every if limit is not None]
        if all(number and fits(value, limit) for _, limit, fits in limits):
            return
        must = " and ".join(f"{words} {_number(limit)}" for words, limit, _ in limits)
        if about.least is not None and about.most is not None:
            must = f"between {_number(about.least)} and {_number(about.most)}"
        raise ConfigError(f"{name} must be {must}. Got {value} instead")

    def _refusal(self, value: object) -> ConfigError:
        return ConfigError(f"{self.option} must be {self.what}. Got {value!r} instead")


def settings_of(config: type) -> dict[str, Setting]:
    """Return the settings of a dataclass by name. A field that a subclass redefines keeps its metadata."""
    return _settings_of(config)


@cache
def _settings_of(config: type) -> dict[str, Setting]:
    hints, settings = get_type_hints(config), {}
    for known in fields(config):
        named = (vars(base).get("__dataclass_fields__", {}).get(known.name) for base in config.__mro__)
        about = next((same.metadata["about"] for same in named if same and "about" in same.metadata), About())
        default = known.default if known.default_factory is MISSING else known.default_factory()
        settings[known.name] = Setting(known.name, *_shape(hints[known.name]), default, about)
    return settings


def _shape(hint: Any) -> tuple[Any, Any, bool]:
    """Return the kind of a field's type, the type of its items, and whether None is valid."""
    union = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else ()
    plain = next((member for member in union if member is not type(None)), hint)
    items = get_args(plain)
    kind = get_origin(plain) or plain
    return kind, (items[0 if kind is tuple else 1] if items else None), type(None) in union


def check_settings(config: object) -> None:
    """Check each value of a dataclass by ``Setting.check``."""
    for known in settings_of(type(config)).values():
        known.check(getattr(config, known.name))


def from_stored(config: type, values: Options) -> Options:
    """Return a file's values by the names of the fields. Raises ConfigError for unknown keys."""
    names = {name: known for known in settings_of(config).values() for name in (known.name, known.stored)}
    others = sorted(set(values) - names.keys())
    if others:
        raise ConfigError(f"unknown settings: {listed(others)}")
    lists = {name: tuple(value) for name, value in values.items() if isinstance(value, list)}
    return {names[name].name: value for name, value in {**values, **lists}.items()}


def with_older(config: type, values: Options) -> dict[str, Any]:
    """Return a file's values, completed with those of settings that are newer than the file: ``before``."""
    older = {one.stored: one.about.before for one in settings_of(config).values() if one.about.before is not None}
    return {**older, **values}


def as_stored(config: type, values: Options) -> dict[str, Any]:
    """Return values of fields by their names in files."""
    known = settings_of(config)
    return {known[name].stored: value for name, value in values.items()}


def as_text(value: object) -> str:
    """Return a value as the command line takes it."""
    if isinstance(value, Mapping):
        return " ".join(f"{name}={as_text(item)}" for name, item in value.items())
    if isinstance(value, tuple | list):
        return ",".join(map(str, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


def _plain(value: Any) -> Any:
    """Return the Python number or list of a NumPy scalar or array, and any other value unchanged."""
    return value.tolist() if hasattr(value, "dtype") and hasattr(value, "tolist") else value


def _number(limit: float) -> str:
    """Return a limit as a short text: 0, 1e+06, 2^63 - 1."""
    power = int(limit) + 1
    return f"2^{power.bit_length() - 1} - 1" if power > 2**53 and not power & (power - 1) else f"{limit:g}"
