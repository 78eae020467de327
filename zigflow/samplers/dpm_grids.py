"""Where the fixed variants of DPM-Solver step: grids, orders of single steps, inner nodes; in float64 on the host."""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from zigflow.registry import Registry

Grid = Callable[[Any, float, float, int], list[float]]
"""``grid(path, low, high, intervals)``: ``intervals`` + 1 process times from low (noise) to high (data)."""

GRIDS: Registry[Grid] = Registry("grid of DPM-Solver")
"""What ``diffusion.grid`` names."""


@dataclass(frozen=True)
class Span:
    """One step: its first time, its inner nodes, its last time, rising from noise to data."""

    times: tuple[float, ...]


@dataclass(frozen=True)
class Variant:
    """How the steps of a run are laid out.

    Attributes:
        plan: ``plan(grid, num_steps, order, path, low, high)``: the steps, whose inner nodes make single steps of
            their order; None: each step follows from the error of the one before (adaptive).
        multistep: earlier values take the place of inner nodes.
    """

    plan: Callable[[Grid, int, int, Any, float, float], list[Span]] | None
    multistep: bool = False

    @property
    def adaptive(self) -> bool:
        return self.plan is None


VARIANTS: Registry[Variant] = Registry("variant of DPM-Solver")
"""What ``diffusion.variant`` names."""


@GRIDS.register("logSNR")
def _even_in_lambda(path: Any, low: float, high: float, intervals: int) -> list[float]:
    ends = torch.tensor([low, high], dtype=torch.float64)
    first, last = path.log_snr(ends).tolist()
    inner = path.time_of_log_snr(torch.linspace(first, last, intervals + 1, dtype=torch.float64))
    return [low, *inner[1:-1].tolist(), high]


@GRIDS.register("time_uniform")
def _even_in_time(path: Any, low: float, high: float, intervals: int) -> list[float]:
    return _even_in_root(low, high, intervals, 1)


@GRIDS.register("time_quadratic")
def _even_in_root_of_time(path: Any, low: float, high: float, intervals: int) -> list[float]:
    return _even_in_root(low, high, intervals, 2)


def _even_in_root(low: float, high: float, intervals: int, power: int) -> list[float]:
    # Papers' time s = 1 - t, in which the quadratic grid is denser near the data.
    s = torch.tensor([1 - low, 1 - high], dtype=torch.float64)
    first, last = (s ** (1 / power)).tolist()
    return (1 - torch.linspace(first, last, intervals + 1, dtype=torch.float64) ** power).tolist()


def raised_start(path: Any, low: float, floor: float) -> float:
    """``low``, or where lambda is ``floor`` if it is less at ``low``."""
    if float(path.log_snr(torch.tensor(low, dtype=torch.float64))) >= 2 * floor:
        return low
    return float(path.time_of_log_snr(torch.tensor([2 * floor], dtype=torch.float64)))


def fast_orders(num_steps: int, order: int) -> list[int]:
    """As many steps of ``order`` as leave a lower one for the end; they add up to ``num_steps``.

    Order 3 as published: 3 ... 3 1, 3 ... 3 2, or 3 ... 3 2 1; order 2: 2 ... 2 with a 1 where one is left.
    """
    whole, left = divmod(num_steps, order)
    if order == 3 and left == 0:
        return [3] * (whole - 1) + [2, 1]
    return [order] * whole + ([left] if left else [])


def plan(
    variant: str, grid: str, num_steps: int, order: int, path: Any, low: float, high: float
) -> list[Span]:
    """The steps of a fixed variant with at most ``num_steps`` calls of the model, and the inner nodes of each.

    "fast" is the plan of the published DPM-Solver++ code: a grid of ``num_steps`` intervals, of which a step of order k
    covers k. "fast_equal_spans" is that of the first published code: one interval of the grid for each step, whatever
    its order, so that a low order at the end covers as much as a high one. Both and "singlestep" put the inner nodes of
    a span even in lambda, but "fast" on the grid itself.

    Raises:
        UnknownNameError: an unknown variant or grid.
        ValueError: an adaptive variant, which has no plan.
    """
    make = VARIANTS.get(variant).plan
    if make is None:
        raise ValueError(f"variant {variant!r} chooses its steps while it runs; there is no plan")
    return make(GRIDS.get(grid), num_steps, order, path, low, high)


def _plan_pairs(grid: Grid, num_steps: int, order: int, path: Any, low: float, high: float) -> list[Span]:
    return [Span(pair) for pair in pairwise(grid(path, low, high, num_steps))]


def _plan_fast(grid: Grid, num_steps: int, order: int, path: Any, low: float, high: float) -> list[Span]:
    return _grouped(grid(path, low, high, num_steps), fast_orders(num_steps, order))


def _plan_single(grid: Grid, num_steps: int, order: int, path: Any, low: float, high: float) -> list[Span]:
    return _equal_spans(grid, [order] * (num_steps // order), path, low, high)


def _plan_equal(grid: Grid, num_steps: int, order: int, path: Any, low: float, high: float) -> list[Span]:
    return _equal_spans(grid, fast_orders(num_steps, order), path, low, high)


def _equal_spans(grid: Grid, orders: list[int], path: Any, low: float, high: float) -> list[Span]:
    ends = grid(path, low, high, len(orders))
    return [Span(_with_inner(path, a, b, k)) for (a, b), k in zip(pairwise(ends), orders, strict=True)]


VARIANTS.register("singlestep", Variant(_plan_single))
VARIANTS.register("fast", Variant(_plan_fast))
VARIANTS.register("fast_equal_spans", Variant(_plan_equal))
VARIANTS.register("multistep", Variant(_plan_pairs, multistep=True))
VARIANTS.register("adaptive", Variant(None))


def _grouped(times: list[float], orders: list[int]) -> list[Span]:
    spans, start = [], 0
    for order in orders:
        spans.append(Span(tuple(times[start : start + order + 1])))
        start += order
    return spans


def _with_inner(path: Any, a: float, b: float, order: int) -> tuple[float, ...]:
    first, last = path.log_snr(torch.tensor([a, b], dtype=torch.float64)).tolist()
    log_snr: Tensor = torch.linspace(first, last, order + 1, dtype=torch.float64)
    return (a, *path.time_of_log_snr(log_snr[1:-1]).tolist(), b)
