"""Registries: objects by name. An entry may be "module:attribute", which is imported on demand.

Other installed packages add entries by entry points; each registry has a group of them.
"""

import difflib
import importlib
import inspect
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping
from functools import cache
from typing import TYPE_CHECKING, Any, TypeVar, cast

from cachefuse.errors import PluginError, UnknownNameError
from cachefuse.printable import listed, shorten

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint, EntryPoints

logger = logging.getLogger(__name__)

T = TypeVar("T")  # an entry
Options = Mapping[str, Any]  # of a fusion, a loss ... by name; its constructor checks them


class Registry(MutableMapping[str, T]):
    """Objects by name. ``registry[name]`` imports the entry, and raises UnknownNameError with the choices.

    ``kind`` is the word for an entry in messages. ``group`` is the group of entry points of other packages. If names
    are equal, this package's entry is used. ``base``, ``takes`` and ``has`` are requirements for entries of other
    packages: a base class ("module:attribute"), arguments ("width, classes, *, layers"), attributes. ``probe`` is a
    function ("module:attribute") that uses an entry on tiny data, and raises an error if the result is wrong.
    """

    def __init__(
        self,
        kind: str,
        group: str,
        entries: Mapping[str, T | str],
        *,
        base: str = "",
        takes: str = "",
        has: tuple[str, ...] = (),
        probe: str = "",
    ) -> None:
        self.kind, self.group, self._own = kind, group, dict(entries)
        self.base, self.takes, self.has, self.probe = base, takes, has, probe

    def check(self, name: str) -> None:
        """Raise UnknownNameError with the choices if the name is unknown. This imports nothing."""
        if name not in self:
            raise unknown(self, name, self.kind)

    def source(self, name: str) -> str:
        """Return an entry's "module:attribute", or "" for an object."""
        self.check(name)
        entry = self._own[name] if name in self._own else _entry_points(self.group)[name].value
        return entry if isinstance(entry, str) else ""

    def __getitem__(self, name: str) -> T:
        if name in self._own:
            _warn_of_unused(self.kind, self.group, name)
            entry: T = import_entry(self._own[name])
            return entry
        self.check(name)
        return self._load(_entry_points(self.group)[name])

    def _load(self, point: "EntryPoint") -> T:
        """Import an entry of another package. Raises PluginError if this fails, or if it does not fit."""
        try:
            entry: T = point.load()
            problem = self._problem(entry)
        except (Exception, SystemExit) as error:  # its module may raise anything
            problem = " ".join(f"{type(error).__name__}: {error}".split())
        if problem:
            package = point.dist.name if point.dist else "a package"
            raise PluginError(
                f"{self.kind} {point.name!r} of {package} is not usable ({point.group}: {point.value}): {problem}"
            )
        return entry

    def _problem(self, entry: T) -> str:
        base = import_entry(self.base) if self.base else None
        if base is not None and not (isinstance(entry, type) and issubclass(entry, base)):
            return f"must be a subclass of {self.base.replace(':', '.')}"
        for name in self.has:
            if not hasattr(entry, name):
                return f"must have an attribute {name}"
        if self.takes:
            positional, _, keywords = self.takes.partition(", *, ")
            try:
                named = dict.fromkeys(keywords.split(", ") if keywords else ())
                inspect.signature(cast("Callable[..., object]", entry)).bind(*positional.split(", "), **named)
            except (TypeError, ValueError) as error:
                return f"must accept the arguments ({self.takes}): {error}"
        if self.probe:
            import_entry(self.probe)(entry)
        return ""

    def get(self, name: str, default: Any = None) -> Any:
        try:
            return self[name]
        except UnknownNameError:
            return default

    def __setitem__(self, name: str, entry: T) -> None:
        self._own[name] = entry

    def __delitem__(self, name: str) -> None:
        del self._own[name]

    def __contains__(self, name: object) -> bool:
        return name in self._own or name in _entry_points(self.group)

    def __iter__(self) -> Iterator[str]:
        return iter(sorted({**_entry_points(self.group), **self._own}))

    def __len__(self) -> int:
        return len({**_entry_points(self.group), **self._own})


@cache
def _entry_points(group: str) -> "dict[str, EntryPoint]":
    """Return the entry points of a group, of all installed packages, by name."""
    return {point.name: point for point in _installed().select(group=group)}


@cache
def _installed() -> "EntryPoints":
    """Return the entry points of all installed packages; this takes some 10 ms."""
    from importlib.metadata import entry_points  # a slow import, needed only for other packages

    return cast("EntryPoints", entry_points())


@cache
def _warn_of_unused(kind: str, group: str, name: str) -> None:
    """Warn once of other packages' entry points with the name of an entry of this package."""
    if point := _entry_points(group).get(name):
        package = point.dist.name if point.dist else "another package"
        logger.warning("%s %r is cachefuse's own; that of %s has the same name and is not used", kind, name, package)


def unknown(names: Iterable[str], name: str, kind: str) -> UnknownNameError:
    """Return the error for an unknown name: it lists the choices and suggests the closest one."""
    choices = sorted(names)
    # Many or long names take minutes to compare.
    close = difflib.get_close_matches(name, choices, n=1) if len(choices) <= 10_000 and len(name) <= 200 else ()
    hint = f" (did you mean {close[0]!r}?)" if close else ""
    return UnknownNameError(f"unknown {kind} {shorten(repr(name), 100)}{hint}; choose from: {listed(choices)}")


def lookup(table: Mapping[str, object], name: str, kind: str) -> Any:
    """Return ``table[name]``; a "module:attribute" string is imported first.

    Raises UnknownNameError, with the choices and the closest one, if the name is unknown.
    """
    if name not in table:
        raise unknown(table, name, kind)
    return import_entry(table[name])


def import_entry(entry: object) -> Any:
    """Import a "module:attribute" string. Return any other entry unchanged."""
    if not isinstance(entry, str):
        return entry
    module, _, attribute = entry.partition(":")
    return getattr(importlib.import_module(module), attribute)
