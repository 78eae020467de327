"""Plain mappings as typed, frozen values; every mistake is one line that names the key as it is typed."""

import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Mapping
from typing import Any

from zigflow.errors import SettingsError


def parse(cls: type, values: Mapping[str, Any], prefix: str) -> Any:
    """Build the dataclass ``cls`` from a mapping, checking names and types; ``prefix`` is the key's path."""
    hints = typing.get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls)}
    kwargs = {}
    for key, value in values.items():
        if key not in fields:
            raise SettingsError(unknown_key(prefix + key, [prefix + name for name in fields]))
        kwargs[key] = convert(prefix + key, value, hints[key])
    missing = [
        prefix + f.name
        for f in fields.values()
        if f.default is dataclasses.MISSING
        and f.default_factory is dataclasses.MISSING
        and f.name not in kwargs
    ]
    if missing:
        raise SettingsError(f"{missing[0]} is missing: give {missing[0]}=VALUE")
    return cls(**kwargs)


def has_field(cls: type, key: str) -> bool:
    """Whether ``key``, a path of names, leads to a field of the dataclass ``cls`` or of one inside it."""
    name, _, rest = key.partition(".")
    if not dataclasses.is_dataclass(cls) or name not in (f.name for f in dataclasses.fields(cls)):
        return False
    return not rest or has_field(typing.get_type_hints(cls)[name], rest)


def is_text_field(cls: type, key: str) -> bool:
    """Whether ``key``, a path of names, is a field of ``cls`` or of one inside it that is a text, or a text or None."""
    name, _, rest = key.partition(".")
    if not has_field(cls, name):
        return False
    hint = typing.get_type_hints(cls)[name]
    return is_text_field(hint, rest) if rest else hint in (str, str | None)


def unknown_key(key: str, known: list[str]) -> str:
    """One line for a key that does not exist, with near matches."""
    close = difflib.get_close_matches(key, known, n=3, cutoff=0.85) or difflib.get_close_matches(
        key, known, n=1
    )
    siblings = [name for name in known if name.rpartition(".")[0] == key.rpartition(".")[0]]
    hint = (
        f"did you mean {' or '.join(close)}?"
        if close
        else f"known here: {', '.join(sorted(siblings or known))}"
    )
    return f"unknown key {key}: {hint}"


def convert(key: str, value: Any, hint: Any) -> Any:
    """``value`` as the annotated type; 0 and 1 pass for booleans, whole floats for integers.

    Raises:
        SettingsError: the value has another type.
    """
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in args:
            return None
        # A number or a list of them: by what was given.
        listed = isinstance(value, (list, tuple))
        choices = [a for a in args if a is not type(None)]
        fitting = [a for a in choices if (typing.get_origin(a) is tuple) == listed]
        return convert(key, value, (fitting or choices)[0])
    if dataclasses.is_dataclass(hint):
        if not isinstance(value, Mapping):
            raise SettingsError(f"{key}={value!r} must be a group of keys")
        return parse(typing.cast(type, hint), value, f"{key}.")
    if origin is tuple:
        if not isinstance(value, (list, tuple)):
            raise SettingsError(f"{key}={value!r} must be a list such as {key}=[...]")
        inner = args[0]
        if args[-1] is not Ellipsis and len(value) != len(args):
            raise SettingsError(f"{key}={list(value)} must have {len(args)} entries, got {len(value)}")
        return tuple(convert(f"{key}[{i}]", v, inner) for i, v in enumerate(value))
    if hint is bool and isinstance(value, int) and value in (0, 1):
        return bool(value)
    if (
        hint is float
        and isinstance(value, (int, float))
        and not isinstance(value, bool)
        and math.isfinite(value)
    ):
        return float(value)
    if hint is int and isinstance(value, float) and value.is_integer():
        return int(value)
    if hint is int and isinstance(value, int) and not isinstance(value, bool):
        return value
    if hint is str and isinstance(value, (str, int, float)) and not isinstance(value, bool):
        return str(value)
    if (origin or hint) is Mapping and isinstance(value, Mapping):
        return dict(value)
    wanted = {bool: "true or false", int: "an integer", float: "a number", str: "text"}.get(
        hint, "a group of keys"
    )
    raise SettingsError(f"{key}={value!r} must be {wanted}")


def one_of(key: str, value: Any, allowed: tuple) -> None:
    if value not in allowed:
        names = ["null" if a is None else str(a) for a in allowed]
        close = difflib.get_close_matches(str(value), names, n=1, cutoff=0.5)
        hint = f"; did you mean {close[0]}?" if close else ""
        raise SettingsError(f"{key}={value} is not one of {', '.join(names)}{hint}")


def positive(key: str, value: float) -> None:
    if not value > 0:
        raise SettingsError(f"{key}={value} must be greater than 0")


def not_negative(key: str, value: float) -> None:
    if value < 0:
        raise SettingsError(f"{key}={value} must not be negative")


def at_least(key: str, value: int, least: int) -> None:
    if value < least:
        raise SettingsError(f"{key}={value} must be at least {least}")
