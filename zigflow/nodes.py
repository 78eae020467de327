"""A node of the configuration becomes an object."""

from collections.abc import Mapping
from typing import Any

from hydra.utils import instantiate

from zigflow import plugins
from zigflow.settings import SettingsError


def make(key: str, node: Mapping[str, Any]) -> Any:
    """Instantiate a node; a mistake in its keywords becomes one line that names the key."""
    try:
        return instantiate(dict(node), _convert_="all")
    except Exception as error:
        cause = error.__cause__ if error.__cause__ is not None else error
        mistakes = (ValueError, TypeError, KeyError, ImportError, FileNotFoundError, NotADirectoryError)
        if isinstance(cause, mistakes):
            raise SettingsError(f"{key} ({node.get('_target_')}): {cause}") from error
        if not plugins.is_foreign(cause):
            raise cause from error
        raise
