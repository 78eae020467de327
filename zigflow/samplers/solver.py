"""What the samplers share: the registries, the result of a run, and the watch for non-finite states.

Shapes: B batch; a state x is (B, ...), times t are (B,); every solver works on any trailing shape.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from zigflow.errors import ZigflowError
from zigflow.processes import Process, predict
from zigflow.processes.process import ModelFunction
from zigflow.registry import Registry

Drift = Callable[[Tensor, Tensor], Tensor]
"""``drift(x, t) -> dx/dt`` with x (B, ...) and t (B,)."""

Callback = Callable[[int, Tensor, Tensor], None]
"""``callback(step, t, x)`` after each step: its number from 1, the times (B,) reached and the state."""


class SamplingError(ZigflowError, RuntimeError):
    """A run that cannot go on: a non-finite state, a vanishing step, too many steps."""


@dataclass(frozen=True)
class Solution:
    """The end of a run. ``accepted`` and ``rejected`` count steps per sample, for solvers that adapt them."""

    x: Tensor
    num_function_evaluations: int
    trajectory: Tensor | None = None
    accepted: Tensor | None = None
    rejected: Tensor | None = None


@dataclass(frozen=True)
class TimeRange:
    """Process times (0 noise, 1 data) at which a run starts and stops, as results record them.

    ``last_step`` names what then covers the rest of the way to the data; None: the noise of the time ``stop`` stays.
    """

    start: float
    stop: float
    last_step: str | None = None


@dataclass(frozen=True)
class SolverSettings:
    """Tolerances (per sample, on the root mean square over its elements) and the limit on steps."""

    atol: float = 1e-6
    rtol: float = 1e-3
    max_steps: int = 10_000


class OdeSolver(Protocol):
    """A method for dx/dt = drift(x, t). ``order``: the global error is O(h^order); None where unknown."""

    @property
    def name(self) -> str: ...

    @property
    def order(self) -> int | None: ...

    @property
    def adaptive(self) -> bool: ...

    def solve(
        self,
        drift: Drift,
        x: Tensor,
        times: Sequence[float],
        settings: SolverSettings,
        keep: bool = False,
        callback: Callback | None = None,
    ) -> Solution:
        """Integrate from times[0] to times[-1], rising or falling.

        ``keep`` stores the states at all of ``times`` as ``Solution.trajectory``, (len(times), B, ...).

        Raises:
            SamplingError: see the class.
        """
        ...


class Sampler(Protocol):
    """What makes samples of noise under a process. ``num_function_evaluations`` counts the model's calls of a run.

    A sampler that can do more says so by having the method: ``encode`` (data to noise), ``log_likelihood`` (by the ODE)
    or ``bound`` (the variational bound), see :class:`~zigflow.samplers.OdeSampler` and
    :class:`~zigflow.samplers.ChainSampler`.
    """

    num_function_evaluations: int

    def time_range(self, process: Any) -> TimeRange:
        """From where to where a run goes, and its last step."""
        ...

    def unfit(self, process: Process) -> str | None:
        """Why this sampler cannot run under ``process``, in one line that says what to do, or None."""
        ...

    def sample(
        self,
        process: Any,
        model: ModelFunction,
        x0: Tensor,
        y: Any = None,
        draws: Any = None,
        callback: Callback | None = None,
    ) -> Tensor:
        """Samples (B, ...) from initial noise x0 (B, ...)."""
        ...


ODE_SOLVERS: Registry[OdeSolver] = Registry("ODE method")
"""What ``ode.sampling_method`` names."""

DIFFUSION_SAMPLERS: Registry[Callable[..., Sampler]] = Registry("diffusion sampler")
"""What ``diffusion.sampling_method`` names: called with the keys of the group ``diffusion`` that are its keywords."""


def full_time(t: float, x: Tensor) -> Tensor:
    """A shared time as (B,), float64 for a float64 state, else float32."""
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    return torch.full((x.shape[0],), t, dtype=dtype, device=x.device)


def last_step_to_data(
    process: Process,
    model: ModelFunction,
    x: Tensor,
    t: float,
    y: Any,
    number: int,
    callback: Callback | None,
) -> Tensor:
    """The data (B, ...) that the model expects at states x (B, ...) of time t, as step ``number`` of a run.

    The end of a chain (DDIM's last step), for solvers whose interval ends before the data; one call of the model.

    Raises:
        SamplingError: the result is not finite.
    """
    wide = torch.float32 if x.device.type == "mps" else torch.float64
    time = torch.full((x.shape[0],), t, dtype=wide, device=x.device)
    data = process.data(predict(process, model, x, time, y), x, time)
    FiniteWatch(data).check(data, number, last=True)
    if callback is not None:
        callback(number, full_time(1.0, data), data)
    return data


def name_rows(rows: Tensor, limit: int = 8) -> str:
    """'3 of 16 samples (rows 0, 4, 9)' for a (B,) mask."""
    index = rows.nonzero().flatten().tolist()
    listed = ", ".join(map(str, index[:limit])) + (", ..." if len(index) > limit else "")
    return f"{len(index)} of {rows.shape[0]} samples (rows {listed})"


class FiniteWatch:
    """Notes the first step at which each sample stops being finite, and raises.

    On an accelerator a look at the result makes the host wait, so it is taken every 25 steps and at the end.
    """

    def __init__(self, x: Tensor):
        self.first_bad = torch.full((x.shape[0],), -1, dtype=torch.long, device=x.device)
        self.every = 1 if x.device.type == "cpu" else 25

    def check(self, x: Tensor, step: int, last: bool = False) -> None:
        """Raises:
        SamplingError: some sample is not finite; the message names the first such step and the samples.
        """
        bad = ~torch.isfinite(x).flatten(1).all(1)
        self.first_bad = torch.where(bad & (self.first_bad < 0), step, self.first_bad)
        if not last and step % self.every:
            return
        found = (self.first_bad >= 0).cpu()
        if found.any():
            first = int(self.first_bad.cpu()[found].min())
            raise SamplingError(
                f"sampling became non-finite at step {first} in {name_rows(found)}. Look at the model's output there, "
                "its precision, and whether the interval ends where the process is singular (sample_eps, "
                "last_step_size)"
            )
