"""Settings of a solver that are known to lose against first order (DDIM) with as many calls of the model.

Found with the exact network of real digits (``benchmarks/samplers.py``, which holds that none is more than 1.5 times as
far off without a warning): a step of high order is worth its calls where lambda = log(alpha / sigma) changes little in
it, and a grid even in time has steps of 3 to 5 in lambda beside the data, under cosine schedules beside the noise too.
"""

import logging
import math
from typing import Any, Protocol

import torch

from zigflow.processes.interpolants import VP

from .dpm_grids import Span

log = logging.getLogger(__name__)

LONG = 1.5
"""In lambda, for single steps of the noise form and for multistep without lower orders at the end, on grids in time."""
LONG_EVERYWHERE = 1.0
"""For single steps of the noise form on the grid in lambda, where all are that long."""
LONG_DATA = 3.0
"""For "singlestep" of the data form on grids in time; its "fast" is not doubted."""
FEW_CALLS, FEW_CALLS_AT_ENDS = 32, 64
"""Of an ODE method with several stages; of one that asks at a step's end, where the drift is steep beside the data."""
STEEP = 0.7
"""The sigma after a tenth of the time, beside the data, from which steps even in time are doubted at any number."""


class PlannedSteps(Protocol):
    """What is asked about the steps of a DPM-Solver; the names are those of its arguments."""

    method: str
    variant: str
    num_steps: int
    order: int
    grid: str
    lower_order_final: bool


class Doubts:
    """Says each warning once in the life of a sampler, which makes many batches."""

    def __init__(self):
        self._told: set[str] = set()

    def tell(self, doubts: list[str]) -> None:
        for doubt in doubts:
            if doubt not in self._told:
                self._told.add(doubt)
                log.warning("%s", doubt)


def dpm_doubts(sampler: PlannedSteps, path: Any, spans: list[Span]) -> list[str]:
    """What is doubtful about the steps ``spans`` of a fixed variant on a path of alpha and sigma."""
    method, variant, grid, order = sampler.method, sampler.variant, sampler.grid, sampler.order
    name = f"{method} variant={variant} order={order} grid={grid} num_steps={sampler.num_steps}"
    if order == 1:
        if grid == "time_uniform":
            return []
        return [
            f"{name} can be twice as far off as DDIM: first order does better on grid=time_uniform, or take order=2"
        ]
    longest = max(_length(path, span) for span in spans)
    if longest <= _limit(sampler):
        return []
    cure = "dpm_solver++ or more steps" if grid == "logSNR" else "grid=logSNR"
    return [
        f"{name} can be several times as far off as DDIM: a step is {longest:.1f} long in lambda, too long for its "
        f"order; take {cure}" + (", or lower_order_final=true" if variant == "multistep" else "")
    ]


def _limit(sampler: PlannedSteps) -> float:
    """The longest step in lambda, of an order above 1, that is not doubted."""
    in_time, noise = sampler.grid != "logSNR", sampler.method == "dpm_solver"
    if sampler.variant == "multistep":
        return LONG if in_time and not sampler.lower_order_final else math.inf
    if in_time and sampler.variant == "fast_equal_spans":
        return 0.0  # its low order at the end has as long a step as the others, which is too long for it
    if in_time:
        return LONG if noise else LONG_DATA if sampler.variant == "singlestep" else math.inf
    return LONG_EVERYWHERE if noise else math.inf


def _length(path: Any, span: Span) -> float:
    first, last = path.log_snr(torch.tensor([span.times[0], span.times[-1]], dtype=torch.float64)).tolist()
    return (last - first) / 2


def adams_doubt(method: str) -> str:
    """Adams methods look back over steps in which a diffusion's drift changes manyfold: errors grow without a bound."""
    return (
        f"{method} is unstable on steps even in time beside the data, where it can be many thousand times as far off "
        "as DDIM: take dopri5, heun or rk4"
    )


def ode_doubts(solver: Any, intervals: int, path: Any, method: str | None = None) -> list[str]:
    """What is doubtful about a fixed-step solver (a tableau) of the ODE in time, on a variance-preserving path.

    Args:
        method: what the warnings call it, if not by its name.
    """
    if not isinstance(path, VP):
        return []
    method, stages = method or solver.name, len(solver.b)
    sigma = float(path.sigma(torch.tensor(0.9, dtype=torch.float64)))
    if sigma > STEEP:
        return [
            f"{method} with {intervals} steps can be many times as far off as DDIM on a schedule that has most of its "
            f"noise beside the data (sigma is {sigma:.2f} after a tenth of the time): take ddim, or dpm_solver++ with "
            "grid=logSNR"
        ]
    at_ends = any(sum(weights) > 0.999 for weights in solver.a)
    few = FEW_CALLS_AT_ENDS if at_ends else FEW_CALLS
    if stages > 1 and stages * intervals < few:
        return [
            f"{method} with {intervals} steps can be several times as far off as DDIM with as many calls of the model: "
            f"take {-(-few // stages)} steps or more, ddim, or dpm_solver++ with grid=logSNR"
        ]
    return []
