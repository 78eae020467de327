"""The named sizes of every family: what a name stands for, and how it is built."""

import importlib
from collections.abc import Callable
from typing import Any

from torch import nn

from zigflow.registry import Registry

__all__ = ["VARIANTS", "build_variant", "list_variants", "register_variant"]

VARIANTS: Registry[Callable[..., nn.Module]] = Registry("model variant")
_FAMILIES = (
    "model_zigma", "zigflow.models.dim", "zigflow.models.dis", "zigflow.models.dit", "zigflow.models.uvit",
)  # fmt: skip


def register_variant(
    name: str, family: Callable[..., nn.Module], what: str, **fixed: Any
) -> Callable[..., nn.Module]:
    """A function that builds ``family`` with the keywords ``fixed`` unless they are given; registered as a variant.

    Raises:
        ValueError: the name is taken.
    """

    def build(**kwargs: Any) -> nn.Module:
        return family(**{**fixed, **kwargs})

    build.__name__ = build.__qualname__ = name
    # Of two families that claim a name, both are named.
    build.__module__ = family.__module__
    build.__doc__ = f"{what} of width {fixed['embed_dim']} and depth {fixed['depth']}."
    build.fixed = dict(fixed)  # type: ignore[attr-defined]
    return VARIANTS.register(name)(build)


def list_variants() -> list[str]:
    """The names that ``build_variant`` knows."""
    for name in _FAMILIES:
        importlib.import_module(name)
    return VARIANTS.names()


def build_variant(name: str, **kwargs: Any) -> nn.Module:
    """Build a named variant; keywords go to the family's constructor.

    Raises:
        UnknownNameError: no such variant; near matches are listed.
    """
    list_variants()
    return VARIANTS.get(name)(**kwargs)
