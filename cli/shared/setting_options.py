"""Settings as options of a command: names, types, defaults and help come from the fields of a dataclass."""

import inspect
from collections.abc import Callable, Collection, Mapping
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from cachefuse.registry import Options
from cachefuse.settings import Setting, settings_of

METAVARS: dict[object, str] = {int: "N", float: "X", str: "NAME", bool: "", tuple: "LIST", Mapping: "KEY=X"}
_LATE: dict[str, Callable[[], str]] = {}  # placeholder -> the function that returns the help


class Command(TyperCommand):
    """A command that builds its help on demand, because finding installed packages takes time."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        for parameter in self.params:
            for name in ("help", "show_default"):
                if (late := _LATE.get(str(getattr(parameter, name, "")))) is not None:
                    setattr(parameter, name, late())
        super().format_help(ctx, formatter)


def takes(
    config: type, parse: Callable[[Options], object], names: Collection[str] = ()
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Return a decorator that replaces a command's parameter ``config`` by an option for each field of a dataclass.

    The command gets a function as ``config``; it parses the options, with the fields that it is given in their place. A
    field's old name is a hidden option. ``names`` are the fields, by default all.
    """
    known = settings_of(config)
    options = [option for name in names or known for option in _options(known[name])]

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        others = [
            parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY)
            for name, parameter in inspect.signature(command).parameters.items()
            if name != "config"
        ]

        def with_options(**values: object) -> None:
            given = {option.name: values.pop(option.name) for option in options}
            command(config=lambda **others: parse({**given, **others}), **values)

        with_options.__name__, with_options.__doc__ = command.__name__, command.__doc__
        vars(with_options)["__signature__"] = inspect.Signature([*options, *others])
        with_options.__annotations__ = {parameter.name: parameter.annotation for parameter in (*options, *others)}
        return with_options

    return decorate


def _options(setting: Setting) -> list[inspect.Parameter]:
    """Return the option of a setting, and a hidden one for its old name."""
    about, several = setting.about, setting.kind in (tuple, Mapping)
    # Typer parses numbers; the setting parses values with a spelling of its own.
    kind: Any = list[str] if several else str if about.words else setting.kind
    kind = kind | None if several or setting.optional else kind
    default = None if several else setting.default
    shown = _late(setting.shown) if about.shown else True
    named = [(setting.name, False), (about.old, True)] if about.old else [(setting.name, False)]
    return [
        inspect.Parameter(
            name,
            inspect.Parameter.KEYWORD_ONLY,
            default=None if hidden else default,
            annotation=Annotated[
                kind | None if hidden else kind,
                typer.Option(
                    f"--{name.replace('_', '-')}" + (f"/--no-{name.replace('_', '-')}" if setting.kind is bool else ""),
                    metavar=about.metavar or METAVARS[setting.kind],
                    help=_late(setting.help),
                    rich_help_panel=about.panel,
                    show_default=shown,
                    hidden=hidden,
                ),
            ],
        )
        for name, hidden in named
    ]


def _late(text: Callable[[], str]) -> str:
    """Return a placeholder for a text that is built on demand."""
    placeholder = f"<{len(_LATE)}>"
    _LATE[placeholder] = text
    return placeholder


def read(config: type, given: Options) -> Options:
    """Return the fields' values from the options; an old name is accepted, with a note.

    Raises ConfigError for an invalid value.
    """
    values = {}
    for setting in settings_of(config).values():
        if setting.name not in given:  # the command has no option for it
            continue
        value, old = given[setting.name], setting.about.old
        if old and given.get(old) is not None:
            note_old(f"--{old}", f"--{setting.option}")
            value = [*(value or ()), *given[old]] if setting.kind is tuple else given[old]
        values[setting.name] = setting.parse(value)
    return values


def note_old(old: str, new: str) -> None:
    """Print a note that an option has a new name."""
    from cachefuse_cli.shared import render

    render.note(f"{old} is an old name; write {new} instead")


def from_command_line(config: type, context: typer.Context) -> list[str]:
    """Return the names of the fields that are on the command line."""
    return [
        setting.name
        for setting in settings_of(config).values()
        for source in [context.get_parameter_source(name) for name in dict.fromkeys((setting.name, setting.stored))]
        if source and source.name == "COMMANDLINE"
    ]
