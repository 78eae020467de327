"""A key that can be typed does something: code or another YAML reads it, or it stands below with its reason."""

import ast
import dataclasses
import typing
from inspect import signature

from zigflow.engine.track_wandb import WandbTracker
from zigflow.paths import config_dir
from zigflow.sample_options import SampleOptions
from zigflow.samplers import DIFFUSION_SAMPLERS
from zigflow.settings import Settings

PACKAGE = config_dir().parent / "zigflow"
# Checked or kept, but steering nothing.
NOT_STEERING = {
    "note": "free text, kept in the checkpoint",
    "dist": "the official layout's empty group",
    "data.is_video": "checked against data.video_frames",
}
SECTIONS = {
    field.name: hint
    for field in dataclasses.fields(Settings)
    if dataclasses.is_dataclass(hint := typing.get_type_hints(Settings)[field.name])
} | {"options": SampleOptions}


def keys(cls, prefix=""):
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        if dataclasses.is_dataclass(hints[field.name]):
            yield from keys(hints[field.name], f"{prefix}{field.name}.")
        else:
            yield prefix + field.name


def _section(node: ast.expr, names: dict[str, str]) -> str | None:
    """The section that an expression stands for: ``x.data``, or a name that such an expression was given."""
    if isinstance(node, ast.Attribute) and node.attr in SECTIONS:
        return node.attr
    if isinstance(node, ast.Call) and ast.unparse(node.func) == "SampleOptions.take_from":
        return "options"
    return names.get(node.id) if isinstance(node, ast.Name) else None


def _is_settings(node: ast.expr) -> bool:
    return (isinstance(node, ast.Name) and node.id == "settings") or (
        isinstance(node, ast.Attribute) and node.attr == "settings"
    )


def reads(tree: ast.AST) -> set[str]:
    """The keys that a module reads: ``settings.seed``, ``settings.data.name``, ``data = settings.data ... data.name``.

    A section is also known by the annotation of a parameter, and by ``self`` inside its own class.
    """
    found: set[str] = set()
    classes = {cls.__name__: name for name, cls in SECTIONS.items()}

    def visit(node: ast.AST, names: dict[str, str]) -> None:
        if isinstance(node, ast.ClassDef) and node.name in classes:
            names = {**names, "self": classes[node.name]}
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            names = dict(names)
            for argument in [*node.args.args, *node.args.kwonlyargs]:
                annotation = ast.unparse(argument.annotation) if argument.annotation else ""
                if annotation.strip("\"'") in classes:
                    names[argument.arg] = classes[annotation.strip("\"'")]
            for inner in ast.walk(node):
                if isinstance(inner, ast.Assign) and len(inner.targets) == 1:
                    targets, values = [inner.targets[0]], [inner.value]
                    if isinstance(inner.targets[0], ast.Tuple) and isinstance(inner.value, ast.Tuple):
                        targets, values = inner.targets[0].elts, inner.value.elts
                    for target, value in zip(targets, values):
                        section = _section(value, names)
                        if isinstance(target, ast.Name) and section:
                            names[target.id] = section
        if isinstance(node, ast.Attribute):
            section = _section(node.value, names)
            if section:
                found.add(f"{section}.{node.attr}")
            elif _is_settings(node.value):
                found.add(node.attr)
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "getattr" and len(node.args) > 1:
            section, name = _section(node.args[0], names), node.args[1]
            if section and isinstance(name, ast.Name):
                # getattr(settings.data, split): each text that the function knows may be meant.
                found.update(f"{section}.{field.name}" for field in dataclasses.fields(SECTIONS[section])
                             if field.name in ("source", "heldout"))  # fmt: skip
        for child in ast.iter_child_nodes(node):
            visit(child, names)

    visit(tree, {})
    return found


def test_every_key_is_read_or_explained():
    read: set[str] = set()
    for path in PACKAGE.rglob("*.py"):
        if path.name not in ("settings.py", "settings_sampling.py"):
            read |= reads(ast.parse(path.read_text()))
    yaml = "\n".join(path.read_text() for path in config_dir().rglob("*.yaml"))
    # This group goes as a whole to the sampler that it names, which takes the keys that are its keywords.
    taken = {
        name
        for sampler in DIFFUSION_SAMPLERS
        for name in signature(DIFFUSION_SAMPLERS.get(sampler)).parameters
    }
    read |= {f"diffusion.{name}" for name in {"sampling_method", *taken}}
    # And this one to its tracker, out of the run's configuration.
    read |= {f"wandb.{name}" for name in signature(WandbTracker).parameters}
    known = [*keys(Settings), *keys(SampleOptions, "options.")]
    assert len(known) > 50 and set(NOT_STEERING) <= set(known)
    unread = {
        key
        for key in known
        if key not in read and f"${{{key}}}" not in yaml and f"oc.select:{key}," not in yaml
    }
    assert unread == set(NOT_STEERING), (
        f"nothing reads {sorted(unread - set(NOT_STEERING))}; read after all: {sorted(set(NOT_STEERING) - unread)}"
    )


def test_an_attribute_of_the_same_name_is_no_reading():
    assert "text" not in reads(ast.parse("def f(draw):\n    draw.text(3)\n"))
    assert "data.name" not in reads(ast.parse("def f(entry):\n    return entry.name\n"))
    code = "def f(settings):\n    data, x = settings.data, 1\n    return data.name, settings.ode.atol, settings.note\n"
    assert {"data.name", "ode.atol", "note"} <= reads(ast.parse(code))
