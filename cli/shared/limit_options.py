"""The limits of raw data as options of every command that reads raw data."""

import functools
import inspect
import re
from collections.abc import Callable
from dataclasses import replace
from typing import Annotated, Any

import typer

from cachefuse.errors import ConfigError
from cachefuse.limits import UNTRUSTED, Limits, limited

PANEL = "Limits"
UNITS = {"B": 1, "KB": 1000, "MB": 1000**2, "GB": 1000**3, "KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30}
OPTIONS = {
    "memory": Annotated[
        str | None,
        typer.Option(
            "--memory",
            metavar="SIZE",
            help="What all images in work may take together, such as 2GB.",
            rich_help_panel=PANEL,
            show_default="a 32nd of the machine's, at least 900MB",
        ),
    ],
    "max_text_bytes": Annotated[
        str | None,
        typer.Option(
            "--max-text-bytes",
            metavar="SIZE",
            help="A longer text is a bad sample.",
            rich_help_panel=PANEL,
            show_default="1MiB, with --untrusted 64KiB",
        ),
    ],
    "untrusted": Annotated[
        bool,
        typer.Option(
            "--untrusted",
            envvar="CACHEFUSE_UNTRUSTED",
            help="For data of strangers: no links out of the data folder, and smaller limits.",
            rich_help_panel=PANEL,
        ),
    ],
}
DEFAULTS = {"memory": None, "max_text_bytes": None, "untrusted": False}


def reads_raw_data(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command the options of the limits, which hold while it runs."""

    @functools.wraps(command)
    def with_limits(**values: Any) -> None:
        given = {name: values.pop(name) for name in OPTIONS}
        with limited(parse_limits(**given)):
            command(**values)

    parameters = dict(inspect.signature(command).parameters)
    added = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=DEFAULTS[name], annotation=annotation)
        for name, annotation in OPTIONS.items()
    ]
    others = [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in parameters.values()]
    vars(with_limits)["__signature__"] = inspect.Signature([*others, *added])
    with_limits.__annotations__ = {**command.__annotations__, **OPTIONS}
    return with_limits


def parse_limits(memory: str | None, max_text_bytes: str | None, untrusted: bool) -> Limits:
    """Return the limits of the options; a size that is given goes before that of --untrusted."""
    chosen = UNTRUSTED if untrusted else Limits()
    if memory is not None:
        chosen = replace(chosen, memory=parse_size("--memory", memory))
    if max_text_bytes is not None:
        chosen = replace(chosen, text_bytes=parse_size("--max-text-bytes", max_text_bytes))
    return chosen


def parse_size(option: str, text: str) -> int:
    """Return the bytes of a size such as 2GB, 1.5GiB or 100000. Raises ConfigError, naming the option, for others."""
    match = re.fullmatch(r"\s*([0-9]{1,15}(?:\.[0-9]{1,9})?)\s*([A-Za-z]*)\s*", text)
    unit = UNITS.get(match[2].upper().removesuffix("B") + "B") if match else None
    if match is None or unit is None or (n_bytes := int(float(match[1]) * unit)) < 1:
        raise ConfigError(f"{option}: must be a size such as 500MB or 2GB. Got {text[:80]!r} instead")
    return n_bytes
