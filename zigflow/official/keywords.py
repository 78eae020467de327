"""Keywords of the published constructors: each one known by name, and served, without effect, or refused.

Every family lists its published keywords once, with what becomes of them here. A keyword that is in no table and is
none of our class's is refused with near matches.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from zigflow.registry import unknown_name


@dataclass(frozen=True)
class Keyword:
    """One published keyword.

    Attributes:
        to: our keyword for it; "" for one that is not handed on.
        values: the values that are served; None: all.
        reason: why others are refused.
    """

    to: str = ""
    values: tuple[Any, ...] | None = None
    reason: str = ""


def served(to: str) -> Keyword:
    """Handed on as our keyword ``to``, whatever its value is."""
    return Keyword(to)


def inert() -> Keyword:
    """Read by nothing in the published network, or only by parts that are refused: any value is accepted."""
    return Keyword()


def only(*values: Any, because: str, to: str = "") -> Keyword:
    """Accepted at ``values``, refused at others."""
    return Keyword(to, values, because)


def read_keywords(
    family: str, table: Mapping[str, Keyword], given: Mapping[str, Any], own: Collection[str]
) -> dict[str, Any]:
    """Published keywords as ours; our own stay as they are.

    Args:
        table: the published keywords of the family.
        own: keywords of our class.

    Raises:
        ValueError: a value that is not served, or one keyword under two names.
        UnknownNameError: a keyword that neither has; near matches are named.
    """
    read: dict[str, Any] = {}
    origin: dict[str, str] = {}
    for name, value in given.items():
        if name not in table:
            if name not in own:
                raise unknown_name(
                    f"keyword of {family}", name, [*table, *(n for n in own if n not in table)]
                )
            to = name
        else:
            keyword = table[name]
            if keyword.values is not None and not any(_equal(value, v) for v in keyword.values):
                allowed = " or ".join(map(repr, keyword.values))
                raise ValueError(
                    f"{name}={value!r} of {family} is not served, only {allowed}: {keyword.reason}"
                )
            to = keyword.to
        if not to:
            continue
        if to in read:
            raise ValueError(f"{origin[to]} and {name} are one keyword: give one of them")
        read[to], origin[to] = value, name
    return read


def _equal(a: Any, b: Any) -> bool:
    """0 and False are two things here, 1 and 1.0 one, and so are a list and a tuple."""
    if isinstance(a, bool) or isinstance(b, bool):
        return a is b
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return list(a) == list(b)
    if isinstance(a, (int, float)) and isinstance(b, (int, float)):
        return a == b
    return type(a) is type(b) and a == b
