"""Where the fixed variants of DPM-Solver step: grids, orders of single steps, inner nodes; in float64 on the host."""

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

GRIDS = ("logSNR", "time_uniform", "time_quadratic")
VARIANTS = ("singlestep", "fast", "multistep", "adaptive")


@dataclass(frozen=True)
class Span:
    """One step: its first time, its inner nodes, its last time, rising from noise to data."""

    times: tuple[float, ...]


def grid_times(grid: str, path: Any, low: float, high: float, intervals: int) -> list[float]:
    """``intervals`` + 1 process times from low (noise) to high (data)."""
    if grid == "logSNR":
        ends = torch.tensor([low, high], dtype=torch.float64)
        first, last = path.log_snr(ends).tolist()
        inner = path.time_of_log_snr(torch.linspace(first, last, intervals + 1, dtype=torch.float64))
        return [low, *inner[1:-1].tolist(), high]
    # Papers' time s = 1 - t, in which the quadratic grid is denser near the data.
    s = torch.tensor([1 - low, 1 - high], dtype=torch.float64)
    power = 2 if grid == "time_quadratic" else 1
    first, last = (s ** (1 / power)).tolist()
    return (1 - torch.linspace(first, last, intervals + 1, dtype=torch.float64) ** power).tolist()


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
    """The steps of a fixed variant, each with its inner nodes: even in lambda, or on the grid for "fast" in time."""
    if variant == "multistep":
        return [Span(pair) for pair in pairwise(grid_times(grid, path, low, high, num_steps))]
    if variant == "singlestep":
        orders = [order] * (num_steps // order)
    else:
        orders = fast_orders(num_steps, order)
        if grid != "logSNR":
            return _grouped(grid_times(grid, path, low, high, num_steps), orders)
    ends = grid_times(grid, path, low, high, len(orders))
    return [Span(_with_inner(path, a, b, k)) for (a, b), k in zip(pairwise(ends), orders, strict=True)]


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
