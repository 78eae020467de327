"""Explicit Runge-Kutta methods with a fixed step, as Butcher tableaus.

Hairer, Norsett & Wanner, "Solving Ordinary Differential Equations I", section II.1. ``rk4`` is Kutta's 3/8
rule, as in torchdiffeq and therefore in the published results; the better known one is ``rk4_classic``.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from .solver import ODE_SOLVERS, Callback, Drift, FiniteWatch, Solution, SolverSettings, full_time


def weighted_sum(weights: Sequence[float], slopes: Sequence[Tensor]) -> Tensor:
    """The sum of weight times slope, always added in the same order; zero weights cost nothing."""
    used = [(w, k) for w, k in zip(weights, slopes, strict=True) if w != 0]
    total = used[0][1] * used[0][0]
    for weight, slope in used[1:]:
        total = total.add_(slope, alpha=weight)
    return total


@dataclass(frozen=True)
class FixedStep:
    """One method. Row i of ``a`` holds the weights of the slopes before stage i; nodes are its row sums."""

    name: str
    order: int
    a: tuple[tuple[float, ...], ...]
    b: tuple[float, ...]
    adaptive: bool = False

    def step(self, drift: Drift, x: Tensor, t: float, h: float) -> Tensor:
        slopes: list[Tensor] = []
        for weights in self.a:
            stage = x + h * weighted_sum(weights, slopes) if any(weights) else x
            slopes.append(drift(stage, full_time(t + h * sum(weights), x)))
        return x + h * weighted_sum(self.b, slopes)

    def solve(
        self,
        drift: Drift,
        x: Tensor,
        times: Sequence[float],
        settings: SolverSettings,
        keep: bool = False,
        callback: Callback | None = None,
    ) -> Solution:
        """One step between each two neighbours of ``times``; see :class:`OdeSolver`. Tolerances are unused."""
        watch = FiniteWatch(x)
        states = [x] if keep else None
        for number, (t, t_next) in enumerate(pairwise(times), 1):
            x = self.step(drift, x, t, t_next - t)
            watch.check(x, number, last=number == len(times) - 1)
            if states is not None:
                states.append(x)
            if callback is not None:
                callback(number, full_time(t_next, x), x)
        evaluations = (len(times) - 1) * len(self.b)
        return Solution(x, evaluations, None if states is None else torch.stack(states))


_HEUN = FixedStep("heun", 2, ((), (1.0,)), (0.5, 0.5))

for _method in (
    FixedStep("euler", 1, ((),), (1.0,)),
    FixedStep("midpoint", 2, ((), (0.5,)), (0.0, 1.0)),
    _HEUN,
    FixedStep("heun3", 3, ((), (1 / 3,), (0.0, 2 / 3)), (0.25, 0.0, 0.75)),
    FixedStep("rk4", 4, ((), (1 / 3,), (-1 / 3, 1.0), (1.0, -1.0, 1.0)), (1 / 8, 3 / 8, 3 / 8, 1 / 8)),
    FixedStep("rk4_classic", 4, ((), (0.5,), (0.0, 0.5), (0.0, 0.0, 1.0)), (1 / 6, 1 / 3, 1 / 3, 1 / 6)),
):
    ODE_SOLVERS.register(_method.name, _method)
# The name in torchdiffeq.
ODE_SOLVERS.register("heun2", _HEUN)
