"""Sampling by the probability-flow ODE dx/dt = velocity(x, t), its reverse, and the likelihood along it.

Song et al. 2021, section 4.3 and appendix D; Chen et al. 2018 for the change of the log density.
"""

from typing import Any

import torch
from torch import Tensor

from zigflow.keyed import KeyedDraws
from zigflow.processes import Process, predict
from zigflow.processes.process import ModelFunction, working_dtype

from .conditions import map_tensors, pad_batch
from .doubts import Doubts, adams_doubt, ode_doubts
from .guidance import Guided
from .likelihood import Likelihood, Probe, augmented_drift, prior_log_density, probe_source
from .ode_fixed import FixedStep
from .solver import (
    ODE_SOLVERS,
    Callback,
    Drift,
    Solution,
    SolverSettings,
    TimeRange,
    last_step_to_data,
)
from .torchdiffeq_adapter import TORCHDIFFEQ
from .upsampling import Upsampled


class OdeSampler:
    """Deterministic sampling.

    Args:
        method: a name in ODE_SOLVERS: euler, midpoint, heun, heun3, rk4, rk4_classic (fixed steps), dopri5, bosh3
            (each sample adapts its own step), or torchdiffeq/<method>.
        num_steps: number of grid points between the ends of the interval, both included, as in the published
            code: fixed-step methods make ``num_steps - 1`` steps (``num_intervals``). dopri5 and bosh3 choose
            their own steps; for them it is only the number of states in a trajectory.
        atol, rtol: tolerances of adaptive methods.
        max_steps: adaptive methods give up after so many.
        interval: (low, high) instead of the process's own.
        batch_size: pad smaller batches to this size, so that a sample's bits do not depend on how many there are.
        last_step: where the interval ends before the data (all but a velocity on Linear or GVP), samples are the data
            that the model expects there, one more call of the model: else they keep the noise of that time. Encoding
            and likelihood have no such step.

    After a run ``num_function_evaluations`` counts the calls of the model and ``solution`` holds the solver's own
    account (steps accepted and rejected per sample).

    Raises:
        UnknownNameError: an unknown method.
        ValueError: a number out of range.
    """

    def __init__(
        self,
        method: str = "dopri5",
        num_steps: int = 250,
        atol: float = 1e-6,
        rtol: float = 1e-3,
        max_steps: int = 10_000,
        interval: tuple[float, float] | None = None,
        batch_size: int | None = None,
        last_step: bool = True,
    ):
        solver = ODE_SOLVERS.get(method)
        if num_steps < 2:
            raise ValueError(
                f"num_steps is {num_steps}; it counts grid points, both ends included, so at least 2"
            )
        if not (atol >= 0 and rtol >= 0 and atol + rtol > 0):
            raise ValueError(f"atol is {atol} and rtol {rtol}; give numbers >= 0 that are not both 0")
        self.method = method
        self.solver = solver
        self.num_steps = num_steps
        self.settings = SolverSettings(atol, rtol, max_steps)
        self.interval = interval
        self.batch_size = batch_size
        self.last_step = last_step
        self._doubts = Doubts()
        self.num_function_evaluations = 0
        self.solution: Solution | None = None

    @property
    def num_intervals(self) -> int:
        """Steps of a fixed-step method: one fewer than grid points."""
        return self.num_steps - 1

    def time_range(self, process: Process, backwards: bool = False) -> TimeRange:
        """From where to where a run goes, and whether it ends with a step to the data."""
        low, high = process.interval("ode") if self.interval is None else self.interval
        if backwards:
            return TimeRange(high, low)
        return TimeRange(low, high, "data" if self.last_step and high < 1 else None)

    def unfit(self, process: Process) -> str | None:
        """Nothing: every process has a probability-flow ODE."""
        return None

    def times(self, process: Process) -> list[float]:
        """The grid, rising from noise to data."""
        low, high = process.interval("ode") if self.interval is None else self.interval
        return torch.linspace(low, high, self.num_steps, dtype=torch.float64).tolist()

    def doubts(self, process: Process) -> list[str]:
        """What is known to be worse than DDIM with as many calls; the warnings of a run."""
        known = self.method.removeprefix(TORCHDIFFEQ)
        if known != self.method and known.endswith("adams"):
            return [adams_doubt(self.method)]
        # The same tableau under torchdiffeq's name has the same error.
        solver = ODE_SOLVERS.get(known) if known in ODE_SOLVERS else self.solver
        if not isinstance(solver, FixedStep):
            return []
        return ode_doubts(solver, self.num_intervals, getattr(process, "path", None), self.method)

    @torch.no_grad()
    def sample(
        self,
        process: Process,
        model: ModelFunction,
        x0: Tensor,
        y: Any = None,
        draws: KeyedDraws | None = None,
        callback: Callback | None = None,
        *,
        return_trajectory: bool = False,
    ) -> Tensor:
        """Samples (B, ...) in float32 (float64 for float64 noise) from initial noise x0 (B, ...).

        ``draws`` is accepted for symmetry with the SDE sampler; an ODE draws nothing.

        Returns:
            x1, or with ``return_trajectory`` the states at all grid points, (num_steps, B, ...), and where a last
            step is made the result behind them, (num_steps + 1, B, ...).

        Raises:
            SamplingError: a state is not finite, or an adaptive step vanished; the samples are named.
        """
        self._doubts.tell(self.doubts(process))
        finish = self.time_range(process).last_step is not None
        return self._run(process, model, x0, y, self.times(process), callback, return_trajectory, finish)

    @torch.no_grad()
    def encode(
        self,
        process: Process,
        model: ModelFunction,
        x1: Tensor,
        y: Any = None,
        callback: Callback | None = None,
        *,
        return_trajectory: bool = False,
    ) -> Tensor:
        """The noise x0 (B, ...) that :meth:`sample` would map to x1: the same ODE from the last time to the first.

        Data stand for the state at the last time. A last step has no inverse; ``last_step=False`` is undone exactly.
        """
        return self._run(process, model, x1, y, self.times(process)[::-1], callback, return_trajectory)

    def log_likelihood(
        self,
        process: Process,
        model: ModelFunction,
        x1: Tensor,
        y: Any = None,
        draws: KeyedDraws | None = None,
        *,
        trace: str = "hutchinson",
        num_probes: int = 1,
        probe: Probe | None = None,
        bin_width: float = 1.0,
    ) -> Likelihood:
        """Log density of data x1 (B, ...) under the model, by the change of variables along the ODE to x0.

        Args:
            trace: "hutchinson" (unbiased, ``num_probes`` Rademacher vectors fixed for the whole run) or "exact"
                (one backward pass per element of a sample; small samples only).
            probe: own probe vectors, see ``zigflow.samplers.likelihood.Probe``; else from ``draws``
                ("sample.likelihood"), the ambient draws, or torch's generator.
            bin_width: width of a quantisation bin of the data, for bits per dimension of discrete data:
                2/255 for 8-bit images in [-1, 1]; 1 leaves the density as it is.

        Returns:
            Likelihood(log_density (B,) in nats, bits_per_dim (B,), x0 (B, ...)).

        Raises:
            UnknownNameError: an unknown trace.
            ValueError: too large a sample for the exact trace.
            SamplingError: as in :meth:`sample`.
        """
        # Backward passes through the model are needed even when the caller has switched autograd off.
        with torch.inference_mode(False), torch.no_grad():
            x = x1.clone().to(working_dtype(x1))
            rows, shape = x.shape[0], x.shape[1:]
            x, y, draws = pad_batch(x, y, draws, self.batch_size)
            y = map_tensors(lambda part: part.clone() if part.is_inference() else part, y)
            source = probe_source(x, trace, num_probes, probe, draws)
            drift = augmented_drift(self._drift(process, self._per_sample(model), y), x.shape, source)
            state = torch.cat([x.flatten(1), x.new_zeros(x.shape[0], 1)], dim=1)
            state = self._solve(drift, state, self.times(process)[::-1], None, False)
            x0 = state[:rows, :-1].reshape(rows, *shape)
            log_density = prior_log_density(x0, process.prior_scale) + state[:rows, -1]
            return Likelihood.of(log_density, x0, bin_width)

    def _run(
        self,
        process: Process,
        model: ModelFunction,
        x: Tensor,
        y: Any,
        times: list[float],
        callback: Callback | None,
        keep: bool,
        finish: bool = False,
    ) -> Tensor:
        rows = x.shape[0]
        x, y, _ = pad_batch(x.to(working_dtype(x)), y, None, self.batch_size)
        model = self._per_sample(model)
        steps = 0

        def count(step: int, t: Tensor, x: Tensor) -> None:
            nonlocal steps
            steps = step
            if callback is not None:
                callback(step, t, x)

        result = self._solve(self._drift(process, model, y), x, times, count, keep)
        if finish:
            data = last_step_to_data(
                process, model, result[-1] if keep else result, times[-1], y, steps + 1, callback
            )
            self.num_function_evaluations += 1
            result = torch.cat([result, data[None]]) if keep else data
        return result[:, :rows] if keep else result[:rows]

    def _solve(
        self, drift: Drift, x: Tensor, times: list[float], callback: Callback | None, keep: bool
    ) -> Tensor:
        self.solution = self.solver.solve(drift, x, times, self.settings, keep, callback)
        self.num_function_evaluations = self.solution.num_function_evaluations
        return self.solution.x if self.solution.trajectory is None else self.solution.trajectory

    def _per_sample(self, model: ModelFunction) -> ModelFunction:
        """The model, whose calls must not depend on the neighbors where samples are at different times."""
        if self.solver.adaptive and isinstance(model, (Guided, Upsampled)):
            return model.always_doubled()
        return model

    def _drift(self, process: Process, model: ModelFunction, y: Any) -> Drift:
        def drift(x: Tensor, t: Tensor) -> Tensor:
            return process.velocity(predict(process, model, x, t, y), x, t)

        return drift
