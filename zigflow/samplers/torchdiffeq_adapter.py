"""torchdiffeq's solvers as ``torchdiffeq/<method>``, for comparison with published results.

Its adaptive methods choose one step for a whole batch, so a sample's result depends on its neighbours, and
they step past the end of the interval and interpolate back, so the model is evaluated outside it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from torch import Tensor

from zigflow.errors import needs

from .solver import (
    ODE_SOLVERS,
    Callback,
    Drift,
    FiniteWatch,
    SamplingError,
    Solution,
    SolverSettings,
    full_time,
)

TORCHDIFFEQ = "torchdiffeq/"


@dataclass(frozen=True)
class TorchdiffeqSolver:
    method: str
    order: int | None
    adaptive: bool

    @property
    def name(self) -> str:
        return TORCHDIFFEQ + self.method

    def solve(
        self,
        drift: Drift,
        x: Tensor,
        times: Sequence[float],
        settings: SolverSettings,
        keep: bool = False,
        callback: Callback | None = None,
    ) -> Solution:
        """See :class:`OdeSolver`; ``callback`` is called once per grid point, after the run.

        Raises:
            SamplingError: the step vanished, or a result is not finite.
        """
        from torchdiffeq import odeint

        evaluations = 0

        def function(t: Tensor, state: Tensor) -> Tensor:
            nonlocal evaluations
            evaluations += 1
            return drift(state, t.expand(state.shape[0]))

        grid = full_time(0.0, x).new_tensor(times)
        try:
            states: Any = odeint(
                function, x, grid, method=self.method, atol=settings.atol, rtol=settings.rtol
            )
        except AssertionError as error:
            raise SamplingError(
                f"{self.name} stopped at {settings}: {error}. It evaluates the model outside the interval, where "
                "the drift may not exist; the solver of the same name without 'torchdiffeq/' does not"
            ) from error
        watch = FiniteWatch(x)
        for number in range(1, len(times)):
            watch.check(states[number], number, last=number == len(times) - 1)
            if callback is not None:
                callback(number, full_time(times[number], x), states[number])
        return Solution(states[-1], evaluations, states if keep else None)


@cache
def adapters() -> dict[str, TorchdiffeqSolver]:
    """One adapter per method that the installed torchdiffeq lists, by its name here.

    Raises:
        MissingPackageError: torchdiffeq is missing; the extra to install is named.
    """
    with needs("torchdiffeq", f"a solver called {TORCHDIFFEQ}NAME", extra="torchdiffeq"):
        from torchdiffeq._impl.odeint import SOLVERS

    found = {}
    for method, solver in SOLVERS.items():
        order = getattr(solver, "order", None)
        adaptive = any("Adaptive" in base.__name__ for base in solver.__mro__)
        adapter = TorchdiffeqSolver(method, order if isinstance(order, int) else None, adaptive)
        found[adapter.name] = adapter
    return found


ODE_SOLVERS.register_family(TORCHDIFFEQ, adapters)
