"""One way to set a key: with ``+``, with ``++`` or with neither, if what reads the node takes it.

Hydra wants ``KEY=VALUE`` for a key that the chosen YAML lists and ``+KEY=VALUE`` for one that it does not, so the same
keyword of the same class is typed differently from file to file. Here the YAML does not matter: what is composed is
refused by Hydra, looked at, and composed again with ``++`` where the class named by ``_target_``, or a field of the
settings, has that name. Classes are imported for a key that no YAML lists, and not before.
"""

import inspect
import re
from collections.abc import Callable
from typing import Any, TypeVar

from hydra.errors import ConfigCompositionException
from hydra.utils import get_object
from omegaconf.errors import OmegaConfBaseException

from zigflow.settings import Settings
from zigflow.typed import has_field

__all__ = ["compose_leniently", "takes_keyword"]

# Nodes whose other keys are keywords of the class that they name.
_NODES = ("model", "process", "codec", "metrics", "data.source", "data.heldout")
_KEY = re.compile(r"\+{0,2}(?P<key>[\w.]+)=(?P<value>.*)", re.DOTALL)
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
    while True:
        try:
            return compose(list(overrides)), overrides
        except ConfigCompositionException as error:
            changed = _forced(overrides, *_refused(error))
            if changed == overrides:
                raise
            overrides = changed


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
    return [
        f"++{match['key']}={match['value']}" if match and match["key"] == key else text
        for match, text in zip(found, overrides, strict=True)
    ]


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
    try:
        keywords = inspect.signature(get_object(target)).parameters.values()
    except Exception:
        return False
    return any(k.name == name or k.kind is k.VAR_KEYWORD for k in keywords)
