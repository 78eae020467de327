"""What is typed as KEY=VALUE, before Hydra reads it: paths as they are meant, mistakes with the quoting that works.

Hydra's grammar gives ``=``, brackets, commas and many other characters a meaning of their own, and reads 2024_05_01 as
a number. A shell takes one pair of quotes away, so that a value needs two.
"""

import functools
import os
import re
import shlex
from collections.abc import Sequence
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf

from zigflow.paths import expanded
from zigflow.settings import Settings, SettingsError
from zigflow.typed import is_text_field

# Paths of which there is one.
_SINGLE = ("run_dir", "sample_dir", "ckpt", "captions")
_HYDRA_FOLDERS = ("hydra.run.dir", "hydra.sweep.dir")
# Keys whose numbers are names of files; num_paths, drop_path and cache take numbers of their own.
_TEXT_PATHS = re.compile(
    r"(?!(?:num|max|min|drop|n)_)(?:\w+_)?(?:root|path|file|folder|dir)"
    r"|ckpt|captions|tar_base|inception_weights|reference_stats"
)


@functools.cache
def _parser() -> OverridesParser:
    return OverridesParser.create()


def _parsed(argument: str) -> Override:
    return _parser().parse_override(argument)


def _quoted(argument: str) -> str:
    """The same with its whole value as one text of Hydra's grammar."""
    key, _, value = argument.partition("=")
    return '{}="{}"'.format(key, value.replace('"', '\\"'))


def _shell_quoting(argument: str) -> str:
    """What to type in a shell for the value as it stands; empty where no quoting helps."""
    quoted = _quoted(argument)
    try:
        if _parsed(quoted).value() == argument.partition("=")[2]:
            return shlex.quote(quoted)
    except HydraException:
        pass
    return ""


def as_meant(arguments: list[str]) -> list[str]:
    """The arguments, those quoted whose paths Hydra would not read, or read as numbers: ``~/x``, ``2024_05_01``.

    The folders of Hydra's own keys are expanded, since Hydra takes them as they are.

    Raises:
        SettingsError: such a folder cannot be expanded.
    """
    return [_as_meant(argument) for argument in arguments]


def _as_meant(argument: str) -> str:
    key, equals, _ = argument.partition("=")
    quoted = _quoted(argument) if _is_misread(argument) else _swept_as_meant(argument)
    if not equals or key.lstrip("+") not in _HYDRA_FOLDERS:
        return quoted
    try:
        value = str(_parsed(quoted).value())
    except HydraException:
        return quoted
    # An interpolation is Hydra's own.
    meant = value if "${" in value else expanded(key.lstrip("+"), value)
    return quoted if meant == value else _quoted(f"{key}={meant}")


def _swept_as_meant(argument: str) -> str:
    """A sweep over texts, ``note=1e5,1e6``, with those quoted that would be read as numbers; others as they are."""
    key, _, value = argument.partition("=")
    texts = value.split(",")
    if len(texts) < 2 or set(value) & set("\"'[]{}()"):
        return argument
    meant = [_quoted(one) if _is_misread(one) else one for one in (f"{key}={text.strip()}" for text in texts)]
    return f"{key}={','.join(one.partition('=')[2] for one in meant)}"


def _is_misread(argument: str) -> bool:
    key, equals, value = argument.partition("=")
    if not equals or argument.startswith(("-", "~")):
        return False
    if value.startswith("~"):
        return not set(value) & set("\"',[]{}()")
    name = key.lstrip("+")
    is_path = _TEXT_PATHS.fullmatch(name.rpartition(".")[2]) is not None
    if not is_path and not is_text_field(Settings, name):
        return False
    try:
        read = _parsed(argument).value()
    except HydraException:
        return False
    if isinstance(read, bool) or not isinstance(read, (int, float)):
        return False
    # Of a text, what is the same as a number needs no quotes.
    return is_path or str(read) != value


def check_grammar(overrides: list[str], multirun: bool = False) -> None:
    """Refuse an override that Hydra does not read as one value.

    Raises:
        SettingsError: the argument, and the quoting for a shell, in one line.
    """
    for argument in overrides:
        key, equals, _ = argument.partition("=")
        try:
            override = _parsed(argument)
        except HydraException as error:
            if not equals:
                raise SettingsError(f"{argument}: a value is missing: give {argument}=VALUE") from error
            reason = " ".join(str(error).split()) or "it cannot be read"
            hint = _shell_quoting(argument)
            remedy = (
                f"for the text as it stands type {hint}" if hint else "quote it for Hydra and for the shell"
            )
            raise SettingsError(
                f"{argument}: Hydra's grammar does not take this value ({reason}): {remedy}"
            ) from error
        if override.is_sweep_override() and not multirun and not key.startswith("hydra"):
            raise SettingsError(
                f"{argument} is several values, one run for each of them, which needs --multirun; for the text as it "
                f"stands type {_shell_quoting(argument)}"
            )
        given: Any = None if override.is_sweep_override() else override.value()
        if key.lstrip("+") in _SINGLE and isinstance(given, (list, dict)):
            kind, hint = type(given).__name__, _shell_quoting(argument)
            raise SettingsError(f"{argument} is a {kind} to Hydra: for the text as it stands type {hint}")


def typed_path(arguments: Sequence[str], key: str) -> str | None:
    """The path that a command line gives to ``key``, as it is meant; None without one, or where it cannot be read."""
    named = [a for a in as_meant(list(arguments)) if a.lstrip("+").startswith(f"{key}=")]
    try:
        return expanded(key, str(_parsed(named[-1]).value())) if named else None
    except (HydraException, SettingsError):
        return None


def name_no_job(cfg: DictConfig) -> None:
    """Hydra knows the job's name when it runs: a run directory that is named after it is none before."""
    raw: Any = OmegaConf.to_container(cfg, resolve=False)
    if re.search(r"\$\{(hydra|default_run_dir):", str(raw["run_dir"])):
        cfg.run_dir = os.devnull


def check_hydra_folders(hydra: DictConfig) -> None:
    """Refuse ``~`` and ``$NAME`` in the folders of Hydra's own keys that a YAML file names: Hydra takes them as names.

    Raises:
        SettingsError: the key, its value and what to write, in one line.
    """
    raw: Any = OmegaConf.to_container(hydra, resolve=False)
    for key in _HYDRA_FOLDERS:
        value = str(raw[key.split(".")[1]]["dir"])
        variable = re.search(r"\$\w+", value)
        if value.startswith("~") or variable:
            sign = variable[0] if variable else "~"
            meant = re.sub(r"\$(\w+)", r"${oc.env:\1}", value) if "${" in value else expanded(key, value)
            raise SettingsError(f"{key}={value}: Hydra takes {sign} as a name: write {key}={meant}")
