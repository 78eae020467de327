"""Embedded Runge-Kutta pairs that adapt the step of every sample by itself.

A sample's result must not depend on the samples it is batched with. So each row has its own time, step and
error; rows that have arrived stay in the batch (whose size decides the bits of a matrix product) and are
masked; the last step is clipped, so that the model is never asked beyond the end of the interval.

dopri5: Dormand & Prince 1980. bosh3: Bogacki & Shampine 1989. Step control with a PI controller, starting step
and dense output as in Hairer, Norsett & Wanner, "Solving Ordinary Differential Equations I", II.4 and II.6.
Times and steps live in float64 on the CPU; a step costs one transfer of B numbers.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .ode_fixed import weighted_sum
from .solver import (
    ODE_SOLVERS,
    Callback,
    Drift,
    SamplingError,
    Solution,
    SolverSettings,
    full_time,
    name_rows,
)

SAFETY = 0.9
SHRINK, GROW = 0.2, 10.0
SHORTEST = 1e-9
"""Steps shorter than this part of the interval are given up: float32 times cannot tell them apart."""


def _rows(value: Tensor, x: Tensor) -> Tensor:
    """A (B,) float64 tensor of the CPU as (B, 1, ...) in the dtype and on the device of ``x``."""
    return value.to(device=x.device, dtype=x.dtype).reshape(-1, *(1,) * (x.ndim - 1))


def _norm(value: Tensor, scale: Tensor) -> Tensor:
    """Root mean square over a sample's elements, (B,) float64 on the CPU."""
    return (value / scale).flatten(1).pow(2).mean(1).sqrt().cpu().double()


@dataclass(frozen=True)
class EmbeddedPair:
    """A pair whose last stage is the new state (first same as last).

    ``error`` weighs the slopes into the difference of the two results, of which the better is kept; ``dense``
    completes cubic Hermite interpolation to the order that the pair offers (all zero: Hermite itself).
    """

    name: str
    order: int
    a: tuple[tuple[float, ...], ...]
    error: tuple[float, ...]
    dense: tuple[float, ...]
    adaptive: bool = True

    def solve(
        self,
        drift: Drift,
        x: Tensor,
        times: Sequence[float],
        settings: SolverSettings,
        keep: bool = False,
        callback: Callback | None = None,
    ) -> Solution:
        """See :class:`OdeSolver`. Steps do not depend on the inner ``times``, which only ``keep`` reads."""
        return _Run(self, drift, x, times, settings, keep, callback).finish()


