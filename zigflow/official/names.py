"""What the published code bases share: how files name things, and keywords of theirs as ours."""

from collections.abc import Mapping
from typing import Any


def namespace() -> list[Any]:
    """The command-line arguments that the training scripts of DiT, SiT and DiS store as ``args``."""
    from argparse import Namespace

    return [Namespace]


def renamed(given: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    """``given`` with official keywords as ours; our own names stay."""
    both = [(old, new) for old, new in names.items() if old in given and new in given]
    if both:
        raise ValueError(f"{' and '.join(both[0])} are one keyword: give one of them")
    return {names.get(key, key): value for key, value in given.items()}
