"""Named model variants of every family."""

import importlib
from typing import Any

from zigflow.registry import MODEL_VARIANTS

_FAMILIES = (
    "model_zigma", "zigflow.models.dim", "zigflow.models.dis", "zigflow.models.dit", "zigflow.models.uvit",
)  # fmt: skip


def _load_families() -> None:
    for name in _FAMILIES:
        importlib.import_module(name)


def list_models() -> list[str]:
    """The names that ``build_model`` knows."""
    _load_families()
    return MODEL_VARIANTS.names()


def build_model(name: str, **kwargs: Any):
    """Build a named variant; keywords go to the family's constructor.

    Raises:
        UnknownNameError: no such variant; near matches are listed.
    """
    _load_families()
    return MODEL_VARIANTS.get(name)(**kwargs)