class _Run:
    def __init__(
        self,
        pair: EmbeddedPair,
        drift: Drift,
        x: Tensor,
        times: Sequence[float],
        settings: SolverSettings,
        keep: bool,
        callback: Callback | None,
    ):
        self.pair, self.drift, self.settings, self.callback = pair, drift, settings, callback
        self.x, self.times = x, times
        self.start, self.end = times[0], times[-1]
        self.span = abs(self.end - self.start)
        self.sign = 1.0 if self.end > self.start else -1.0
        batch = x.shape[0]
        self.t = torch.full((batch,), self.start, dtype=torch.float64)
        self.done = torch.zeros(batch, dtype=torch.bool)
        self.accepted = torch.zeros(batch, dtype=torch.long)
        self.rejected = torch.zeros(batch, dtype=torch.long)
        self.previous_ratio = torch.full((batch,), 1e-4, dtype=torch.float64)
        self.evaluations = 0
        self.kept = [x.clone() for _ in times] if keep else None

    def slope(self, x: Tensor, t: Tensor) -> Tensor:
        self.evaluations += 1
        # However t + c h is rounded: beyond the end the model need not be defined.
        low, high = min(self.start, self.end), max(self.start, self.end)
        return self.drift(x, t.clamp(low, high).to(full_time(0.0, x)))

    def scale(self, magnitude: Tensor) -> Tensor:
        return self.settings.atol + self.settings.rtol * magnitude

    def finish(self) -> Solution:
        first = self.slope(self.x, self.t)
        bad = ~torch.isfinite(first).flatten(1).all(1).cpu()
        if bad.any():
            raise SamplingError(
                f"{self.pair.name}: the drift is not finite at the start, t = {self.start:g}, in {name_rows(bad)}"
            )
        h = self.first_step(first)
        number = 0
        while not self.done.all():
            number += 1
            if number > self.settings.max_steps:
                raise SamplingError(
                    f"{self.pair.name} took {self.settings.max_steps} steps and {name_rows(~self.done)} have not "
                    f"arrived (the slowest is at t = {self.slowest():.6g}) at atol {self.settings.atol:g}, "
                    f"rtol {self.settings.rtol:g}; loosen the tolerance or raise max_steps"
                )
            first, h = self.advance(first, h)
            if self.callback is not None:
                self.callback(number, self.t.to(full_time(0.0, self.x)), self.x)
        trajectory = None if self.kept is None else torch.stack(self.kept)
        return Solution(self.x, self.evaluations, trajectory, self.accepted, self.rejected)

    def slowest(self) -> float:
        return float((self.t[~self.done] * self.sign).min() * self.sign)

    def first_step(self, slope: Tensor) -> Tensor:
        """A step (B,) at which the error of an explicit Euler step is small (Hairer et al., II.4)."""
        x = self.x
        scale = self.scale(x.abs())
        size, rate = _norm(x, scale), _norm(slope, scale)
        trial = torch.where((size < 1e-5) | (rate < 1e-5), 1e-6 * self.span, 0.01 * size / rate)
        trial = trial.clamp(1e-6 * self.span, self.span)
        moved = x + _rows(trial * self.sign, x) * slope
        bend = _norm(self.slope(moved, self.t + trial * self.sign) - slope, scale) / trial
        largest = torch.maximum(rate, bend)
        guess = torch.where(largest > 1e-15, (0.01 / largest).pow(1 / self.pair.order), trial * 1e-3)
        guess = torch.where(torch.isfinite(guess), guess, trial)
        return torch.minimum(100 * trial, guess).clamp(1e-6 * self.span, self.span)

    def advance(self, first: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        """Try one step for every row that has not arrived; returns the slopes and steps to go on with."""
        x, t = self.x, self.t
        left = (self.end - t) * self.sign
        last = h >= left * (1 - 1e-9)
        tried = torch.where(self.done, 0.0, torch.where(last, left, h))
        h_rows = _rows(tried * self.sign, x)
        slopes, stage = [first], x
        for weights in self.pair.a:
            stage = x + h_rows * weighted_sum(weights, slopes)
            slopes.append(self.slope(stage, t + tried * self.sign * sum(weights)))
        error = h_rows * weighted_sum(self.pair.error, slopes)
        ratio = _norm(error, self.scale(torch.maximum(x.abs(), stage.abs())))
        taken = (ratio <= 1) & ~self.done
        refused = ~taken & ~self.done
        reached = torch.where(last, self.end, t + tried * self.sign)
        if self.kept is not None:
            self.interpolate(taken, t, reached, x, stage, slopes, h_rows)

        pick = taken.to(x.device).reshape(-1, *(1,) * (x.ndim - 1))
        self.x = torch.where(pick, stage, x)
        self.t = torch.where(taken, reached, t)
        self.done = self.done | (taken & last)
        self.accepted += taken
        self.rejected += refused
        h_next = torch.where(taken, tried * self.growth(ratio), tried * self.shrinkage(ratio))
        self.previous_ratio = torch.where(taken, ratio.clamp_min(1e-4), self.previous_ratio)
        vanishing = refused & (h_next < SHORTEST * self.span)
        if vanishing.any():
            where = float(self.t[vanishing][0])
            raise SamplingError(
                f"{self.pair.name}: the step of {name_rows(vanishing)} fell below {SHORTEST * self.span:.1e} near "
                f"t = {where:.6g} at atol {self.settings.atol:g}, rtol {self.settings.rtol:g}. The drift is not "
                "finite or jumps there, or the tolerance is finer than the state's precision"
            )
        return torch.where(pick, slopes[-1], first), torch.where(self.done, 0.0, h_next)

    def growth(self, ratio: Tensor) -> Tensor:
        beta = 0.2 / self.pair.order
        power = 1 / self.pair.order - 0.75 * beta
        factor = SAFETY * ratio.clamp_min(1e-10).pow(-power) * self.previous_ratio.pow(beta)
        return factor.clamp(SHRINK, GROW)

    def shrinkage(self, ratio: Tensor) -> Tensor:
        factor = (SAFETY * ratio.pow(-1 / self.pair.order)).clamp(SHRINK, 1.0)
        return torch.where(torch.isfinite(ratio), factor, 0.1)

    def interpolate(
        self,
        taken: Tensor,
        t: Tensor,
        reached: Tensor,
        x: Tensor,
        x_next: Tensor,
        slopes: list[Tensor],
        h_rows: Tensor,
    ) -> None:
        """Fill the kept states whose times lie in the step that a row has just taken."""
        rise = x_next - x
        bow = h_rows * slopes[0] - rise
        correction = h_rows * weighted_sum(self.pair.dense, slopes) if any(self.pair.dense) else None
        kept = self.kept or []
        for index, time in enumerate(self.times):
            inside = taken & ((time - t) * self.sign > 0) & ((reached - time) * self.sign >= 0)
            if not inside.any():
                continue
            theta = _rows(torch.where(inside, (time - t) / torch.where(inside, reached - t, 1.0), 0.0), x)
            inner = rise - h_rows * slopes[-1] - bow
            if correction is not None:
                inner = inner + (1 - theta) * correction
            value = x + theta * (rise + (1 - theta) * (bow + theta * inner))
            pick = inside.to(x.device).reshape(-1, *(1,) * (x.ndim - 1))
            kept[index] = torch.where(pick, value, kept[index])


DOPRI5 = EmbeddedPair(
    "dopri5",
    5,
    a=(
        (1 / 5,),
        (3 / 40, 9 / 40),
        (44 / 45, -56 / 15, 32 / 9),
        (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729),
        (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656),
        (35 / 384, 0.0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84),
    ),
    error=(71 / 57600, 0.0, -71 / 16695, 71 / 1920, -17253 / 339200, 22 / 525, -1 / 40),
    dense=(
        -12715105075 / 11282082432,
        0.0,
        87487479700 / 32700410799,
        -10690763975 / 1880347072,
        701980252875 / 199316789632,
        -1453857185 / 822651844,
        69997945 / 29380423,
    ),
)
BOSH3 = EmbeddedPair(
    "bosh3",
    3,
    a=((1 / 2,), (0.0, 3 / 4), (2 / 9, 1 / 3, 4 / 9)),
    error=(-5 / 72, 1 / 12, 1 / 9, -1 / 8),
    dense=(0.0, 0.0, 0.0, 0.0),
)
for _pair in (DOPRI5, BOSH3):
    ODE_SOLVERS.register(_pair.name, _pair)
