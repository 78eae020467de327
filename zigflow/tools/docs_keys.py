"""``docs-keys``: the pages of keys and of environment variables, and the comments of YAML files, from declarations."""

import argparse
import inspect
import json
import re
import types
import typing
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from hydra.utils import get_object
from omegaconf import OmegaConf

from zigflow import paths
from zigflow.command_help import keys_of
from zigflow.environment import VARIABLES
from zigflow.typed import REQUIRED, Key

PAGES = ("keys.md", "environment.md")
_KINDS = {
    "zigflow": ("Ours", "They change how the code runs, and no result's meaning."),
    "run": ("Runs and their processes", "A launcher sets most of them ([launching](launching.md))."),
    "package": ("Of packages and tools", "They are read here, too."),
}
_NODES = {
    "model": "model",
    "process": "process",
    "codec": "codec",
    "metrics": "metrics",
    "data": "data.source",
}
# Arguments of models that no YAML file can give.
NO_KEYS = ("device", "dtype")
_COMMENTED = (
    "default.yaml", "sample.yaml", "optim/adamw.yaml",
    *(f"{group}/default.yaml" for group in ("train", "ode", "sde", "diffusion", "upsample", "loop", "wandb")),
)  # fmt: skip
_MADE = "<!-- Made by `python -m zigflow.tools docs-keys`. -->"


def main(argv: list[str]) -> int:
    """Write the pages; with --check only say whether they are up to date."""
    parser = argparse.ArgumentParser(
        prog="python -m zigflow.tools docs-keys",
        description="Write docs/keys.md, docs/environment.md and the comments of config/ from the declarations.",
    )
    parser.add_argument("--output", help="a folder for the pages alone; default: docs, and the comments, too")
    parser.add_argument("--check", action="store_true", help="write nothing; 1 when a page is out of date")
    args = parser.parse_args(argv)
    written = {Path(args.output or "docs") / name: text for name, text in pages().items()}
    if args.output is None:
        written |= commented_files()
    stale = []
    for path, text in written.items():
        if path.is_file() and path.read_text(encoding="utf-8") == text:
            continue
        stale.append(str(path))
        if not args.check:
            path.write_text(text, encoding="utf-8")
            print(path)
    if args.check and stale:
        raise ValueError(f"{' and '.join(stale)} out of date: run python -m zigflow.tools docs-keys")
    return 0


def pages() -> dict[str, str]:
    """File name -> text of the pages."""
    return {"keys.md": "\n".join(_keys_page()), "environment.md": "\n".join(_environment_page())}


def commented_files() -> dict[Path, str]:
    """The files of ``config/`` that state defaults, with the declared meaning as the comment of a key that has one."""
    about = {key.path: key.about.text for key in keys_of("sample") if key.group is None}
    made = {}
    for name in _COMMENTED:
        path = paths.config_dir() / name
        group = "" if path.parent == paths.config_dir() else f"{path.parent.name}."
        made[path] = "\n".join(_commented(line, group, about) for line in path.read_text("utf-8").split("\n"))
    return made


def _commented(line: str, group: str, about: Mapping[str, str]) -> str:
    """One line of a file with its comment replaced; a key without a comment stays without."""
    match = re.fullmatch(r"((\w+):.*?) # .*", line)
    return f"{match[1]} # {about[group + match[2]]}" if match and group + match[2] in about else line


def _keys_page() -> Iterator[str]:
    keys = keys_of("sample")
    yield "# Keys"
    yield ""
    yield _MADE
    yield ""
    yield (
        "Every key of a configuration: `KEY=VALUE` on the command line, or a line of a YAML file. The defaults are "
        "those of the files in `config/`; data sets and experiments state others. What matters in sampling matters in "
        "evaluations during training, too."
    )
    yield ""
    yield (
        "An editor checks and completes YAML files by `python -m zigflow.tools schema --output FILE` (`--job sample` "
        "for sampling), which prints the line that a file then begins with, `# yaml-language-server: $schema=FILE`."
    )
    yield ""
    yield "## At the top"
    yield ""
    yield from _table(key for key in keys if "." not in key.path and key.group is None)
    for group in (key for key in keys if key.group is not None):
        yield f"## {group.path}"
        yield ""
        yield f"{_capital(group.about.text)}."
        yield ""
        inner = [key for key in keys if key.path.startswith(f"{group.path}.")]
        yield from _table(inner)
    yield "## Nodes"
    yield ""
    yield (
        "`model`, `process`, `codec`, `metrics`, `data.source` and `data.heldout` name a class by `_target_`; their "
        "other keys are its arguments. A choice such as `model=zigzag8_b1` sets some of them, and any other can be "
        "added: `model.norm_epsilon=1e-6`."
    )
    yield ""
    for group, node in _NODES.items():
        for target, choices in _targets(group).items():
            yield f"### {node}: {target}"
            yield ""
            yield from _arguments(node, target, choices)


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def _table(keys: Any) -> Iterator[str]:
    yield "| key | default | type | matters in | meaning |"
    yield "|---|---|---|---|---|"
    for key in keys:
        where = {"both": "training, sampling"}.get(key.used, key.used)
        yield (
            f"| `{key.path}` | {_default(key.default)} | {_cell(_type(key.hint))} | {where} | {_cell(_meaning(key))} |"
        )
    yield ""


