"""Registries: from a name to an object, or to "module:attribute" where importing it is costly.

Another installed package adds entries by an entry point, in a group that is called as the registry is.
"""

import difflib
import importlib
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping
from functools import cache
from typing import TYPE_CHECKING, Any, TypeVar, cast

from cachefuse.errors import PluginError, UnknownNameError

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint, EntryPoints

T = TypeVar("T")  # an entry
Options = Mapping[str, Any]  # of a fusion, a loss ... by name; what each may be is for its constructor to say


class Registry(MutableMapping[str, T]):
    """Objects by name; ``registry[name]`` imports what an entry names, and raises UnknownNameError with the choices.

    ``kind`` is what messages call an entry. ``group`` is that of the entry points by which installed packages add to
    it. An entry of this package goes before one of the same name. ``base``, ``takes`` and ``has`` are what an entry of
    another package must be: a subclass of a class ("module:attribute"), something that can be called with such
    arguments ("width, classes, *, layers"), something with such attributes.
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
    ) -> None:
        self.kind, self.group, self._own = kind, group, dict(entries)
        self.base, self.takes, self.has = base, takes, has

    def check(self, name: str) -> None:
        """Raise UnknownNameError with the choices unless the name is there; this imports nothing."""
        if name not in self:
            raise unknown(self, name, self.kind)

    def source(self, name: str) -> str:
        """Return "module:attribute" of an entry that is named so, or "" for one that is there itself."""
        self.check(name)
        entry = self._own[name] if name in self._own else self._others[name].value
        return entry if isinstance(entry, str) else ""

    @property
    def _others(self) -> "dict[str, EntryPoint]":
        return {point.name: point for point in _entry_points().select(group=self.group)}

    def __getitem__(self, name: str) -> T:
        if name in self._own:
            entry: T = import_entry(self._own[name])
            return entry
        self.check(name)
        return self._load(self._others[name])

    def _load(self, point: "EntryPoint") -> T:
        """Import an entry of another package. Raises PluginError for one that fails, or is not what it must be."""
        try:
            entry: T = point.load()
            problem = self._problem(entry)
        except Exception as error:  # whatever its module does
            problem = f"{type(error).__name__}: {error}"
        if problem:
            package = point.dist.name if point.dist else "a package"
            raise PluginError(
                f"{self.kind} {point.name!r} of {package} can't be used ({point.group}: {point.value}): {problem}"
            )
        return entry

    def _problem(self, entry: T) -> str:
        base = import_entry(self.base) if self.base else None
        if base is not None and not (isinstance(entry, type) and issubclass(entry, base)):
            return f"it must be a subclass of {self.base.replace(':', '.')}"
        for name in self.has:
            if not hasattr(entry, name):
                return f"it must have an attribute {name}"
        if self.takes:
            positional, _, keywords = self.takes.partition(", *, ")
            try:
                named = dict.fromkeys(keywords.split(", ") if keywords else ())
                inspect.signature(cast("Callable[..., object]", entry)).bind(*positional.split(", "), **named)
            except (TypeError, ValueError) as error:
                return f"it must take ({self.takes}): {error}"
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
        return name in self._own or name in self._others

    def __iter__(self) -> Iterator[str]:
        return iter(sorted({**self._others, **self._own}))

    def __len__(self) -> int:
        return len({**self._others, **self._own})


@cache
def _entry_points() -> "EntryPoints":
    """Return the entry points of all installed packages; one look takes some 10 ms."""
    from importlib.metadata import entry_points  # takes a while: only where another package may matter

    return cast("EntryPoints", entry_points())


def unknown(names: Iterable[str], name: str, kind: str) -> UnknownNameError:
    """Return the error of a name that is not among those of a kind: it lists them, and suggests the closest."""
    choices = sorted(names)
    close = difflib.get_close_matches(name, choices, n=1)
    hint = f" (did you mean {close[0]!r}?)" if close else ""
    return UnknownNameError(f"unknown {kind} {name!r}{hint}; choose from: {', '.join(choices)}")


def lookup(table: Mapping[str, object], name: str, kind: str) -> Any:
    """Return ``table[name]``, importing it first if the entry is a "module:attribute" string.

    Raises UnknownNameError with the choices, closest first in a suggestion, if the name is not there.
    """
    if name not in table:
        raise unknown(table, name, kind)
    return import_entry(table[name])


def import_entry(entry: object) -> Any:
    """Import what a "module:attribute" string names; anything else is returned as it is."""
    if not isinstance(entry, str):
        return entry
    module, _, attribute = entry.partition(":")
    return getattr(importlib.import_module(module), attribute)
