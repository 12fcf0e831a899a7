"""Fields of a dataclass as options of a command: their names, types, defaults and help are what the fields say."""

import inspect
from collections.abc import Callable, Mapping
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from cachefuse.registry import Options
from cachefuse.settings import Setting, settings_of

METAVARS: dict[object, str] = {int: "N", float: "X", str: "NAME", bool: "", tuple: "LIST", Mapping: "KEY=X"}
_LATE: dict[str, Callable[[], str]] = {}  # help by a word that stands for it


class Command(TyperCommand):
    """A command whose help asks what is installed; that takes a while, so it is put together only to be shown."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        for parameter in self.params:
            for name in ("help", "show_default"):
                if (late := _LATE.get(str(getattr(parameter, name, "")))) is not None:
                    setattr(parameter, name, late())
        super().format_help(ctx, formatter)


def takes(config: type, parse: Callable[[Options], object]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Return a decorator: a command that has a parameter ``config`` gets an option for each field of a dataclass.

    What it is called with is a function without arguments that parses them. An earlier name of a field is an option
    that help does not show.
    """
    options = [option for one in settings_of(config).values() for option in _options(one)]

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        own = [
            parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY)
            for name, parameter in inspect.signature(command).parameters.items()
            if name != "config"
        ]

        def with_options(**values: object) -> None:
            given = {option.name: values.pop(option.name) for option in options}
            command(config=lambda: parse(given), **values)

        with_options.__name__, with_options.__doc__ = command.__name__, command.__doc__
        vars(with_options)["__signature__"] = inspect.Signature([*options, *own])
        with_options.__annotations__ = {parameter.name: parameter.annotation for parameter in (*options, *own)}
        return with_options

    return decorate


def _options(one: Setting) -> list[inspect.Parameter]:
    """Return the option of a setting, and that of its earlier name."""
    about, several = one.about, one.kind in (tuple, Mapping)
    # Numbers are parsed by Typer, whatever else is written in a way of its own by the setting.
    kind: Any = list[str] if several else str if about.words else one.kind
    kind = kind | None if several or one.optional else kind
    default = None if several else one.default
    shown = _late(one.shown) if about.shown else True
    named = [(one.name, False), (about.old, True)] if about.old else [(one.name, False)]
    return [
        inspect.Parameter(
            name,
            inspect.Parameter.KEYWORD_ONLY,
            default=None if hidden else default,
            annotation=Annotated[
                kind | None if hidden else kind,
                typer.Option(
                    f"--{name.replace('_', '-')}" + (f"/--no-{name.replace('_', '-')}" if one.kind is bool else ""),
                    metavar=about.metavar or METAVARS[one.kind],
                    help=_late(one.help),
                    rich_help_panel=about.panel,
                    show_default=shown,
                    hidden=hidden,
                ),
            ],
        )
        for name, hidden in named
    ]


def _late(text: Callable[[], str]) -> str:
    """Return what stands for a text until it is shown."""
    word = f"<{len(_LATE)}>"
    _LATE[word] = text
    return word


def read(config: type, given: Options) -> Options:
    """Return the fields' values of what options say; an earlier name is taken, with a note.

    Raises ConfigError for what does not parse.
    """
    values = {}
    for one in settings_of(config).values():
        value, old = given[one.name], one.about.old
        if old and given.get(old) is not None:
            note_old(f"--{old}", f"--{one.option}")
            value = [*(value or ()), *given[old]] if one.kind is tuple else given[old]
        values[one.name] = one.parse(value)
    return values


def note_old(old: str, new: str) -> None:
    """Print that an option has another name now."""
    from cachefuse_cli.shared import render

    render.note(f"{old} is called {new} now; the old name is still taken")


def from_command_line(config: type, context: typer.Context) -> list[str]:
    """Return the fields that were given as options."""
    return [
        one.name
        for one in settings_of(config).values()
        for source in [context.get_parameter_source(name) for name in dict.fromkeys((one.name, one.stored))]
        if source and source.name == "COMMANDLINE"
    ]