def _meaning(key: Key) -> str:
    about, bounds = key.about, ""
    if about.least is not None:
        bounds = f"; at least {about.least}"
    elif about.above is not None:
        bounds = f"; greater than {about.above}"
    return about.text + bounds


def _default(value: Any) -> str:
    if value is REQUIRED:
        return ""
    shown = list(value) if isinstance(value, tuple) else value
    return f"`{shown if isinstance(shown, str) and shown else json.dumps(shown, default=str)}`"


def _type(hint: Any) -> str:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_type(each) for each in args)
    if origin is tuple:
        inner = " or ".join(f"{each}s" for each in _type(args[0]).split(" or "))
        return f"list of {inner}" if args[-1] is Ellipsis else f"list of {len(args)} {inner}"
    if (origin or hint) is Mapping:
        return "keys"
    return {bool: "true or false", int: "integer", float: "number", str: "text", type(None): "null"}.get(
        hint, getattr(hint, "__name__", str(hint))
    )


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def _targets(group: str) -> dict[str, list[str]]:
    """The classes that the files of a group name, each with the choices that do, in the order of their names."""
    found: dict[str, list[str]] = {}
    for file in sorted((paths.config_dir() / group).glob("*.yaml")):
        node: Any = OmegaConf.to_container(OmegaConf.load(file), resolve=False) or {}
        node = (node.get("source") or {}) if group == "data" else node
        if node.get("_target_"):
            found.setdefault(node["_target_"], []).append(file.stem)
    return dict(sorted(found.items()))


def _arguments(node: str, target: str, choices: list[str]) -> Iterator[str]:
    made = get_object(target)
    told = described(made)
    group = node.partition(".")[0]
    yield f"Choices of `{group}=`: {', '.join(f'`{choice}`' for choice in choices)}."
    yield ""
    listed = inspect.signature(made).parameters.values()
    parameters = [p for p in listed if p.kind is not p.VAR_KEYWORD and p.name not in NO_KEYS]
    if not parameters:
        return
    yield "| key | default | meaning |"
    yield "|---|---|---|"
    for parameter in parameters:
        default = "" if parameter.default is parameter.empty else _default(parameter.default)
        yield f"| `{node}.{parameter.name}` | {default} | {_cell(told.get(parameter.name, ''))} |"
    yield ""


def described(made: Any) -> dict[str, str]:
    """Argument -> what the docstring of a class or function says about it, in one line.

    Read from the block ``Args:`` of the class, of its constructor, and of the classes above it. Several names may share
    an entry (``low, high: ...``), and an entry may go on with another argument, which is then found by its name.
    """
    found: dict[str, str] = {}
    classes = inspect.getmro(made) if inspect.isclass(made) else ()
    sources = [text for c in classes for text in (c.__doc__, c.__init__.__doc__)] or [made.__doc__]
    texts = [inspect.cleandoc(text or "") for text in sources]
    for text in texts:
        block = re.search(r"^Args:\n((?:[ \t]+.*\n?|\n)+)", text, flags=re.M)
        for entry in _ENTRY.finditer(block[1] if block else ""):
            for name in re.findall(r"\w+", entry[1]):
                found.setdefault(name, _plain(entry[2]))
    for name in inspect.signature(made).parameters:
        for text in [] if name in found else texts:
            mention = re.search(rf"(?:\b{name}: |``{name}\b)[^.;]*(?:\.\d[^.;]*)*", text)
            if mention:
                found[name] = _plain(mention[0].removeprefix(f"{name}: "))
                break
    return found


_ENTRY = re.compile(r"^ {4}(\*{0,2}[\w, *]+?)(?: \([^)]*\))?: (.*(?:\n {5,}.*)*)", flags=re.M)


def _plain(text: str) -> str:
    """One line of a page: Sphinx's roles and double backticks as Markdown has them."""
    text = re.sub(r":\w+:`~?([^`]+)`", r"`\1`", " ".join(text.split()))
    return text.replace("``", "`").removesuffix(".")


def _environment_page() -> Iterator[str]:
    yield "# Environment variables"
    yield ""
    yield _MADE
    yield ""
    yield "Every environment variable that the code reads. `python -m zigflow.tools doctor` prints those that are set."
    yield ""
    for kind, (title, text) in _KINDS.items():
        yield f"## {title}"
        yield ""
        yield text
        yield ""
        yield "| variable | meaning |"
        yield "|---|---|"
        for variable in (v for v in VARIABLES if v.kind == kind):
            yield f"| `{variable.name}` | {_cell(variable.text)} |"
        yield ""
    yield (
        "Any variable can stand in a path of a configuration: `data.source.root='$DATA/photos'`; elsewhere "
        "`${oc.env:NAME}`."
    )
    yield ""
