"""A node of the configuration becomes an object."""

import importlib.util
import inspect
import sys
from collections.abc import Mapping
from typing import Any

from hydra.utils import get_object, instantiate

from zigflow.errors import ZigflowError
from zigflow.paths import expanded
from zigflow.settings import SettingsError


def make(key: str, node: Mapping[str, Any]) -> Any:
    """Instantiate a node; a mistake in its keywords becomes one line that names the key."""
    try:
        return instantiate(_with_annotated_paths(key, node), _convert_="all")
    except Exception as error:
        cause = error.__cause__ if error.__cause__ is not None else error
        mistakes = (ValueError, TypeError, KeyError, ImportError, FileNotFoundError, NotADirectoryError)
        if isinstance(cause, mistakes):
            raise SettingsError(f"{key} ({node.get('_target_')}): {cause}{_own_file(node)}") from error
        if isinstance(cause, ZigflowError):
            raise cause from error
        raise


def _own_file(node: Mapping[str, Any]) -> str:
    """How a class is found whose module is not installed; empty where the module is there."""
    module = str(node.get("_target_")).partition(".")[0]
    if not module.isidentifier() or module in sys.modules or importlib.util.find_spec(module) is not None:
        return ""
    return f" For a class in a file of your own give plugins=[{module}.py]."


def target(key: str, node: Mapping[str, Any]) -> Any:
    """The class or function that a node names.

    Raises:
        SettingsError: it cannot be imported, in one line that names the key.
    """
    try:
        return get_object(str(node["_target_"]))
    except Exception as error:
        cause = " ".join(str(error).split()) + _own_file(node)
        raise SettingsError(f"{key}._target_={node['_target_']} cannot be imported: {cause}") from error


def _with_annotated_paths(key: str, node: Mapping[str, Any]) -> dict[str, Any]:
    """The node, those keywords expanded that its class annotates as paths, whatever it calls them."""
    try:
        keywords = inspect.signature(get_object(str(node["_target_"]))).parameters
    except Exception:
        # What is wrong with it is told where it is built.
        return dict(node)
    annotated = [name for name, keyword in keywords.items() if "Path" in str(keyword.annotation)]
    given = {name: node[name] for name in annotated if isinstance(node.get(name), str)}
    return {**node, **{name: expanded(f"{key}.{name}", value) for name, value in given.items()}}
