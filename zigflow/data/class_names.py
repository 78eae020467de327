"""Classes by name: which number a folder gets, and sets whose numbers follow the names of another set."""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from zigflow.registry import UnknownNameError, unknown_name

from .contents import contents_of
from .source import DataSource

_SHOWN = 12


def folder_order(names: Iterable[str]) -> list[str]:
    """Names of class folders in the order of their numbers: by value where all are whole numbers, else as text."""
    names = list(names)
    if names and all(name.isdecimal() for name in names):
        return sorted(names, key=lambda name: (int(name), name))
    return sorted(names)


def renumbered(names: Sequence[str]) -> list[tuple[str, int]]:
    """The names that are numbers, but not the number of their class, each with that."""
    return [(name, place) for place, name in enumerate(names) if name.isdecimal() and int(name) != place]


def are_numbers(names: Sequence[str]) -> bool:
    """Whether names say no more than the numbers 0, 1, 2, ... of their classes."""
    return all(name == str(place) for place, name in enumerate(names))


def shown(names: Sequence[str], most: int = _SHOWN) -> str:
    """``cat, dog, ...``"""
    return ", ".join(names[:most]) + (f", ... {len(names) - most} more" if len(names) > most else "")


def check_names(names: Sequence[str], where: str) -> tuple[str, ...]:
    """``names`` as a tuple of different texts.

    Raises:
        ValueError: one of them stands twice, or is no text.
    """
    seen: set[str] = set()
    for name in names:
        if not isinstance(name, str) or not name:
            raise ValueError(f"{where}: the name of a class is a text, got {name!r}")
        if name in seen:
            raise ValueError(f"{where}: two classes are called {name!r}")
        seen.add(name)
    return tuple(names)


def number_of(label: int | str, names: Sequence[str], what: str = "class") -> int:
    """The number of a class that is given by its number or its name.

    Raises:
        UnknownNameError: no class is called so; near matches are named.
        ValueError: a name, and the classes have none.
    """
    if isinstance(label, int):
        return label
    if not names:
        raise ValueError(f"{what} {label!r}: these classes have no names, give their numbers")
    if label not in names:
        raise unknown_name(what, label, list(names))
    return list(names).index(label)


def only_renames(own: Sequence[str], names: Sequence[str]) -> bool:
    """Whether ``names`` call classes by a name that have none of their own, be it that they are called 0, 1, 2, ..."""
    return are_numbers(own) and len(own) == len(names) and set(own) != set(names)


def numbers_among(own: Sequence[str], names: Sequence[str]) -> tuple[int, ...] | None:
    """The numbers that the classes ``own`` have among ``names``; None where they are their own already.

    Raises:
        UnknownNameError: a class is not among ``names``.
    """
    if not names or not own or tuple(own) == tuple(names)[: len(own)] or only_renames(own, names):
        return None
    return _among(own, names)


def _among(own: Sequence[str], names: Sequence[str]) -> tuple[int, ...]:
    unknown = [name for name in own if name not in names]
    if unknown:
        raise UnknownNameError(
            f"has classes that are not among the {len(names)} known ones: {shown(unknown)}; known: {shown(names)}"
        )
    return tuple(list(names).index(name) for name in own)


class NamedClasses:
    """Another source, with labels that count along ``names`` instead of along its own ``class_names``.

    Raises:
        ValueError: a class of the source is not among ``names``.
    """

    def __init__(self, source: DataSource, names: Sequence[str]):
        self.source, self.class_names = source, tuple(names)
        own: tuple[str, ...] = tuple(getattr(source, "class_names", ()))
        self.numbers = _among(own, self.class_names)
        self.image_shape, self.shard_sizes = source.image_shape, source.shard_sizes
        self.num_classes = len(self.class_names)
        self.first: Mapping[str, Any] = self._named(getattr(source, "first", None) or source[0])
        self.contents = contents_of(source).each(
            lambda whole: hashlib.sha256(f"{whole} {self.numbers}".encode()).hexdigest()[:32]
        )
        self.fingerprint = self.contents.fingerprint

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> Mapping[str, Any]:
        return self._named(self.source[index])

    def class_of(self, index: int) -> str | None:
        """As the source says; None where it does not."""
        known = getattr(self.source, "class_of", None)
        return None if known is None else known(index)

    def _named(self, sample: Mapping[str, Any]) -> Mapping[str, Any]:
        return {**sample, "labels": self.numbers[sample["labels"]]} if "labels" in sample else sample


def by_name(source: DataSource, names: Sequence[str]) -> DataSource:
    """``source`` with the numbers that its classes have among ``names``: itself where they are its own already.

    Classes that are called by their numbers have no names: as many ``names`` are theirs, in their order.

    Raises:
        ValueError: a class of the source is not among ``names``.
    """
    own = tuple(getattr(source, "class_names", ()))
    return source if numbers_among(own, names) is None else NamedClasses(source, names)
