"""Stored tensors of the official implementations: finding them, reading them, and one check per kind."""

import importlib
import json
import os
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from safetensors.torch import load_file

ROOT = Path(os.environ.get("PARITY_FIXTURES") or Path(__file__).parent / "fixtures")


@dataclass(frozen=True)
class Fixture:
    """One ``name.json`` and the tensors beside it."""

    path: Path

    @cached_property
    def meta(self) -> dict:
        return json.loads(self.path.read_text())

    @property
    def kind(self) -> str:
        return self.meta.get("fixture_kind", f"no fixture_kind in {self.path.name}")

    @cached_property
    def tensors(self) -> dict:
        return load_file(self.path.with_suffix(".safetensors"))

    def under(self, prefix: str) -> dict:
        """The tensors whose key starts with ``prefix``, the prefix removed."""
        return {k.removeprefix(prefix): v for k, v in self.tensors.items() if k.startswith(prefix)}


@dataclass(frozen=True)
class Kind:
    check: Callable[[Fixture, str], None]
    cases: Callable[[Fixture], list[str]]


KINDS: dict[str, Kind] = {}


def parity_kind(name: str, cases: Callable[[Fixture], list[str]] = lambda fixture: ["all"]):
    """Register ``check(fixture, case)`` for a fixture kind; ``cases`` splits a file into several tests."""

    def add(check):
        KINDS[name] = Kind(check, cases)
        return check

    return add


def load_kinds() -> dict[str, Kind]:
    """Import every ``kinds_*.py`` beside this file and return what they registered."""
    for module in pkgutil.iter_modules([str(Path(__file__).parent)]):
        if module.name.startswith("kinds_"):
            importlib.import_module(f"tests.parity.{module.name}")
    return KINDS


def find_fixtures() -> list[Fixture]:
    return [Fixture(p) for p in sorted(ROOT.rglob("*.json")) if "manifests" not in p.relative_to(ROOT).parts]
