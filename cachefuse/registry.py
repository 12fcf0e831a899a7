"""Registries: from a name to an object, or to "module:attribute" where importing it is costly.

Another installed package adds entries by an entry point, in a group that is called as the registry is.
"""

import difflib
import importlib
from collections.abc import Iterator, Mapping, MutableMapping
from functools import cached_property
from typing import Any

from cachefuse.errors import UnknownNameError


class Registry(MutableMapping[str, Any]):
    """Objects by name; ``registry[name]`` imports what an entry names, and raises UnknownNameError with the choices.

    ``kind`` is what messages call an entry. ``group`` is that of the entry points by which installed packages add to
    it. An entry of this package goes before one of the same name.
    """

    def __init__(self, kind: str, group: str, entries: Mapping[str, Any]) -> None:
        self.kind, self.group, self._own = kind, group, dict(entries)

    @cached_property
    def _others(self) -> dict[str, str]:
        from importlib.metadata import entry_points  # takes a while: only where another package may matter

        return {point.name: point.value for point in entry_points(group=self.group)}

    @property
    def _entries(self) -> dict[str, Any]:
        return dict(sorted({**self._others, **self._own}.items()))

    def __getitem__(self, name: str) -> Any:
        return resolve(self._own[name]) if name in self._own else lookup(self._entries, name, self.kind)

    def get(self, name: str, default: Any = None) -> Any:
        return resolve(self._entries.get(name, default))

    def __setitem__(self, name: str, entry: Any) -> None:
        self._own[name] = entry

    def __delitem__(self, name: str) -> None:
        del self._own[name]

    def __contains__(self, name: object) -> bool:
        return name in self._own or name in self._entries

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)


def lookup(table: Mapping[str, Any], name: str, kind: str) -> Any:
    """Return ``table[name]``, importing it first if the entry is a "module:attribute" string.

    Raises UnknownNameError with the choices, closest first in a suggestion, if the name is not there.
    """
    if name not in table:
        close = difflib.get_close_matches(name, table, n=1)
        hint = f" (did you mean {close[0]!r}?)" if close else ""
        raise UnknownNameError(f"unknown {kind} {name!r}{hint}; choose from: {', '.join(sorted(table))}")
    return resolve(table[name])


def resolve(entry: Any) -> Any:
    """Import what a "module:attribute" string names; anything else is returned as it is."""
    if not isinstance(entry, str):
        return entry
    module, _, attribute = entry.partition(":")
    return getattr(importlib.import_module(module), attribute)
