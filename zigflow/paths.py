"""Where the project's own files lie, in a checkout and in an installed wheel; and what a configured path means.

A shell expands ``~`` in few of the places where a path is typed, and in none of those where it stands in YAML: taken
as it is, it names a folder ``~`` in the working directory.
"""

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from zigflow.typed import SettingsError

_HERE = Path(__file__).resolve().parent


def config_dir() -> Path:
    """The folder of YAML files: ``zigflow/config`` in a wheel, ``config/`` at the top of a checkout.

    Raises:
        FileNotFoundError: neither exists, the installation is incomplete.
    """
    for candidate in (_HERE / "config", _HERE.parent / "config"):
        if (candidate / "default.yaml").is_file():
            return candidate
    raise FileNotFoundError(f"no config folder beside {_HERE}; reinstall zigflow")


# Keys whose values are paths, by the last part of their names, wherever they stand.
_NAMES = (
    "root", "path", "paths", "file", "files", "folder", "folders", "dir", "dirs", "cache", "ckpt", "captions",
    "tar_base", "inception_weights", "reference_stats", "plugins",
)  # fmt: skip
_ENDINGS = ("_root", "_path", "_paths", "_file", "_files", "_dir", "_dirs", "_folder", "_folders")
_VARIABLE = re.compile(r"\$(?:(\w+)|\{([^}]*)\})")


def is_path_key(key: str) -> bool:
    """Whether the value of ``key``, a dotted name, is a path: a folder, a file, a pattern, or a list of them."""
    name = key.rpartition(".")[2]
    return name in _NAMES or name.endswith(_ENDINGS)


def expanded(key: str, value: str) -> str:
    """A path with ``~``, ``~user``, ``$NAME`` and ``${NAME}`` replaced; URLs and ``pipe:`` commands stay.

    Raises:
        SettingsError: a variable that is not set, or a user who does not exist; key and name are named.
    """
    if "://" in value or value.startswith("pipe:"):
        return value

    def of_environment(match: re.Match[str]) -> str:
        name = match[1] or match[2]
        if name not in os.environ:
            raise SettingsError(
                f"{key}={value}: the environment variable {name} is not set: export {name}=..., or give the path itself"
            )
        return os.environ[name]

    found = _VARIABLE.sub(of_environment, value)
    if not found.startswith("~"):
        return found
    try:
        return str(Path(found).expanduser())
    except RuntimeError as error:
        user = found.partition("/")[0]
        raise SettingsError(
            f"{key}={value}: {user} is the home folder of nobody here: give the path itself, or ./{found} for a file "
            "of that name"
        ) from error


def with_expanded_paths(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """A plain configuration, its path keys expanded: the one place where that is done.

    Path keys are known by their names (``is_path_key``); of the keywords of a class (a node with ``_target_``) each
    text that begins with ``~`` counts as well, whatever the class calls it.

    Raises:
        SettingsError: as ``expanded``.
    """
    keywords = "_target_" in values

    def walk(key: str, value: Any, is_path: bool) -> Any:
        if isinstance(value, Mapping):
            return with_expanded_paths(value, f"{key}.")
        if isinstance(value, (list, tuple)):
            return type(value)(walk(f"{key}[{i}]", item, is_path) for i, item in enumerate(value))
        if isinstance(value, str) and (is_path or (keywords and value.startswith("~"))):
            return expanded(key, value)
        return value

    return {key: walk(f"{prefix}{key}", value, is_path_key(str(key))) for key, value in values.items()}
