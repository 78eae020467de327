"""Stored tensors of the official implementations: finding them, reading them, and one check per kind.

A check reads every setting from the fixture, its JSON or the names of its tensors; what it leaves unread fails
(``assert_all_read``).
"""

import importlib
import json
import os
import pkgutil
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from tests.parity.recording import Recorded, documentary

# Keys under which a fixture says in words what it is, and how a number is written there: 4, .3, 1e-3, 1/1000.
PROSE = ("note", "notes", "meaning", "legend", "desc", "conventions")
NUMBER = r"(?:\d+\.?\d*|\.\d+)(?:e[+-]?\d+)?(?:/\d+)?"

ROOT = Path(os.environ.get("PARITY_FIXTURES") or Path(__file__).parent / "fixtures")


@dataclass(frozen=True)
class Fixture:
    """One ``name.json`` and the tensors beside it; ``meta`` and ``tensors`` note what is read of them."""

    path: Path

    @cached_property
    def meta(self) -> Recorded:
        return Recorded(json.loads(self.path.read_text()))

    @property
    def kind(self) -> str:
        return self.meta.get("fixture_kind", f"no fixture_kind in {self.path.name}")

    @cached_property
    def tensors(self) -> Recorded:
        path = self.path.with_suffix(".safetensors")
        return Recorded(load_file(path) if path.exists() else {})

    def under(self, prefix: str) -> dict[str, Tensor]:
        """The tensors whose key starts with ``prefix``, the prefix removed; all of them count as read."""
        return {name: self.tensors[prefix + name] for name in self.names(prefix)}

    def names(self, prefix: str) -> list[str]:
        """The rest of each tensor's key that starts with ``prefix``; none of them counts as read."""
        return [k.removeprefix(prefix) for k in self.tensors if k.startswith(prefix)]

    def listed(self, prefix: str) -> list[str]:
        """As ``names``, in the order in which the JSON lists them: that of the published state dict."""
        return [k.removeprefix(prefix) for k in self.meta["tensors"] if k.startswith(prefix)]

    def numbered(self, prefix: str) -> list[int]:
        """The numbers n of keys "{prefix}{n}...", ascending: step0.x0, step1.x0 -> [0, 1]."""
        found = (re.match(re.escape(prefix) + r"(\d+)", k) for k in self.tensors)
        return sorted({int(match[1]) for match in found if match})

    def setting(self, name: str, *patterns: str, told: Mapping[str, float] | None = None) -> Any:
        """A number of the JSON by its key; else of the prose, by its name or in the first group of a pattern; else of
        the published script that the prose names.

        Args:
            patterns: tried before the name itself ("eps 1e-3", "eps=1/1000", "eps = .3").
            told: the value that words of the prose stand for, such as the name of a script whose default it is.

        Raises:
            AssertionError: it stands nowhere.
        """
        if name in self.meta:
            return self.meta[name]
        words = re.escape(name).replace("_", "[ _]")
        for pattern in (*patterns, rf"(?<![\w.]){words}(?: ?[:=]| is| of)? ?({NUMBER})"):
            if match := re.search(pattern, self.prose):
                top, _, bottom = match[1].partition("/")
                return float(top) / float(bottom or 1)
        return self._told(name, told)

    def word(self, name: str, *patterns: str, told: Mapping[str, str] | None = None) -> str:
        """As :meth:`setting`, of a name."""
        if name in self.meta:
            return self.meta[name]
        for pattern in (*patterns, rf"(?<![\w.]){re.escape(name)}[ :=]+(\w+)"):
            if match := re.search(pattern, self.prose):
                return match[1]
        return self._told(name, told)

    def flag(self, name: str) -> bool:
        """As :meth:`word`, of True or False."""
        said = str(self.word(name))
        assert said.lower() in ("true", "false"), f"{self.path.name} says {said} of {name}"
        return said.lower() == "true"

    def _told(self, name: str, told: Mapping[str, Any] | None) -> Any:
        """What the first of the words that the prose has stands for."""
        for words, value in (told or {}).items():
            if words in self.prose:
                return value
        raise AssertionError(
            f"{self.path.name} does not say {name}: neither a key nor its prose, nor any of {list(told or {})}"
        )

    @cached_property
    def prose(self) -> str:
        """The JSON's sentences, in one."""
        return " ".join(_texts(self.meta._content.get(key) for key in PROSE))

    def tolerance(self) -> float:
        """What the fixture says of float32's own error, four times."""
        told = self.meta.get("suggested_tol", {})
        errors = [self.meta.get(k, 0.0) for k in ("f32_minus_f64", "f32_vs_f64", "math_vs_flash_maxdiff")]
        return 4 * max([told.get("out_abs", 0.0), *errors])

    def gradient_tolerance(self) -> float:
        """As :meth:`tolerance`, of the largest entry of a gradient."""
        return 4 * self.meta.get("suggested_tol", {}).get("grad_rel", 0.0)


def _texts(values) -> list[str]:
    """Strings and the strings within mappings."""
    found: list[str] = []
    for value in values:
        if isinstance(value, str):
            found.append(value)
        elif isinstance(value, dict):
            found += _texts(value.values())
    return found


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


def find_fixtures(root: Path = ROOT) -> list[Fixture]:
    """Every JSON outside of ``manifests``."""
    return [Fixture(p) for p in sorted(root.rglob("*.json")) if "manifests" not in p.relative_to(root).parts]


# What the cases of a fixture have read so far: path -> case -> (leaves of the JSON, tensors).
_READ: dict[Path, dict[str, tuple[set[str], set[str]]]] = {}


def run_case(kind: Kind, path: Path, case: str) -> None:
    """One case on a fixture of its own, and note what it read."""
    fixture = Fixture(path)
    kind.check(fixture, case)
    _READ.setdefault(path, {})[case] = (fixture.meta.read, fixture.tensors.read)


def assert_all_read(kind: Kind, path: Path) -> None:
    """No leaf of the JSON and no tensor is left that no case has read; cases that have not run yet run now."""
    fixture = Fixture(path)
    cases = []
    for case in kind.cases(Fixture(path)):
        if case not in _READ.get(path, {}):
            run_case(kind, path, case)
        cases.append(_READ[path][case])
    settings = set().union(*(read for read, _ in cases))
    tensors = set().union(*(read for _, read in cases))
    unread = [p for p in fixture.meta.leaves() if p not in settings and not documentary(fixture.kind, p)]
    assert not unread, f"{path.name}: settings that no check has read: {unread}"
    left = [name for name in fixture.tensors if name not in tensors]
    assert not left, f"{path.name}: tensors that no check has read: {left}"
    listed = fixture.meta.get("tensors", {})
    for name in listed:
        assert name in fixture.tensors, f"{path.name}: {name} is listed and not in the file"
        shape = list(fixture.tensors[name].shape)
        assert _shape(listed[name]) == shape, (
            f"{path.name}: {name} is {shape}, listed as {_shape(listed[name])}"
        )


def _shape(entry: Any) -> list[int]:
    """Of {shape, dtype}, [shape, dtype] or [dtype, shape]."""
    if isinstance(entry, Recorded):
        return entry["shape"]
    return next(part for part in entry if isinstance(part, list))
