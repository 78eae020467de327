"""Fields inside of JSON members: ``json.label`` is the field ``label`` of the member ``json``."""

from collections.abc import Collection, Mapping
from typing import Any

from .decode import DecodeError, Limits, decode_json, decode_text

_LABEL_WORDS = ("label", "class", "cls", "categor", "target")


def split_suffix(suffix: str, present: Collection[str]) -> tuple[str, tuple[str, ...]]:
    """The member that ``suffix`` names and the way to a field in it, () for the member itself.

    Args:
        present: suffixes that a sample has; one of them is always a member.
    """
    if suffix in present:
        return suffix, ()
    parts = suffix.split(".")
    if "json" not in parts[:-1]:
        return suffix, ()
    end = parts.index("json") + 1
    return ".".join(parts[:end]), tuple(parts[end:])


def pick(value: Any, path: tuple[str, ...]) -> Any:
    """The field that ``path`` leads to; entries of lists are called by their number.

    Raises:
        DecodeError: there is none; what there is, is named.
    """
    for place, name in enumerate(path):
        if isinstance(value, Mapping) and name in value:
            value = value[name]
        elif isinstance(value, list) and name.isdecimal() and int(name) < len(value):
            value = value[int(name)]
        else:
            there = (
                f"it has {', '.join(list(value)[:16])}"
                if isinstance(value, Mapping)
                else f"it is {value!r:.80}"
            )
            raise DecodeError(f"the document has no field {'.'.join(path[: place + 1])}; {there}")
    return value


def label_hint(members: Mapping[str, bytes], limits: Limits) -> str:
    """The entry of ``rename`` that would read labels out of a sample's members, as far as it can be told; or "".

    Args:
        members: suffix -> bytes, of the members that nothing reads.
    """
    for suffix, data in members.items():
        kind = suffix.rpartition(".")[2]
        try:
            if kind == "json":
                found = _label_field(decode_json(data, limits), suffix)
                if found:
                    return f"{{{found}: labels}}"
            elif kind == "cls" or (kind == "txt" and decode_text(data, limits).strip().isdecimal()):
                return f"{{{suffix}: labels}}"
        except DecodeError:
            continue
    return ""


def _label_field(document: Any, suffix: str) -> str:
    if isinstance(document, int) and not isinstance(document, bool):
        return suffix
    if not isinstance(document, Mapping):
        return ""
    for name, value in document.items():
        plain = isinstance(value, (int, str)) and not isinstance(value, bool)
        if plain and any(word in str(name).lower() for word in _LABEL_WORDS):
            return f"{suffix}.{name}"
    return ""
