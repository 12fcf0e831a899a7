"""Render a page from a template; every value is escaped."""

import re
from pathlib import Path

from cachefuse.errors import ConfigError
from cachefuse.report import formatting as words

# Characters that HTML or UTF-8 does not allow: control characters, halves of surrogate pairs, non-characters.
UNPRINTABLE = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")


def render(template: str, context: dict[str, object]) -> str:
    """Return the page of a template and its values; every value is escaped."""
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
    """Replace each character that a page or plot cannot show by U+FFFD."""
    return UNPRINTABLE.sub("\ufffd", text)


def check_target(*paths: Path) -> None:
    """Raise ConfigError if a path is a folder or its folder is missing."""
    for path in paths:
        if path.is_dir():
            raise ConfigError(f"cannot write {path}: it is a folder")
        if not path.parent.is_dir():
            raise ConfigError(f"cannot write {path}: there is no folder {path.parent}")
