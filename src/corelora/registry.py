"""The tables that the rest of the package fills: a name, and the object behind it.

One table a kind. Methods, outer starts and core structures register themselves where they are defined, so that
adding one touches one file; the command line, the tests and the documents read the tables.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Generic, TypeVar

from corelora.errors import CoreLoraError, unknown_name

T = TypeVar("T")


class Registry(Mapping[str, T], Generic[T]):
    """A read-mostly mapping whose misses name the nearest entry."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._entries: dict[str, T] = {}

    def add(self, name: str, entry: T) -> T:
        """Register `entry`; a name that is taken is an error, so that nothing is replaced by accident."""
        if name in self._entries:
            raise CoreLoraError(f"there is already a {self.kind} called {name!r}")
        self._entries[name] = entry
        return entry

    def remove(self, name: str) -> None:
        """Forget an entry (used by tests that register a toy method)."""
        del self._entries[name]

    def miss(self, name: object) -> str | None:
        """The message for an unknown name, or None where the name is known."""
        return None if name in self._entries else unknown_name(self.kind, name, self._entries)

    def __getitem__(self, name: str) -> T:
        if name not in self._entries:
            raise CoreLoraError(unknown_name(self.kind, name, self._entries))
        return self._entries[name]

    def get(self, name: str, default: Any = None) -> Any:
        """As a dict's: `default` where the name is unknown."""
        return self._entries.get(name, default)

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)


METHODS: Registry = Registry("method")
OUTERS: Registry = Registry("outer start")
CORES: Registry = Registry("core structure")
CORE_STARTS: Registry = Registry("core start")
SAMPLINGS: Registry = Registry("sampling")
STATS: Registry = Registry("kind of statistics")
