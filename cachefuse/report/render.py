"""Render a page from a template; every value is escaped."""

from cachefuse.printable import printable_lines
from cachefuse.report import formatting as words


def render(template: str, context: dict[str, object]) -> str:
    """Return the page of a template and its values; every value is escaped, for HTML and as on a terminal."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("cachefuse.report", ""),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(words.FILTERS)
    return printable_lines(environment.get_template(template).render(context))
