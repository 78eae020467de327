"""The command lines of the documentation, and for each kind a check that costs no run."""

import argparse
import importlib.util
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from omegaconf import OmegaConf

from zigflow import plugins
from zigflow.engine.sample_plan import SampleOptions
from zigflow.tools import __main__ as tools

ROOT = Path(__file__).resolve().parents[2]
PAGES = [
    *sorted((ROOT / "docs").glob("*.md")),
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "datasets/README.md")),
]
PROGRAMS = r"python3?|accelerate|torchrun|make|pip|uv|zigflow-\w+|srun|wandb|export"
# Capital words stand for a name, a folder or a number of the reader's.
NUMBERS = {"N": "2"}


@dataclass(frozen=True)
class Command:
    """``line`` as it is typed, on ``page``; ``inline`` between the words of a sentence."""

    page: str
    line: str
    inline: bool = False

    def __str__(self):
        return f"{self.page}: {self.line}"


def commands_of(page):
    """Every command of a page: in its code blocks (continued lines joined) and between backticks in its text."""
    text, name, found = page.read_text(), str(page.relative_to(ROOT)), []
    for language, body in re.findall(r"^```(\w*)\n(.*?)^```", text, flags=re.M | re.S):
        if language not in ("", "sh", "bash", "shell", "console"):
            continue  # text: what others have published; python and yaml: no commands
        for line in re.sub(r"\\\n\s*", " ", body).splitlines():
            line = line.strip().removeprefix("$ ")
            if re.match(rf"(\w+=\S+ )*({PROGRAMS}) ", line):
                found.append(Command(name, line))
    prose = re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)
    for code in re.findall(r"`([^`]+)`", prose):
        code = " ".join(code.split())
        if re.match(rf"({PROGRAMS}) [^=]", code):
            found.append(Command(name, code, inline=True))
    return found


def check(command):
    """Refuse a command that does not parse, compose or exist.

    Raises:
        UncheckedError: of no known kind.
        Exception: what the command itself would say.
    """
    words = [NUMBERS.get(word, word) for word in shlex.split(command.line, comments=not command.inline)]
    while words and re.match(r"\w+=", words[0]):
        words = words[1:]
    program, rest = words[0], words[1:]
    if program == "make":
        done = subprocess.run(["make", *rest, "-n"], cwd=ROOT, capture_output=True, text=True)
        if done.returncode:
            raise ValueError(done.stderr)
    elif program == "pip":
        _check_install(rest)
    elif program == "export":
        if not all(re.fullmatch(r"[A-Z][A-Z0-9_]*=\S+", word) for word in rest):
            raise ValueError(f"{rest} are no variables")
    elif program in ("accelerate", "torchrun"):
        _check_launch(program, rest)
    elif program == "python" and command.inline and len(rest) == 3 and rest[:2] == ["-m", "zigflow.tools"]:
        if rest[2] not in ("COMMAND", *tools.COMMANDS):
            raise ValueError(f"there is no tool {rest[2]}")
    elif program == "python":
        _check_python(rest)
    else:
        raise UncheckedError(command)


class UncheckedError(Exception):
    """Nothing here knows how to check the command."""


def _check_install(words):
    import tomllib

    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for word in (w for w in words[1:] if not w.startswith("-")):
        named = re.fullmatch(r"(?:\.|zigflow)(?:\[([\w,-]+)\])?", word)
        if named is None:
            raise UncheckedError(word)
        for extra in (named[1] or "").split(","):
            if extra and extra not in extras:
                raise ValueError(f"there is no extra {extra}")


def _check_launch(program, words):
    if program == "accelerate":
        from accelerate.commands.launch import launch_command_parser

        assert words[0] == "launch", words
        parser, words = launch_command_parser(), words[1:]
    else:
        from torch.distributed.run import get_args_parser

        parser = get_args_parser()
    if words and words[-1] in parser._option_string_actions and words[-1] != "--multi_gpu":
        return  # The name of an option, in a sentence.
    scripts = [word for word in words if word.endswith(".py")]
    words = words if scripts else [*words, "train_acc.py"]
    given = parser.parse_args(words)
    config = getattr(given, "config_file", None)
    if config is not None and not (ROOT / config).is_file():
        raise FileNotFoundError(config)
    _check_python([given.training_script, *given.training_script_args])


def _check_python(words):
    if words[:2] == ["-m", "zigflow.tools"]:
        if words[2:] != ["COMMAND"]:
            _check_tool(words[2], words[3:])
    elif words[0] in ("train_acc.py", "sample_acc.py"):
        _check_entry(words[0], words[1:])
    elif words[0].startswith("benchmarks/"):
        _check_script(ROOT / words[0], words[1:])
    elif words[:2] == ["-m", "tests.architecture.trace_calls"]:
        from tests.architecture import trace_calls

        trace_calls.parser().parse_args(words[2:])
    else:
        raise UncheckedError(words)


def _check_entry(script, words):
    name = {"train_acc.py": "default", "sample_acc.py": "sample"}[script]
    from hydra._internal.utils import get_args_parser

    typed = get_args_parser().parse_args(words)
    jobs = plugins._jobs(typed.overrides) if typed.multirun else [(typed.overrides, True)]
    for job, _ in jobs[:1]:
        # The package of a sweeper or a launcher may be absent; tests/launching runs them.
        job = [override for override in job if not override.startswith("hydra")]
        plain = OmegaConf.to_container(plugins.compose_config(["run_dir=unused", *job], name), resolve=True)
        if name == "default":
            plugins.checked(plain)
        else:
            plain.pop("weights")
            SampleOptions.take_from(plain)


class _ParsedError(Exception):
    """A parser has accepted its arguments; what comes after it costs more."""


def _parsed(work):
    """``work`` until its command line is parsed; what argparse refuses is an error of ours."""
    parse = argparse.ArgumentParser.parse_known_intermixed_args, argparse.ArgumentParser.parse_known_args

    def error(self, message):
        raise ValueError(f"{self.prog}: {message}")

    def once(self, args=None, namespace=None):
        _, left = parse[1](self, args, namespace)
        if left:
            error(self, f"unrecognized {left}")
        raise _ParsedError

    def intermixed(self, args=None, namespace=None):
        _, left = parse[0](self, args, namespace)
        if left:
            error(self, f"unrecognized {left}")
        raise _ParsedError

    from unittest import mock

    patched = {"parse_args": once, "parse_intermixed_args": intermixed, "error": error}
    with mock.patch.multiple(argparse.ArgumentParser, **patched):
        try:
            work()
        except _ParsedError:
            return
    raise AssertionError("no command line was parsed")


def _check_tool(name, words):
    if name not in tools.COMMANDS:
        raise ValueError(f"there is no tool {name}")
    if name != "evaluate":  # it has no parser
        _parsed(lambda: importlib.import_module(f"zigflow.tools.{name.replace('-', '_')}").main(words))
    overrides = [
        word for word in words if re.match(r"\+?[\w.]+=", word) and not re.match("samples=|output=", word)
    ]
    if overrides:
        plugins.compose_config(["run_dir=unused", *overrides])


def _check_script(path, words):
    from unittest import mock

    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    search = [str(path.parent), *sys.path]
    with mock.patch.object(sys, "path", search), mock.patch.object(sys, "argv", [str(path), *words]):
        spec.loader.exec_module(module)
        _parsed(module.main)
