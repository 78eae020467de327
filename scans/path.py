"""ScanPath: one visiting order of the tokens of a grid, with its inverse."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

Order = NDArray[np.int64]


@dataclass(frozen=True, eq=False, repr=False)
class ScanPath:
    """A bijection between steps of a walk and tokens in raster order.

    ``order[k]`` is the raster index of the token visited at step ``k``: ``x[:, order]`` lays a
    sequence out along the path. ``inverse[i]`` is the step at which token ``i`` is visited, so
    ``x[:, order][:, inverse]`` is ``x`` again. Both are read-only int64 arrays of shape (L,).
    Two paths are equal when their orders are; ``name`` and ``shape`` are labels.

    Args:
        order: (L,) integers, each of 0..L-1 once.
        name: what error messages and plots call the path.
        shape: the grid the raster indices refer to, (h, w) or (t, h, w), or None when there is none.

    Raises:
        TypeError: ``order`` does not hold integers.
        ValueError: ``order`` is not one-dimensional, is empty, does not fit ``shape`` or is not a
            bijection; the message lists what is repeated, missing or out of range.
    """

    order: Order
    name: str = ""
    shape: tuple[int, ...] | None = None
    inverse: Order = field(init=False)
    _hash: int = field(init=False)

    def __init__(self, order: ArrayLike, name: str = "", shape: Sequence[int] | None = None):
        checked = _checked_order(order, name)
        inverse = np.empty_like(checked)
        inverse[checked] = np.arange(len(checked))
        if shape is not None:
            shape = tuple(int(size) for size in shape)
            if math.prod(shape) != len(checked):
                raise ValueError(
                    f"{_label(name)} has {len(checked)} tokens, but its grid {shape} has {math.prod(shape)}"
                )
        checked.flags.writeable = False
        inverse.flags.writeable = False
        set_field = object.__setattr__
        set_field(self, "order", checked)
        set_field(self, "name", name)
        set_field(self, "shape", shape)
        set_field(self, "inverse", inverse)
        set_field(self, "_hash", hash(checked.tobytes()))

    @classmethod
    def identity(cls, length: int, shape: Sequence[int] | None = None, name: str = "raster") -> "ScanPath":
        """The raster order itself: token k at step k."""
        return cls(np.arange(length), name=name, shape=shape)

    @property
    def is_identity(self) -> bool:
        """True when the path is the raster order, so that no gather is needed."""
        return bool(np.array_equal(self.order, np.arange(len(self))))

    def reversed(self) -> "ScanPath":
        """The same walk from its end to its start. Not the inverse."""
        return ScanPath(self.order[::-1], name=f"{self.name} reversed".strip(), shape=self.shape)

    def inverted(self) -> "ScanPath":
        """The inverse permutation used as a visiting order: ``order`` and ``inverse`` change places."""
        return ScanPath(self.inverse, name=f"{self.name} inverted".strip(), shape=self.shape)

    def then(self, other: "ScanPath") -> "ScanPath":
        """One gather for two: ``x[:, self.then(other).order] == x[:, self.order][:, other.order]``.

        Raises:
            ValueError: the two paths have different lengths.
        """
        if len(other) != len(self):
            raise ValueError(
                f"{_label(self.name)} has {len(self)} tokens and {_label(other.name)} has {len(other)}; "
                "only paths of equal length compose"
            )
        return ScanPath(self.order[other.order], name=f"{self.name} then {other.name}", shape=self.shape)

    def __len__(self) -> int:
        return len(self.order)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, ScanPath):
            return NotImplemented
        return self._hash == other._hash and np.array_equal(self.order, other.order)

    def __hash__(self) -> int:
        return self._hash

    def __repr__(self) -> str:
        grid = "" if self.shape is None else f", shape={self.shape}"
        shown = ", ".join(map(str, self.order[:8])) + (", ..." if len(self) > 8 else "")
        return f"ScanPath({self.name!r}, length={len(self)}{grid}, order=[{shown}])"

    def __reduce__(self) -> tuple[Any, ...]:
        # Arrays come back from pickle writable and byte hashes differ between processes: build anew.
        return ScanPath, (self.order, self.name, self.shape)


def _label(name: str) -> str:
    return f"scan path {name!r}" if name else "scan path"


def _checked_order(order: ArrayLike, name: str) -> Order:
    """A fresh int64 copy of ``order`` after all checks."""
    given = np.asarray(order)
    if given.ndim != 1 or given.size == 0:
        raise ValueError(
            f"{_label(name)}: an order is a non-empty one-dimensional array, got shape {given.shape}"
        )
    if given.dtype.kind not in "iu":
        raise TypeError(f"{_label(name)}: an order holds integers, got dtype {given.dtype}")
    copy = given.astype(np.int64)
    length = len(copy)
    inside = (given >= 0) & (given < length)
    counts = np.bincount(copy[inside], minlength=length)
    problems = []
    if not inside.all():
        problems.append(
            f"out of range {_some(given[~inside])} at step {_some(np.flatnonzero(~inside))} "
            f"(allowed 0..{length - 1})"
        )
    if (counts > 1).any():
        repeated = np.flatnonzero(counts > 1)
        steps = _some(np.flatnonzero(copy == repeated[0]))
        problems.append(f"visited more than once: {_some(repeated)} ({repeated[0]} at steps {steps})")
    if problems:
        problems.append(f"never visited: {_some(np.flatnonzero(counts == 0))}")
        raise ValueError(f"{_label(name)} over {length} tokens is not a bijection: " + "; ".join(problems))
    return copy


def _some(values: np.ndarray, most: int = 6) -> str:
    shown = ", ".join(str(int(value)) for value in values[:most])
    return shown + (f", ... ({len(values)} in all)" if len(values) > most else "")
