"""The files of one's own that a command names: by ``plugins=``, by ``scan=FILE.py:NAME``, by its environment.

They are loaded before the configuration is composed, since ``scan=NAME`` is a choice of what is registered, and named
in one ``plugins=`` of the command, so that the configuration that is kept says all of them. Torch-free.
"""

import os
import re
from collections.abc import Sequence

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException

from scans import list_scans
from zigflow import plugin_files
from zigflow.paths import expanded
from zigflow.registry import unknown_name
from zigflow.typed import SettingsError
from zigflow.typed_arguments import typed_path

__all__ = ["load_scan", "with_plugin_files"]

_KEY = re.compile(r"\+{0,2}plugins=(?P<value>.*)", re.DOTALL)
_SCAN = re.compile(r"(?P<key>\+{0,2}scan=)(?P<value>[^\[{]*)", re.DOTALL)
_IN_FILE = re.compile(r"(?P<file>.+\.py):(?P<name>\w+)", re.DOTALL)
_OVERRIDE = re.compile(r"[+~]{0,2}[\w./@]+=", re.DOTALL)
_SHOWS = ("-h", "--help", "--hydra-help", "-sc", "--shell-completion")
# Options of Hydra that take the next argument.
_TAKES_NEXT = (
    "-c", "--cfg", "-p", "--package", "-cp", "--config-path", "-cn", "--config-name", "-cd", "--config-dir",
    "--experimental-rerun", "-i", "--info",
)  # fmt: skip


def with_plugin_files(arguments: Sequence[str], strict: bool = True) -> list[str]:
    """Load the files that a command line names, and those that the checkpoints which it names were written with.

    Help is shown whatever a file holds: one that imports torch, or that cannot be loaded, is passed over in one line.

    Args:
        strict: whether a file that cannot be loaded is an error; if not, it is told of and left out.

    Returns:
        The arguments with one ``plugins=[...]`` for all files and ``scan=NAME`` for ``scan=FILE.py:NAME``; as they
        were where there is no file.

    Raises:
        SettingsError: a file that cannot be loaded, or one that does not register the scan, in one line.
    """
    named: list[str] = []
    rest: list[str] = []
    scans: list[tuple[str, str]] = []
    for argument in arguments:
        if match := _KEY.fullmatch(argument):
            # As of any other key, the last one stands.
            named = _files_of(argument, match["value"].strip())
            continue
        if match := _SCAN.fullmatch(argument):
            choices = [_IN_FILE.fullmatch(choice.strip("\"' ")) for choice in match["value"].split(",")]
            scans += [(found["file"], found["name"]) for found in choices if found]
            if any(choices):
                argument = match["key"] + ",".join(
                    found["name"] if found else choice
                    for found, choice in zip(choices, match["value"].split(","), strict=True)
                )
        rest.append(argument)
    asked = [*named, *(file for file, _ in scans), *plugin_files.from_environment()]
    files = named + [file for file in dict.fromkeys(asked) if _path(file) not in map(_path, named)]
    shows = any(argument in _SHOWS for argument in arguments)
    if shows or not strict:
        whole = [plugin_files.try_load(file, torch=not shows) for file in _once(files)]
        return rest if all(whole) else [argument for argument in rest if not _chooses_unknown(argument)]
    runs = [path for key in ("run_dir", "ckpt") if (path := typed_path(rest, key)) is not None]
    files = plugin_files.wanted([*named, *_once(files[len(named) :])], runs)
    if not files:
        return rest
    plugin_files.load(files)
    for file, name in scans:
        _check_registered(file, name)
    quoted = ('"{}"'.format(file.replace("\\", "\\\\").replace('"', '\\"')) for file in files)
    place = _among_overrides(rest)
    return [*rest[:place], f"plugins=[{','.join(quoted)}]", *rest[place:]]


def load_scan(text: str) -> str:
    """The name of a scan; of ``FILE.py:NAME`` after the file is loaded.

    Raises:
        SettingsError: the file cannot be loaded, or does not register the name.
    """
    found = _IN_FILE.fullmatch(text)
    if not found:
        return text
    plugin_files.load([found["file"]])
    _check_registered(found["file"], found["name"])
    return found["name"]


def _chooses_unknown(argument: str) -> bool:
    """Whether an override chooses a scan that is not there; it may be that of a file which was passed over."""
    match = _SCAN.fullmatch(argument)
    known = ("from_model", *list_scans())
    return match is not None and any(choice not in known for choice in match["value"].split(","))


def _check_registered(file: str, name: str) -> None:
    if name not in list_scans():
        unknown = unknown_name("scan", name, list_scans())
        raise SettingsError(f"scan={file}:{name}: the file registers no scan of that name: {unknown}")


def _files_of(argument: str, value: str) -> list[str]:
    """The paths of ``plugins=``, a file or a list of them.

    Raises:
        SettingsError: several values without brackets, or what is no text.
    """
    listed = value.startswith("[") and value.endswith("]")
    if not value or value == "null":
        return []
    if not listed and "," in value and value[0] not in "\"'":
        raise SettingsError(f"{argument} is several values: give one list, plugins=[{value}]")
    try:
        read = OverridesParser.create().parse_override(f"plugins={value}").value()
    except HydraException:
        # Such as ~ in a list, or a blank: no grammar is needed to find the commas.
        read = [part.strip().strip("\"'") for part in (value[1:-1] if listed else value).split(",")]
    read = read if isinstance(read, list) else [read]
    found = [str(item) for item in read]
    if any(isinstance(item, (dict, list)) or not str(item) for item in read):
        raise SettingsError(f"{argument} is no list of files: give plugins=[FILE.py]")
    return found


def _path(file: str) -> str:
    return os.path.abspath(expanded("plugins", file))


def _once(files: Sequence[str]) -> list[str]:
    """The files, each path once."""
    return list({_path(file): file for file in reversed(files)}.values())[::-1]


def _among_overrides(arguments: Sequence[str]) -> int:
    """Where one more override may be put: argparse refuses overrides before and after an option."""
    place = len(arguments)
    for index, argument in enumerate(arguments):
        option = arguments[index - 1] if index else ""
        if _OVERRIDE.match(argument) and option not in _TAKES_NEXT:
            place = index + 1
        elif place == index:
            break
    return place
