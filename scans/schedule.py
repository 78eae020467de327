"""What each layer does with the tokens: its path, what is folded into the batch, how it is undone.

Letters: t frames, h rows, w columns, L = t*h*w tokens in frame-major raster order "t (h w)".
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, overload

import numpy as np

from scans.path import Order, ScanPath
from scans.registry import check_grid

Fold = Literal["none", "frames", "pixels"]
FOLDS: tuple[Fold, ...] = ("none", "frames", "pixels")


class ResolvedStep(NamedTuple):
    """A step over a given grid, as two gathers and a view.

    ``y = x[:, order].view(B * segments, L // segments, D)`` is what the mixer reads, and
    ``y.view(B, L, D)[:, undo]`` brings its result back to raster order.
    """

    order: Order
    undo: Order
    segments: int


@dataclass(frozen=True)
class ScanStep:
    """One layer's path and the axis that becomes batch.

    Args:
        path: over all L tokens (fold "none"), over the h*w tokens of a frame ("frames": every frame is a
            sequence), or over t ("pixels": every pixel's history is a sequence).
        fold: "none", "frames" or "pixels".
        undo: path whose ``order`` is gathered after the mixer; default the inverse. Only published code
            that undoes wrongly needs another one.

    Raises:
        ValueError: unknown fold, or ``undo`` of another length than ``path``.
    """

    path: ScanPath
    fold: Fold = "none"
    undo: ScanPath = field(default=None)  # pyright: ignore[reportAssignmentType]

    def __post_init__(self):
        if self.fold not in FOLDS:
            raise ValueError(f"fold must be one of {', '.join(FOLDS)}, got {self.fold!r}")
        if self.undo is None:
            object.__setattr__(self, "undo", self.path.inverted())
        if len(self.undo) != len(self.path):
            raise ValueError(f"undo has {len(self.undo)} tokens, but the path has {len(self.path)}")

    @property
    def is_exact(self) -> bool:
        """True when ``undo`` brings every token back to where it came from."""
        return bool(np.array_equal(self.undo.order, self.path.inverse))

    def resolve(self, t: int, h: int, w: int) -> ResolvedStep:
        """The step as index arrays over the L = t*h*w raster.

        Returns:
            ``order`` and ``undo``, both (L,) int64, read-only, and the number of ``segments`` per sample:
            1, t or h*w.

        Raises:
            ValueError: the path does not have the length that this grid and fold need.
        """
        t, h, w = check_grid((t, h, w))
        pixels = h * w
        needed = {"none": t * pixels, "frames": pixels, "pixels": t}[self.fold]
        if len(self.path) != needed:
            raise ValueError(
                f"a step with fold {self.fold!r} over (t, h, w) = {(t, h, w)} needs a path of {needed} "
                f"tokens, its path {self.path.name!r} has {len(self.path)}"
            )
        walk, back = self.path.order, self.undo.order
        if self.fold == "none":
            return ResolvedStep(walk, back, 1)
        if self.fold == "frames":
            first = np.arange(t)[:, None] * pixels
            return ResolvedStep(_flat(first + walk), _flat(first + back), t)
        pixel = np.arange(pixels)
        return ResolvedStep(_flat(walk * pixels + pixel[:, None]), _flat(back[:, None] + pixel * t), pixels)


def _flat(indices: np.ndarray) -> Order:
    flat = indices.reshape(-1)
    flat.flags.writeable = False
    return flat


@dataclass(frozen=True)
class ScanSchedule(Sequence[ScanStep]):
    """One ScanStep per layer, over one (t, h, w) grid.

    ``branches`` is empty, or holds the paths that the branches of a parallel mixer walk in every layer;
    the steps are then the raster itself.

    Raises:
        ValueError: no layers, or a path that does not fit the grid.
    """

    steps: tuple[ScanStep, ...]
    grid: tuple[int, int, int]
    branches: tuple[ScanPath, ...] = ()

    def __post_init__(self):
        if not self.steps:
            raise ValueError("a scan schedule needs at least one layer")
        for step in dict.fromkeys(self.steps):
            step.resolve(*self.grid)
        length = self.grid[0] * self.grid[1] * self.grid[2]
        for path in self.branches:
            if len(path) != length:
                raise ValueError(
                    f"branch path {path.name!r} has {len(path)} tokens, the grid {self.grid} {length}"
                )

    @property
    def depth(self) -> int:
        return len(self.steps)

    @property
    def branch_orders(self) -> Order | None:
        """(k, L) visiting orders of a parallel mixer's branches, None without branches."""
        return np.stack([path.order for path in self.branches]) if self.branches else None

    def resolve(self, layer: int) -> ResolvedStep:
        """`ScanStep.resolve` of one layer over the schedule's grid."""
        return self.steps[layer].resolve(*self.grid)

    def distinct(self) -> tuple[tuple[ScanStep, ...], tuple[int, ...]]:
        """The different steps, in order of first use, and for each layer which one it takes."""
        position: dict[ScanStep, int] = {}
        layers = tuple(position.setdefault(step, len(position)) for step in self.steps)
        return tuple(position), layers

    def __len__(self) -> int:
        return len(self.steps)

    def __iter__(self) -> Iterator[ScanStep]:
        return iter(self.steps)

    @overload
    def __getitem__(self, index: int) -> ScanStep: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[ScanStep, ...]: ...
    def __getitem__(self, index: int | slice) -> ScanStep | tuple[ScanStep, ...]:
        return self.steps[index]
