"""What a launcher was told beside the processes: followed, or refused by name; torch-free.

``accelerate launch`` hands its settings to the processes as environment variables, for an ``Accelerator`` that wraps
the model, the optimizer and the loader. Ours does none of that, so each setting is read here: :func:`launched` gives
those that we follow to the keys that have the same meaning, :func:`check_settings` refuses the others. What
accelerate reads from its own command line for DeepSpeed alone (gradient accumulation, clipping) reaches no process
otherwise; it is read from the launcher's command line.
"""

import functools
import math
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

from zigflow.settings import SettingsError

__all__ = ["LauncherSettingError", "check_agreement", "check_settings", "launched", "launcher_arguments"]

_BACKEND = "ACCELERATE_DYNAMO_BACKEND"
_ACCUMULATION = "ACCELERATE_GRADIENT_ACCUMULATION_STEPS"
_CLIPPING = "ACCELERATE_GRADIENT_CLIPPING"
# Options of accelerate's command line that it passes on with DeepSpeed only.
_OPTIONS = {"--gradient_accumulation_steps": _ACCUMULATION, "--gradient_clipping": _CLIPPING}
# Variables that ask for a way of compiling; the values under which ours is meant. Each block becomes one graph.
_COMPILED_AS = {
    "ACCELERATE_DYNAMO_MODE": ("", "default", "none"),
    "ACCELERATE_DYNAMO_USE_DYNAMIC": ("", "false", "0", "no", "none"),
}
_SHARDING = "loop.shard=true shards parameters here"
_WRAPPERS = {
    "ACCELERATE_USE_FSDP": _SHARDING,
    "ACCELERATE_USE_DEEPSPEED": f"{_SHARDING}, grad_accum and max_grad_norm are ours",
    "ACCELERATE_USE_MEGATRON_LM": _SHARDING,
    "ACCELERATE_USE_PARALLELISM_CONFIG": f"{_SHARDING}, copies on every process are the default",
}
_OURS = ("ACCELERATE_USE_CPU",)


class LauncherSettingError(SettingsError):
    """A launcher was told something that is not done here; the message names the setting and our key."""


@functools.cache
def launcher_arguments() -> tuple[str, ...]:
    """The options of the ``accelerate launch`` that started this process; empty without one."""
    import psutil

    try:
        words = psutil.Process(os.getppid()).cmdline()
    except psutil.Error:
        return ()
    for number, word in enumerate(words[:4]):
        # bin/accelerate launch, bin/accelerate-launch, -m accelerate.commands.launch
        if "accelerate" in os.path.basename(word):
            rest = words[number + 1 :]
            return tuple(rest[1:] if rest[:1] == ["launch"] else rest)
    return ()


def _told(environ: Mapping[str, str] | None, arguments: Sequence[str] | None) -> dict[str, str]:
    """The launcher's settings by the name of their variable; those of its command line too."""
    told = dict(os.environ if environ is None else environ)
    if arguments is None:
        arguments = launcher_arguments() if environ is None else ()
    words = iter(arguments)
    for word in words:
        option, given, value = word.partition("=")
        if not option.startswith("--"):
            # Options end where the script's name begins, or this is the value of another one.
            if option.endswith(".py"):
                break
            continue
        name = _variable_of("--" + option[2:].replace("-", "_"))
        if name is not None:
            told.setdefault(name, value if given else next(words, ""))
    return told


def _variable_of(option: str) -> str | None:
    """The variable of an option of accelerate, shortened as argparse allows: to what begins one option alone."""
    meant = [name for name in _OPTIONS if name.startswith(option)]
    return _OPTIONS.get(option) or (_OPTIONS[meant[0]] if len(meant) == 1 else None)


def launched(
    key: str, environ: Mapping[str, str] | None = None, arguments: Sequence[str] | None = None
) -> bool | int | float | None:
    """What the launcher was told for one of our keys.

    Args:
        key: ``compile`` (true or None), ``grad_accum`` (an integer or None) or ``max_grad_norm`` (a number or None).
        environ: by default the process's own.
        arguments: the launcher's command line; by default that of the parent process.

    Raises:
        LauncherSettingError: the value is none that the key can take.
    """
    told = _told(environ, arguments)
    if key == "compile":
        backend = told.get(_BACKEND, "").casefold()
        if backend in ("", "no", "none"):
            return None
        if backend != "inductor":
            raise LauncherSettingError(
                f"the launcher was told to compile with {_BACKEND}={told[_BACKEND]}: blocks are compiled with inductor "
                "here, give --dynamo_backend inductor (loop.compile=true) or --dynamo_backend no"
            )
        return True
    name = {"grad_accum": _ACCUMULATION, "max_grad_norm": _CLIPPING}[key]
    text = told.get(name, "").strip()
    if text.casefold() in ("", "none", "auto"):
        return None
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not (math.isfinite(value) and value > 0) or (key == "grad_accum" and value != int(value)):
        wanted = "an integer of 1 or more" if key == "grad_accum" else "a number greater than 0"
        raise LauncherSettingError(
            f"the launcher was told {name}={text}, which is not {wanted}: change it there, or drop it and give {key}="
        )
    return int(value) if key == "grad_accum" else value


def check_settings(environ: Mapping[str, str] | None = None, arguments: Sequence[str] | None = None) -> None:
    """Refuse what a launcher may be told and this project does not do.

    Raises:
        LauncherSettingError: the setting and our key for it, in one line.
    """
    told = _told(environ, arguments)
    for name in sorted(told):
        if re.fullmatch(r"ACCELERATE_USE_\w+", name) and name not in _OURS and _true(told[name]):
            ours = _WRAPPERS.get(name, "models run as they are built, under accelerate's plain launch")
            raise LauncherSettingError(
                f"the launcher set {name}={told[name]}, which is not used here ({ours}): take a file of "
                "config/accelerate"
            )
    for name, meant in _COMPILED_AS.items():
        if told.get(name, "").casefold() not in meant:
            option = "--" + name.removeprefix("ACCELERATE_").lower()
            raise LauncherSettingError(
                f"the launcher set {name}={told[name]}, which is not followed here: drop {option}; loop.compile=true "
                "compiles each block with inductor's defaults"
            )
    for key in ("compile", "grad_accum", "max_grad_norm"):
        launched(key, told, ())


def check_agreement(given: Mapping[str, Any], environ: Mapping[str, str] | None = None) -> None:
    """Compare what the launcher was told with the configuration, whose defaults are the launcher's.

    Args:
        given: the values of ``loop.compile``, ``grad_accum`` and ``max_grad_norm``.

    Raises:
        LauncherSettingError: they differ; both are named.
    """
    names = {"loop.compile": _BACKEND, "grad_accum": _ACCUMULATION, "max_grad_norm": _CLIPPING}
    told = _told(environ, None)
    for key, value in given.items():
        asked = launched(key.rpartition(".")[2], told, ())
        if asked is not None and asked != value:
            shown = {None: "null", True: "true", False: "false"}.get(value, value)
            raise LauncherSettingError(
                f"{key}={shown}, but the launcher was told {names[key]}={told[names[key]]}: drop one of the two"
            )


def _true(value: str | None) -> bool:
    return (value or "").lower() in ("1", "true", "yes", "on")
