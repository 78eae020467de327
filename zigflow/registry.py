"""Named things that people type: a mapping that refuses duplicates and helps with typing errors."""

import difflib
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Generic, TypeVar, cast

from zigflow.errors import ZigflowError

T = TypeVar("T")
# What a decorator registers keeps its own type: a class stays a class.
V = TypeVar("V")


class UnknownNameError(ZigflowError, KeyError, ValueError):
    """A name that no registry entry answers to; the message lists near matches."""

    def __str__(self) -> str:
        return str(self.args[0])


def near_names(name: object, allowed: Iterable[str], n: int = 3, cutoff: float = 0.5) -> list[str]:
    """The names in ``allowed`` that ``name`` may have been meant to be, nearest first; upper case does not matter."""
    by_lower: dict[str, list[str]] = {}
    for each in allowed:
        by_lower.setdefault(each.lower(), []).append(each)
    close = difflib.get_close_matches(str(name).lower(), list(by_lower), n=n, cutoff=cutoff)
    return [each for lower in close for each in by_lower[lower]][:n]


def unknown_name(
    kind: str, name: object, allowed: Iterable[str], key: str | None = None, more: Iterable[str] = ()
) -> UnknownNameError:
    """Build the error for a name that is not in ``allowed``, with near matches first.

    Args:
        key: the configuration key that has this value, which the message then begins with.
        more: names that are allowed too, and too many to be listed: they are suggested only.
    """
    known = sorted(allowed)
    close = near_names(name, [*known, *more])
    hint = f" Did you mean {' or '.join(map(repr, close))}?" if close else ""
    what = f"unknown {kind} {name!r}" if key is None else f"{key}={name!r}: unknown {kind}"
    return UnknownNameError(f"{what}.{hint} Known: {', '.join(known)}")


class Registry(Generic[T]):
    """Names to objects. ``kind`` appears in every message ("sampler", "model variant", ...)."""

    def __init__(self, kind: str):
        self.kind = kind
        self._entries: dict[str, T] = {}
        self._origins: dict[str, str] = {}
        self._families: dict[str, Callable[[], Mapping[str, T]]] = {}

    def register(self, name: str, entry: T | None = None) -> Callable[[V], V]:
        """Register ``entry`` under ``name``, or act as a decorator when ``entry`` is omitted.

        Raises:
            ValueError: the name is taken by another object; both origins are named.
        """
        caller = str(sys._getframe(1).f_globals.get("__name__"))

        def add(value: V) -> V:
            self._add(name, cast(T, value), _origin(value, caller))
            return value

        if entry is not None:
            self._add(name, entry, _origin(entry, caller))
        return add

    def _add(self, name: str, value: T, origin: str) -> None:
        known = self._origins.get(name)
        if known is not None and known != origin:
            raise ValueError(
                f"{self.kind} {name!r} is already registered by {known}; {origin} must choose another name"
            )
        self._entries[name], self._origins[name] = value, origin

    def register_family(self, prefix: str, members: Callable[[], Mapping[str, T]]) -> None:
        """Register names that begin with ``prefix`` and are only known once another package is imported.

        Args:
            members: all of them by their whole names, asked for at the first look-up that needs them. It raises
                ImportError where the package is missing: the names are then left out of lists, and a look-up of one of
                them raises that error.

        Raises:
            ValueError: the prefix is taken.
        """
        if prefix in self._families:
            raise ValueError(f"{self.kind} names that begin with {prefix!r} are already registered")
        self._families[prefix] = members

    def get(self, name: str) -> T:
        """The entry called ``name``.

        Raises:
            UnknownNameError: nothing is registered under that name.
            ImportError: the name is one of a family whose package is missing.
        """
        if name in self._entries:
            return self._entries[name]
        members = self._family_of(name)
        if name in members:
            return members[name]
        raise self.unknown(name)

    def unknown(self, name: object, key: str | None = None) -> UnknownNameError:
        """The error for a name that is not registered; of families it lists the prefixes."""
        listed = [*self._entries, *(f"{prefix}NAME" for prefix in self._families)]
        return unknown_name(self.kind, name, listed, key, set(self.names()) - set(self._entries))

    def names(self) -> list[str]:
        """All names, those of families included whose package is installed."""
        found = set(self._entries)
        for members in self._families.values():
            try:
                found |= set(members())
            except ImportError:
                continue
        return sorted(found)

    def prefixes(self) -> list[str]:
        """How the names of families begin."""
        return sorted(self._families)

    def _family_of(self, name: object) -> Mapping[str, T]:
        for prefix, members in self._families.items():
            if isinstance(name, str) and name.startswith(prefix):
                return members()
        return {}

    def __contains__(self, name: object) -> bool:
        return name in self._entries or name in self._family_of(name)

    def __len__(self) -> int:
        return len(self.names())

    def __iter__(self) -> Iterator[str]:
        return iter(self.names())


def _origin(value: object, caller: str) -> str:
    """Where a function or class is defined; of another object the module that registers it."""
    if hasattr(value, "__qualname__"):
        return f"{getattr(value, '__module__', caller)}.{value.__qualname__}"  # type: ignore[attr-defined]
    return caller
