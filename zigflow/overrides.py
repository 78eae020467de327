"""One way to set a key and to choose a preset: with ``+``, with ``++`` or with neither.

Hydra wants ``KEY=VALUE`` for a key that the chosen YAML lists and ``+KEY=VALUE`` for one that it does not, so the same
keyword of the same class is typed differently from file to file; likewise ``GROUP=CHOICE`` for a group of the defaults
list and ``+GROUP=CHOICE`` for another one, such as ``experiment``. Here the YAML does not matter: what is composed is
refused by Hydra, looked at, and composed again with the sign that Hydra wants where the class named by ``_target_``, or
a field of the settings, has that name. Classes are imported for a key that no YAML lists, and not before.
"""

import inspect
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

from hydra.errors import ConfigCompositionException
from hydra.utils import get_object
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from zigflow.registry import near_names
from zigflow.settings import Settings, SettingsError
from zigflow.typed import has_field

__all__ = [
    "check_added",
    "check_keywords",
    "check_nodes",
    "compose_leniently",
    "signs",
    "takes_keyword",
    "with_signs",
]

# Nodes whose other keys are keywords of the class that they name.
_NODES = ("model", "process", "codec", "metrics", "data.source", "data.heldout")
_KEY = re.compile(r"(?P<sign>\+{0,2})(?P<key>[\w./@]+)=(?P<value>.*)", re.DOTALL)
# What Hydra says about a group, and the sign that it wants there.
_TWICE = re.compile(r"Multiple values for ([\w/@]+)\.|^([\w/@]+) appears more than once")
_GROUPS = (
    (re.compile(r"Could not override '([\w/@]+)'\. No match in the defaults list"), "+"),
    (re.compile(r"Multiple values for ([\w/@]+)\."), ""),
    (re.compile(r"^([\w/@]+) appears more than once in the final defaults list"), ""),
    (re.compile(r"force-add of config groups is not supported: '\+\+([\w/@]+)="), ""),
)
_ComposedT = TypeVar("_ComposedT")


def compose_leniently(
    compose: Callable[[list[str]], _ComposedT], overrides: list[str]
) -> tuple[_ComposedT, list[str]]:
    """Compose, with ``++`` before the keys that their reader takes and no YAML lists.

    Args:
        compose: what composes; called again for each key that Hydra refuses.
        overrides: as typed; they stay as they are.

    Returns:
        What ``compose`` made, and the overrides that it was made from.

    Raises:
        hydra.errors.HydraException: ``compose`` refused a key that nothing reads, or something else.
    """
    tried = [overrides]
    first: ConfigCompositionException | None = None
    while True:
        try:
            return compose(list(tried[-1])), tried[-1]
        except ConfigCompositionException as error:
            if first is None or _TWICE.search(str(error)):
                first = error
            changed = _resigned(tried[-1], error)
            if changed == tried[-1]:
                raise
            if changed in tried:
                # Neither with a sign nor without it.
                raise first from None
            tried.append(changed)


def signs(typed: list[str], composed: list[str]) -> dict[str, str]:
    """Key -> sign of what :func:`compose_leniently` has changed, to be given to the same keys elsewhere."""
    found = {}
    for text in composed:
        match = _KEY.fullmatch(text)
        if match and text not in typed:
            found[match["key"]] = match["sign"]
    return found


def with_signs(arguments: list[str], changed: Mapping[str, str]) -> list[str]:
    """The arguments with the signs that :func:`signs` has found."""
    found = [_KEY.fullmatch(text) for text in arguments]
    return [
        f"{changed[match['key']]}{match['key']}={match['value']}"
        if match and match["key"] in changed
        else text
        for match, text in zip(found, arguments, strict=True)
    ]


def _resigned(overrides: list[str], error: ConfigCompositionException) -> list[str]:
    for pattern, sign in _GROUPS:
        group = pattern.search(str(error))
        if group:
            return with_signs(overrides, {group[1]: sign})
    return _forced(overrides, *_refused(error))


