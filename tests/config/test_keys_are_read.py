"""A key that can be typed does something: code or another YAML reads it, or it stands below with its reason."""

import ast
import dataclasses
import typing

from zigflow.paths import config_dir
from zigflow.settings import Settings

PACKAGE = config_dir().parent / "zigflow"
# Checked or kept, but steering nothing.
NOT_STEERING = {
    "note": "free text, kept in the checkpoint",
    "dist": "the official layout's empty group",
    "data.is_video": "checked against data.video_frames",
}


def keys(cls, prefix=""):
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        if dataclasses.is_dataclass(hints[field.name]):
            yield from keys(hints[field.name], f"{prefix}{field.name}.")
        else:
            yield prefix + field.name


def test_every_key_is_read_or_explained():
    read = {
        node.attr
        for path in PACKAGE.rglob("*.py")
        if path.name != "settings.py"
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute)
    }
    yaml = "\n".join(path.read_text() for path in config_dir().rglob("*.yaml"))
    known = list(keys(Settings))
    assert len(known) > 50 and set(NOT_STEERING) <= set(known)
    unread = {
        key
        for key in known
        if key.rpartition(".")[2] not in read
        and f"${{{key}}}" not in yaml
        and f"oc.select:{key}," not in yaml
    }
    assert unread <= set(NOT_STEERING), f"nothing reads {sorted(unread - set(NOT_STEERING))}"
