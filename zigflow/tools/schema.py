"""``schema``: the JSON schema of a run's configuration, for editors and for checks of YAML files."""

import argparse
import json
import types
import typing
from collections.abc import Mapping
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any

import scans
from zigflow import plugins
from zigflow.command_help import keys_of
from zigflow.names import named_keys
from zigflow.registry import Registry
from zigflow.typed import REQUIRED, Key

_DRAFT = "https://json-schema.org/draft/2020-12/schema"
_JOBS = {"train": "default", "sample": "sample"}
_TEXT = {"type": ["string", "number"]}
# A text of OmegaConf's that stands for another value: ${data.channels}.
_INTERPOLATION = {"type": "string", "pattern": r"\$\{"}


def main(argv: list[str]) -> int:
    """Print the schema, or write it and print the line that a YAML file begins with."""
    parser = argparse.ArgumentParser(
        prog="python -m zigflow.tools schema",
        description="The JSON schema (draft 2020-12) of a run's configuration.",
    )
    parser.add_argument("--job", choices=sorted(_JOBS), default="train", help="default: train")
    parser.add_argument("--output", help="a file; default: print it")
    args = parser.parse_args(argv)
    plugins.load_plugins()
    text = json.dumps(schema(_JOBS[args.job]), indent=1)
    if args.output is None:
        print(text)
        return 0
    path = Path(args.output)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"{text}\n", encoding="utf-8")
    print(f"# yaml-language-server: $schema={path.resolve()}")
    return 0


def schema(config_name: str) -> dict[str, Any]:
    """What a whole or partial configuration of a command may hold: a composed one, or the file of an experiment.

    Args:
        config_name: ``default`` trains, ``sample`` samples, where null leaves a key to the checkpoint.
    """
    samples = config_name == "sample"
    names = named_keys()
    root = _group("", keys_of(config_name), names, samples)
    root["properties"]["scan"] = _scan(root["properties"]["scan"])
    # What a file of config/ holds beside keys.
    root["properties"] |= {
        "defaults": {"type": "array", "description": "choices of groups, as Hydra reads them"},
        "hydra": {"type": "object", "description": "settings of Hydra itself"},
    }
    what = "sampling" if samples else "a training run"
    return {"$schema": _DRAFT, "title": f"zigflow: configuration of {what}", **root}


def _group(prefix: str, keys: list[Key], names: Mapping[str, Any], samples: bool) -> dict[str, Any]:
    properties: dict[str, Any] = {}
    for key in keys:
        name = key.path.removeprefix(prefix)
        if "." in name or not key.path.startswith(prefix):
            continue
        if key.group is not None:
            found = _group(f"{key.path}.", keys, names, samples)
        else:
            found = _value(key, names.get(key.path), samples)
        properties[name] = {"description": key.about.text, **found}
    if prefix and samples:
        properties.setdefault("name", {"const": "from_checkpoint"})
    return {"type": "object", "properties": properties, "additionalProperties": False}


def _value(key: Key, known: Any, samples: bool) -> dict[str, Any]:
    found = _of_type(key.hint, key)
    if known is not None and found.get("type") == "array":
        found = {**found, "items": _of_names(known, found["items"])}
    elif known is not None:
        found = _of_names(known, found)
    elif key.about.choices:
        found = {"enum": list(key.about.choices)}
    allowed = found.pop("anyOf", None) or [found]
    if not any(each.get("type") == "object" or each == _TEXT for each in allowed):
        allowed = [*allowed, _INTERPOLATION]
    null = {"type": "null"}
    if samples and null not in allowed:
        allowed = [*allowed, null]
    made: dict[str, Any] = allowed[0] if len(allowed) == 1 else {"anyOf": allowed}
    if key.default not in (REQUIRED, None) and not is_dataclass(key.default):
        made["default"] = list(key.default) if isinstance(key.default, tuple) else key.default
    return made


def _of_names(known: Any, otherwise: dict[str, Any]) -> dict[str, Any]:
    """The names that can be typed; those of a family, such as torchdiffeq/NAME, by their prefix."""
    if not isinstance(known, Registry):
        return {"enum": list(known)}
    if not known.names():
        return otherwise
    prefixes = known.prefixes()
    listed = [name for name in known.names() if not name.startswith(tuple(prefixes))]
    return {
        "anyOf": [{"enum": listed}, *({"type": "string", "pattern": f"^{prefix}."} for prefix in prefixes)]
    }


def _of_type(hint: Any, key: Key) -> dict[str, Any]:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return {"anyOf": [_of_type(each, key) for each in args]}
    if origin is tuple:
        length = {} if args[-1] is Ellipsis else {"minItems": len(args), "maxItems": len(args)}
        return {"type": "array", "items": _of_type(args[0], key), **length}
    if (origin or hint) is Mapping:
        # A node: its other keys are the arguments of the class.
        return {"type": "object", "properties": {"_target_": {"type": ["string", "null"]}}}
    bounds: dict[str, Any] = {}
    if key.about.least is not None:
        bounds["minimum"] = key.about.least
    if key.about.above is not None:
        bounds["exclusiveMinimum"] = key.about.above
    known = {
        bool: {"enum": [True, False, 0, 1]},
        int: {"type": "integer", **bounds},
        float: {"type": "number", **bounds},
        str: _TEXT,
        type(None): {"type": "null"},
    }
    return dict(known[hint])


def _scan(found: dict[str, Any]) -> dict[str, Any]:
    names = {"enum": ["from_model", *scans.list_scans()]}
    return {**found, "type": "object", "properties": {"name": names}}
