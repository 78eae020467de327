"""Named things that people type: a mapping that refuses duplicates and helps with typing errors."""

import difflib
from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

from zigflow.errors import ZigflowError

T = TypeVar("T")


class UnknownNameError(ZigflowError, KeyError, ValueError):
    """A name that no registry entry answers to; the message lists near matches."""

    def __str__(self) -> str:
        return str(self.args[0])


def unknown_name(kind: str, name: object, allowed: list[str]) -> UnknownNameError:
    """Build the error for a name that is not in ``allowed``, with near matches first."""
    close = difflib.get_close_matches(str(name), allowed, n=3, cutoff=0.5)
    hint = f" Did you mean {' or '.join(map(repr, close))}?" if close else ""
    return UnknownNameError(f"unknown {kind} {name!r}.{hint} Known: {', '.join(sorted(allowed))}")


class Registry(Generic[T]):
    """Names to objects. ``kind`` appears in every message ("sampler", "model variant", ...)."""

    def __init__(self, kind: str):
        self.kind = kind
        self._entries: dict[str, T] = {}

    def register(self, name: str, entry: T | None = None) -> Callable[[T], T]:
        """Register ``entry`` under ``name``, or act as a decorator when ``entry`` is omitted.

        Raises:
            ValueError: the name is taken by another object; both origins are named.
        """

        def add(value: T) -> T:
            known = self._entries.get(name)
            if known is not None and _origin(known) != _origin(value):
                raise ValueError(
                    f"{self.kind} {name!r} is already registered by {_origin(known)}; "
                    f"{_origin(value)} must choose another name"
                )
            self._entries[name] = value
            return value

        if entry is not None:
            add(entry)
        return add

    def get(self, name: str) -> T:
        """The entry called ``name``.

        Raises:
            UnknownNameError: nothing is registered under that name.
        """
        if name not in self._entries:
            raise unknown_name(self.kind, name, self.names())
        return self._entries[name]

    def names(self) -> list[str]:
        return sorted(self._entries)

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def __iter__(self) -> Iterator[str]:
        return iter(self.names())


def _origin(value: object) -> str:
    module = getattr(value, "__module__", type(value).__module__)
    return f"{module}.{getattr(value, '__qualname__', type(value).__qualname__)}"


MODEL_VARIANTS: Registry[Callable] = Registry("model variant")


def register_variant(name: str, family: Callable, what: str, **fixed) -> Callable:
    """A function that builds ``family`` with the keywords ``fixed`` unless they are given; registered as a variant.

    Raises:
        ValueError: the name is taken.
    """

    def build(**kwargs):
        return family(**{**fixed, **kwargs})

    build.__name__ = build.__qualname__ = name
    # Of two families that claim a name, both are named.
    build.__module__ = family.__module__
    build.__doc__ = f"{what} of width {fixed['embed_dim']} and depth {fixed['depth']}."
    return MODEL_VARIANTS.register(name)(build)