def _refused(error: ConfigCompositionException) -> tuple[str | None, Any]:
    """The key that is not listed, or is although it was typed with ``+``; and the node that it would stand in."""
    already = re.search(r"An item is already at '([\w.]+)'", str(error))
    if already:
        return already[1], None
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OmegaConfBaseException) and "not in struct" in str(cause):
            typed = re.search(r"Could not override '([\w.]+)'", str(error))
            return typed[1] if typed else cause.full_key, cause.parent_node
        cause = cause.__cause__
    return None, None


def _forced(overrides: list[str], key: str | None, parent: Any) -> list[str]:
    found = [_KEY.fullmatch(text) for text in overrides]
    if key is None or not (parent is None or _is_read(key, parent, [f for f in found if f])):
        return overrides
    return with_signs(overrides, {key: "++"})


def _is_read(key: str, parent: Any, typed: list[re.Match[str]]) -> bool:
    if has_field(Settings, key) or key.startswith("optim.args."):
        return True
    for node in _NODES:
        name, _, _ = key.removeprefix(f"{node}.").partition(".")
        if not key.startswith(f"{node}."):
            continue
        if name == "_target_":
            return True
        chosen = [match["value"] for match in typed if match["key"] == f"{node}._target_"]
        target = chosen[-1] if chosen else _node_value(parent, node, "_target_")
        if target is None:
            # The class is that of the checkpoint, which answers when it is opened.
            return _node_value(parent, node, "name") == "from_checkpoint"
        return takes_keyword(str(target), name)
    return False


def _node_value(parent: Any, node: str, name: str) -> Any:
    """A value of ``node``, found from a node at or below it."""
    root = parent._get_root()
    for part in node.split("."):
        root = None if root is None else root.get(part)
    return None if root is None else root.get(name)


def takes_keyword(target: str, name: str) -> bool:
    """Whether the class or function at this dotted path has a keyword ``name``; no when it cannot be imported."""
    return any(k.name == name or k.kind is k.VAR_KEYWORD for k in _keywords(target) or ())


def check_added(cfg: DictConfig, overrides: list[str]) -> None:
    """Refuse a keyword that was added to a node with ``+`` or ``++``, and that its class does not have.

    Raises:
        SettingsError: the key, the class and near matches among its arguments.
    """
    for text in overrides:
        match = _KEY.fullmatch(text)
        if not match or not match["sign"]:
            continue
        for node in _NODES:
            if match["key"].startswith(f"{node}."):
                target = _node_value(cfg, node, "_target_")
                if target is not None:
                    check_keywords(
                        node, str(target), [match["key"].removeprefix(f"{node}.").partition(".")[0]]
                    )


def check_nodes(values: Mapping[str, Any]) -> None:
    """Refuse keywords that the classes of a configuration's nodes do not have, before any of them is built.

    Raises:
        SettingsError: the key, the class and near matches among its arguments.
    """
    for path in _NODES:
        node: Any = values
        for part in path.split("."):
            node = node.get(part) if isinstance(node, Mapping) else None
        if isinstance(node, Mapping) and node.get("_target_"):
            check_keywords(path, str(node["_target_"]), node)


def check_keywords(node: str, target: str, names: Iterable[str]) -> None:
    """Refuse keywords that a node's class does not have; one that cannot be imported is told where it is built.

    Args:
        node: the node as it is typed: ``model``, ``data.source``.
        target: dotted path of its class.
        names: keys of the node; ``name`` and those of Hydra itself are none of the class.

    Raises:
        SettingsError: the key, the class and near matches among its arguments.
    """
    keywords = _keywords(target)
    if keywords is None or any(keyword.kind is keyword.VAR_KEYWORD for keyword in keywords):
        return
    known = [k.name for k in keywords if k.kind is not k.VAR_POSITIONAL]
    for name in names:
        if name in known or name == "name" or re.fullmatch(r"_\w+_", name):
            continue
        close = near_names(name, known, cutoff=0.6)
        raise SettingsError(
            f"unknown key {node}.{name}: {target.rpartition('.')[2]} has no argument {name}, "
            + (
                f"did you mean {' or '.join(f'{node}.{k}' for k in close)}?"
                if close
                else f"only {', '.join(known)}"
            )
        )


def _keywords(target: str) -> list[inspect.Parameter] | None:
    try:
        return list(inspect.signature(get_object(target)).parameters.values())
    except Exception:
        return None
