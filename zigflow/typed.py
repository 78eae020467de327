"""Plain mappings as typed, frozen values; every mistake is one line that names the key as it is typed.

A key is declared once, as a field of a dataclass: ``lr: float = key(1e-4, "learning rate", above=0)``. What reads,
checks, shows or documents keys follows from these fields through :func:`declared`.
"""

import dataclasses
import math
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from zigflow.errors import SettingsError
from zigflow.registry import near_names

REQUIRED = dataclasses.MISSING
_METADATA = "zigflow.key"


@dataclass(frozen=True)
class Declaration:
    """What a key means and may hold, beside its type and default.

    Attributes:
        text: one line, without a full stop.
        choices: the allowed values; empty for any of the type.
        least: the smallest allowed value.
        above: a bound that values must exceed.
        name: the key, where the field is called otherwise.
        accepts: the type that is typed, where the field holds another one.
        used: where it matters: "training", "sampling" (in evaluations during training, too) or "both"; empty for the
            same as its group.
    """

    text: str
    choices: tuple[Any, ...] = ()
    least: float | None = None
    above: float | None = None
    name: str | None = None
    accepts: Any = None
    used: str = ""

    def check(self, key: str, value: Any) -> None:
        """Refuse a value out of range; of a list each entry is held against the bounds.

        Raises:
            SettingsError: the key, the value and what is allowed.
        """
        if self.choices:
            one_of(key, value, self.choices)
        if value is None:
            return
        for entry in value if isinstance(value, tuple) else (value,):
            if self.least == 0:
                not_negative(key, entry)
            elif self.least is not None:
                at_least(key, entry, self.least)
            if self.above is not None and not entry > self.above:
                raise SettingsError(f"{key}={entry} must be greater than {self.above}")


def key(default: Any, text: str, **about: Any) -> Any:
    """A field of a dataclass that is a key of the configuration.

    Args:
        default: a value, a type that makes one (``dict``), or ``REQUIRED``.
        text: its meaning in one line.
        **about: the rest of :class:`Declaration`.
    """
    metadata = {_METADATA: Declaration(text, **about)}
    if isinstance(default, type):
        return dataclasses.field(default_factory=default, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


@dataclass(frozen=True)
class Key:
    """A declared key, as :func:`declared` lists it.

    Attributes:
        path: as it is typed: ``optim.lr``.
        hint: the annotated type.
        default: ``REQUIRED`` without one; also for a group.
        about: the declaration.
        used: where it matters, the group's where the key says nothing itself.
        group: the dataclass of a group of keys; None for a key with a value.
    """

    path: str
    hint: Any
    default: Any
    about: Declaration
    used: str
    group: type | None = None


def declaration(field: "dataclasses.Field[Any]") -> Declaration:
    """What :func:`key` was told of a field; one without text for a field that is none."""
    return field.metadata.get(_METADATA, Declaration(""))


def declared(cls: type, prefix: str = "", used: str = "both") -> Iterator[Key]:
    """The keys of a settings class in the order of their declaration, each group before its keys.

    Args:
        prefix: the path of the group, with a dot at its end.
        used: where keys matter that do not say so themselves.
    """
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        about, hint = declaration(field), hints[field.name]
        path, where = prefix + (about.name or field.name), about.used or used
        if dataclasses.is_dataclass(hint):
            yield Key(path, hint, REQUIRED, about, where, typing.cast(type, hint))
            yield from declared(typing.cast(type, hint), f"{path}.", where)
            continue
        made = field.default_factory() if field.default_factory is not REQUIRED else field.default
        yield Key(path, about.accepts or hint, made, about, where)


def parse(cls: type, values: Mapping[str, Any], prefix: str, known: Sequence[str] = ()) -> Any:
    """Build the dataclass ``cls`` from a mapping, checking names, types and ranges.

    Args:
        prefix: the path of the group: ``optim.``; empty for the whole configuration.
        known: the paths of all keys, for near matches; of this group where they are not given.

    Raises:
        SettingsError: an unknown or missing key, a value of another type or out of range, in one line.
    """
    known = known or [k.path for k in declared(cls, prefix)]
    hints = typing.get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls)}
    kwargs = {}
    for key, value in values.items():
        if key not in fields:
            raise SettingsError(unknown_key(prefix + key, list(known)))
        kwargs[key] = convert(prefix + key, value, hints[key], known)
        declaration(fields[key]).check(prefix + key, kwargs[key])
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
    """One line for a key that does not exist, with near matches wherever they stand."""
    close = _near(key, known)
    siblings = [name for name in known if name.rpartition(".")[0] == key.rpartition(".")[0]]
    hint = (
        f"did you mean {' or '.join(close)}?"
        if close
        else f"known here: {', '.join(sorted(siblings or known))}"
    )
    return f"unknown key {key}: {hint}"


def _near(key: str, known: list[str]) -> list[str]:
    """Keys that may be meant: spelled alike; else of the same name, or of a name with the same words, elsewhere."""
    place, _, name = key.rpartition(".")
    last = {path: path.rpartition(".")[2] for path in known}
    words = set(name.split("_"))
    # The shortest first: it says the least beside what was typed.
    partly = sorted(
        (path for path in known if words <= set(last[path].split("_"))), key=lambda path: len(last[path])
    )
    alike = near_names(key, known, cutoff=0.85)
    if alike:
        here = [path for path in partly if place in ("", path.rpartition(".")[0]) and path not in alike]
        return (alike + here)[:5]
    same = [path for path in known if last[path] == name]
    names = near_names(name, dict.fromkeys(last.values()), cutoff=0.85)
    spelled = [path for path in known if last[path] in names]
    return (same or partly or spelled or near_names(key, known, n=1, cutoff=0.6))[:5]


def convert(key: str, value: Any, hint: Any, known: Sequence[str] = ()) -> Any:
    """``value`` as the annotated type; 0 and 1 pass for booleans, whole floats for integers.

    Args:
        known: the paths of all keys, for near matches inside a group.

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
        return parse(typing.cast(type, hint), value, f"{key}.", known)
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
        close = near_names(value, names, n=1)
        hint = f"; did you mean {close[0]}?" if close else ""
        raise SettingsError(f"{key}={value} is not one of {', '.join(names)}{hint}")


def not_negative(key: str, value: float) -> None:
    if value < 0:
        raise SettingsError(f"{key}={value} must not be negative")


def at_least(key: str, value: float, least: float) -> None:
    if value < least:
        raise SettingsError(f"{key}={value} must be at least {least}")
