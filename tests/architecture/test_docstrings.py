"""Docstrings name arguments, attributes and errors that exist, and every error that a public function raises itself."""

import ast
import builtins
import re

import pytest

from tests.architecture.test_layers import MODULES, ROOT

FILES = {**MODULES, **{f"benchmarks.{path.stem}": path for path in (ROOT / "benchmarks").glob("*.py")}}
_ENTRY = re.compile(r"    (?P<names>\*{0,2}[\w.]+(?:, \*{0,2}[\w.]+)*)(?: \([^)]*\))?:(?: |$)")


def _section(docstring: str, title: str) -> list[str]:
    """The names that a section of a docstring explains, several before one colon included."""
    lines = docstring.splitlines()
    if f"{title}:" not in lines:
        return []
    names = []
    for line in lines[lines.index(f"{title}:") + 1 :]:
        if line and not line.startswith("    "):
            break
        if found := _ENTRY.match(line):
            names += [name.lstrip("*") for name in found["names"].split(", ")]
    return names


def _arguments(function: ast.FunctionDef | ast.AsyncFunctionDef) -> set[str]:
    given = function.args
    star = [a for a in (given.vararg, given.kwarg) if a is not None]
    return {a.arg for a in (*given.posonlyargs, *given.args, *given.kwonlyargs, *star)}


def _own(node: ast.ClassDef) -> tuple[set[str], set[str]]:
    """Arguments and attributes that the body of a class defines; fields count as both."""
    arguments, attributes = set(), set()
    for item in node.body:
        if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name):
            arguments.add(item.target.id)
        elif isinstance(item, ast.Assign):
            attributes |= {t.id for t in item.targets if isinstance(t, ast.Name)}
        elif isinstance(item, ast.FunctionDef):
            attributes.add(item.name)
            if item.name in ("__init__", "__new__"):
                arguments |= _arguments(item)
    for item in ast.walk(node):
        if (
            isinstance(item, ast.Attribute)
            and isinstance(item.ctx, ast.Store)
            and ast.unparse(item.value) == "self"
        ):
            attributes.add(item.attr)
        if isinstance(item, ast.Call) and ast.unparse(item.func) == "self.register_buffer":
            attributes.add(ast.literal_eval(item.args[0]) if isinstance(item.args[0], ast.Constant) else "")
    return arguments, attributes | arguments


TREES = {name: ast.parse(path.read_text()) for name, path in FILES.items()}
CLASSES = {
    node.name: node for tree in TREES.values() for node in ast.walk(tree) if isinstance(node, ast.ClassDef)
}


def _all_of(node: ast.ClassDef) -> tuple[set[str], set[str]]:
    """As ``_own``, with what the bases of the project define."""
    arguments, attributes = _own(node)
    for base in node.bases:
        name = ast.unparse(base).partition("[")[0].rpartition(".")[2]
        if name in CLASSES and CLASSES[name] is not node:
            inherited = _all_of(CLASSES[name])
            arguments, attributes = arguments | inherited[0], attributes | inherited[1]
    return arguments, attributes


def _imported(tree: ast.Module) -> set[str]:
    """Names that ``from ... import`` brings in, anywhere in the file."""
    nodes = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    return {alias.asname or alias.name for node in nodes for alias in node.names}


def _packages(tree: ast.Module) -> set[str]:
    """Packages of others that the file imports from."""
    modules = [node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    return {name.partition(".")[0] for name in modules} - {name.partition(".")[0] for name in MODULES}


def stale(tree: ast.Module) -> list[str]:
    """What docstrings explain that is not there."""
    found = []
    errors = {*vars(builtins), *CLASSES, *_imported(tree)}
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef):
            arguments, attributes = _all_of(node)
            known = {"Args": arguments, "Attributes": attributes, "Raises": errors}
        elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            known = {"Args": _arguments(node), "Raises": errors}
        else:
            continue
        for title, names in known.items():
            for name in _section(ast.get_docstring(node) or "", title):
                theirs = title == "Raises" and name.partition(".")[0] in _packages(tree)
                if not theirs and name.rpartition(".")[2] not in names:
                    found.append(f"{node.name} (line {node.lineno}): {title}: {name}")
    return found


@pytest.mark.parametrize("name", sorted(FILES))
def test_what_docstrings_explain_exists(name):
    assert not (found := stale(TREES[name])), "; ".join(found)


def test_what_does_not_exist_is_found():
    text = '''
def f(a, *rest):
    """F.

    Args:
        a: there.
        rest: there.
        b, a: one of them is there.

    Raises:
        ValueError: there.
        signals.Stopped: there.
        ValeuError: not there.
    """

class C:
    """C.

    Args:
        x (int): there.
        y: not there.

    Attributes:
        z: there.
        w: not there.
    """

    def __init__(self, x):
        self.z = x
'''
    found = stale(ast.parse(text))
    assert [line.rpartition(" ")[2] for line in found] == ["b", "ValeuError", "y", "w"]
