"""From what is to be shown to a page: a template filled in, every value escaped."""

import re
from pathlib import Path

from cachefuse.errors import ConfigError
from cachefuse.report import formatting as words

# What HTML can't hold, or UTF-8 can't: control characters, halves of surrogate pairs, non-characters.
UNPRINTABLE = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")


def render(template: str, context: dict[str, object]) -> str:
    """Return the page that a template makes of what is to be shown; every value is escaped."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("cachefuse.report", ""),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(words.FILTERS)
    return printable(environment.get_template(template).render(context))


def printable(text: str) -> str:
    """Put a mark in place of each character that no page and no plot can show."""
    return UNPRINTABLE.sub("\ufffd", text)


def check_target(*paths: Path) -> None:
    """Raise ConfigError if there can be no such files."""
    for path in paths:
        if path.is_dir():
            raise ConfigError(f"can't write {path}: it is a folder")
        if not path.parent.is_dir():
            raise ConfigError(f"can't write {path}: there is no folder {path.parent}")
