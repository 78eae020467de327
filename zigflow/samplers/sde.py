"""Sampling by the SDE dX = (velocity + D score) dt + sqrt(2 D) dW from noise to data (SiT, section 2.3).

"Euler" is Euler-Maruyama. "Heun" adds the step's noise first and then makes one step of Heun's ODE method
with the drift. Both have strong and weak order 1 for these SDEs (their noise does not depend on the state);
Heun's gain is in the drift: without noise its order is 2.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from zigflow.keyed import KeyedDraws, current_draws
from zigflow.processes import Process, SdeProcess, predict
from zigflow.processes.diffusion_forms import DIFFUSION_FORMS
from zigflow.processes.process import ModelFunction, working_dtype
from zigflow.registry import Registry, unknown_name

from .conditions import map_tensors, padding_index
from .solver import Callback, Drift, FiniteWatch, TimeRange, full_time

NoiseFunction = Callable[[int, Tensor], Tensor]
"""``noise(step, x) -> standard normals of the shape of x`` for steps 0, 1, ..."""

LAST_STEPS = (None, "Mean", "Tweedie", "Euler")


@dataclass(frozen=True)
class SdeStep:
    """One step; ``advance(drift, x, t, h, spread)`` with spread = sqrt(2 D(t)) dW."""

    name: str
    strong_order: float
    weak_order: float
    evaluations: int
    evaluates_end: bool
    advance: Callable[[Drift, Tensor, float, float, Tensor], Tensor]


SDE_STEPS: Registry[SdeStep] = Registry("SDE method")
"""What ``sde.sampling_method`` names."""


def _euler(drift: Drift, x: Tensor, t: float, h: float, spread: Tensor) -> Tensor:
    return x + h * drift(x, full_time(t, x)) + spread


def _heun(drift: Drift, x: Tensor, t: float, h: float, spread: Tensor) -> Tensor:
    noisy = x + spread
    first = drift(noisy, full_time(t, x))
    second = drift(noisy + h * first, full_time(t + h, x))
    return noisy + 0.5 * h * (first + second)


for _step in (
    SdeStep("Euler", 1.0, 1.0, 1, False, _euler),
    SdeStep("Heun", 1.0, 1.0, 2, True, _heun),
):
    SDE_STEPS.register(_step.name, _step)


class SdeSampler:
    """Stochastic sampling.

    Args:
        method: a name in SDE_STEPS: "Euler" or "Heun".
        num_steps: number of grid points between the ends of the interval, both included, as in the published
            code: ``num_steps - 1`` steps are made (``num_intervals``), and then the last one.
        diffusion_form, diffusion_norm: the diffusion D, see ``zigflow.processes.DIFFUSION_FORMS``.
        last_step: what covers the rest of the way without noise: "Tweedie" (the data that the model expects),
            "Euler" (velocity: the same on a straight path), "Mean" (drift of the SDE, the published default, which
            takes away more noise than there is: of a known image 0.04 is left, at sigma 0.04 as much as before,
            negative), or None.
        last_step_size: the SDE ends at 1 - last_step_size; ignored for last_step None.
        interval: (low, high) instead of the process's own.
        batch_size: pad smaller batches to this size, so that a sample's bits do not depend on how many there are.

    ``num_function_evaluations`` counts the calls of the model in the last run.

    Raises:
        UnknownNameError: an unknown name.
        ValueError: a number out of range.
    """

    def __init__(
        self,
        method: str = "Euler",
        num_steps: int = 250,
        diffusion_form: str = "sigma",
        diffusion_norm: float = 1.0,
        last_step: str | None = "Tweedie",
        last_step_size: float = 0.04,
        interval: tuple[float, float] | None = None,
        batch_size: int | None = None,
    ):
        step = SDE_STEPS.get(method)
        if last_step not in LAST_STEPS:
            raise unknown_name("last step", last_step, [str(name) for name in LAST_STEPS])
        if num_steps < 2:
            raise ValueError(
                f"num_steps is {num_steps}; it counts grid points, both ends included, so at least 2"
            )
        if not diffusion_norm >= 0:
            raise ValueError(f"diffusion_norm is {diffusion_norm}; give a number >= 0")
        if not 0 <= last_step_size < 1:
            raise ValueError(f"last_step_size is {last_step_size}; give a number in [0, 1)")
        DIFFUSION_FORMS.get(diffusion_form)
        self.method = method
        self.step = step
        self.num_steps = num_steps
        self.diffusion_form = diffusion_form
        self.diffusion_norm = diffusion_norm
        self.last_step = last_step
        self.last_step_size = 0.0 if last_step is None else last_step_size
        self.interval = interval
        self.batch_size = batch_size
        self.num_function_evaluations = 0

    @property
    def num_intervals(self) -> int:
        """Steps with noise: one fewer than grid points."""
        return self.num_steps - 1

    def unfit(self, process: Process) -> str | None:
        """A process without diffusion forms has no SDE of this kind."""
        if self.interval is None and not hasattr(process, "sde_interval"):
            return f"{type(process).__name__} has no diffusion forms: set sample_mode=ODE, or use a sampler of its own"
        return None

    def times(self, process: SdeProcess) -> list[float]:
        """The grid, rising.

        Raises:
            TypeError: the process has no SDE of this kind.
        """
        reason = self.unfit(process)
        if reason is not None:
            raise TypeError(reason)
        if self.interval is not None:
            low, high = self.interval
        else:
            evaluates_end = self.step.evaluates_end or self.last_step is not None
            low, high = process.sde_interval(self.diffusion_form, self.last_step_size, evaluates_end)
        return torch.linspace(low, high, self.num_steps, dtype=torch.float64).tolist()

    def time_range(self, process: SdeProcess) -> TimeRange:
        """From where to where the steps with noise go, and the last step."""
        times = self.times(process)
        return TimeRange(times[0], times[-1], self.last_step)

    @torch.no_grad()
    def sample(
        self,
        process: SdeProcess,
        model: ModelFunction,
        x0: Tensor,
        y: Any = None,
        draws: KeyedDraws | None = None,
        callback: Callback | None = None,
        *,
        noise: NoiseFunction | None = None,
        return_trajectory: bool = False,
    ) -> Tensor:
        """Samples (B, ...) in float32 (float64 for float64 noise) from initial noise x0 (B, ...).

        The noise of step k is ``noise(k, x)`` if given, else ``draws.normal("sample.sde", ..., step=k)``, else from
        the ambient draws, else from torch's generator.

        Returns:
            x1, or with ``return_trajectory`` (num_steps, B, ...): the state after each step, then the result.

        Raises:
            SamplingError: a state is not finite; the step and the samples are named.
        """
        x = x0.to(working_dtype(x0))
        rows = x.shape[0]
        if self.batch_size is not None:
            index = padding_index(rows, self.batch_size, x.device)
            x, y = x[index], map_tensors(lambda part: part[index.to(part.device)], y)
            draws = None if draws is None else draws.select(index.to(draws.ids.device))
        self.num_function_evaluations = 0
        noise = noise or _noise_source(draws)
        times = self.times(process)
        watch = FiniteWatch(x)
        states = []

        def drift(x: Tensor, t: Tensor) -> Tensor:
            output = self._predict(process, model, x, t, y)
            diffusion = process.diffusion(x, t, self.diffusion_form, self.diffusion_norm)
            return process.velocity(output, x, t) + diffusion * process.score(output, x, t)

        for number, (t, t_next) in enumerate(pairwise(times)):
            h = t_next - t
            diffusion = process.diffusion(x, full_time(t, x), self.diffusion_form, self.diffusion_norm)
            spread = (2 * h * diffusion).sqrt() * noise(number, x).to(x)
            x = self.step.advance(drift, x, t, h, spread)
            watch.check(x, number + 1)
            states.append(x if return_trajectory else None)
            if callback is not None:
                callback(number + 1, full_time(t_next, x), x)
        x = self._finish(process, model, drift, x, full_time(times[-1], x), y)
        watch.check(x, self.num_steps, last=True)
        if return_trajectory:
            return torch.stack([*states, x])[:, :rows]
        return x[:rows]

    def _predict(self, process: SdeProcess, model: ModelFunction, x: Tensor, t: Tensor, y: Any) -> Tensor:
        self.num_function_evaluations += 1
        return predict(process, model, x, t, y)

    def _finish(
        self, process: SdeProcess, model: ModelFunction, drift: Drift, x: Tensor, t: Tensor, y: Any
    ) -> Tensor:
        if self.last_step is None:
            return x
        if self.last_step == "Mean":
            return x + self.last_step_size * drift(x, t)
        output = self._predict(process, model, x, t, y)
        if self.last_step == "Tweedie":
            return process.data(output, x, t)
        return x + self.last_step_size * process.velocity(output, x, t)


def _noise_source(draws: KeyedDraws | None) -> NoiseFunction:
    draws = current_draws() if draws is None else draws
    if draws is None:
        return lambda step, x: torch.randn_like(x)
    return lambda step, x: draws.normal("sample.sde", tuple(x.shape[1:]), step=step)
