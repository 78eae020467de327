"""Paths x_t = alpha(t) x1 + sigma(t) x0 from noise x0 (t = 0) to data x1 (t = 1), and their closed forms.

Albergo, Boffi & Vanden-Eijnden, "Stochastic Interpolants" (2023); Ma et al., "SiT" (2024), section 2.
With W = alpha sigma' - alpha' sigma (never zero inside a path), the predictions are linear in one another:

    velocity v = alpha' x1 + sigma' x0        score s = -x0 / sigma
    noise  x0 = (alpha v - alpha' x) / W      data x1 = (sigma' x - sigma v) / W

Every method takes a tensor of times in [0, 1] of any shape and keeps its shape and dtype. Quotients follow from alpha
and sigma, and are written out for the paths here, because at an end point alpha or sigma is zero while the quotient
is often finite.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import cached_property
from typing import Protocol, TypeGuard

import torch
from torch import Tensor

from zigflow.registry import Registry

from .predictions import PREDICTIONS, conversion
from .process import Process
from .schedules import LinearBeta, Schedule

HALF_PI = math.pi / 2
# The predictions whose conversions stand in ``Interpolant.coefficients``.
_WRITTEN_OUT = {"velocity", "score", "noise", "data"}


class Interpolant(ABC):
    """One path: alpha, sigma, their time derivatives, and the quotients that the conversions need.

    A path is defined by ``alpha`` and ``sigma``; all else follows from them. The paths below write the rest out, which
    is exact at ends where the derived form is zero over zero.
    """

    @abstractmethod
    def alpha(self, t: Tensor) -> Tensor: ...

    @abstractmethod
    def sigma(self, t: Tensor) -> Tensor: ...

    @cached_property
    def noise_end_is_singular(self) -> bool:
        """alpha(0) = 0: noise, score and data predictions do not determine the velocity at t = 0."""
        return float(self.alpha(torch.zeros(1, dtype=torch.float64))) == 0

    @cached_property
    def ends_are_regular(self) -> bool:
        """alpha' and sigma' are finite at t = 0 and t = 1, and so is a velocity."""
        ends = torch.tensor([0.0, 1.0], dtype=torch.float64)
        return bool(torch.isfinite(torch.stack([self.d_alpha(ends), self.d_sigma(ends)])).all())

    def d_alpha(self, t: Tensor) -> Tensor:
        return _derivative(self.alpha, t)

    def d_sigma(self, t: Tensor) -> Tensor:
        return _derivative(self.sigma, t)

    def wronskian(self, t: Tensor) -> Tensor:
        """W = alpha sigma' - alpha' sigma."""
        return self.alpha(t) * self.d_sigma(t) - self.d_alpha(t) * self.sigma(t)

    def d_alpha_over_alpha(self, t: Tensor) -> Tensor:
        """alpha' / alpha; infinite at t = 0 where alpha(0) = 0."""
        return self.d_alpha(t) / self.alpha(t)

    def d_sigma_over_sigma(self, t: Tensor) -> Tensor:
        """sigma' / sigma; minus infinity at t = 1."""
        return self.d_sigma(t) / self.sigma(t)

    def score_gain(self, t: Tensor) -> Tensor:
        """The factor g in v = (alpha'/alpha) x + g s: g = (alpha'/alpha) sigma^2 - sigma sigma'."""
        return -self.wronskian(t) * self.sigma(t) / self.alpha(t)

    def noise_gain(self, t: Tensor) -> Tensor:
        """The factor W / alpha in v = (alpha'/alpha) x + (W/alpha) x0."""
        return self.wronskian(t) / self.alpha(t)

    def data_gain(self, t: Tensor) -> Tensor:
        """The factor -W / sigma in v = (sigma'/sigma) x - (W/sigma) x1."""
        return -self.wronskian(t) / self.sigma(t)

    def split_velocity(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(a, b, c, d) with data = a x + b v and noise = c x + d v, finite on all of [0, 1]."""
        whole = self.wronskian(t)
        alpha, sigma = self.alpha(t), self.sigma(t)
        return self.d_sigma(t) / whole, -sigma / whole, -self.d_alpha(t) / whole, alpha / whole

    def time_of_log_snr(self, log_snr: Tensor) -> Tensor:
        """The time at which log(alpha^2 / sigma^2) has the given value (the inverse of :meth:`log_snr`)."""
        low, high = torch.zeros_like(log_snr), torch.ones_like(log_snr)
        # Halving ends at neighboring numbers of the dtype; log_snr rises with t.
        for _ in range(64 if log_snr.dtype == torch.float64 else 32):
            middle = (low + high) / 2
            below = self.log_snr(middle) < log_snr
            low, high = torch.where(below, middle, low), torch.where(below, high, middle)
        return (low + high) / 2

    def log_snr(self, t: Tensor) -> Tensor:
        """log(alpha^2 / sigma^2); it rises from -inf (or a finite start) to +inf."""
        return 2 * (self.alpha(t).log() - self.sigma(t).log())

    def coefficients(self, source: str, target: str, t: Tensor) -> tuple[Tensor, Tensor]:
        """(p, q) with target = p x + q source, for two names in PREDICTIONS.

        Raises:
            UnknownNameError: a prediction that does not exist.
        """
        for name in (source, target):
            PREDICTIONS.get(name)
        zero = torch.zeros_like(t)
        if source == target:
            return zero, torch.ones_like(t)
        if not {source, target} <= _WRITTEN_OUT:
            return conversion(self, source, target, t)
        if target == "velocity":
            if source == "data":
                return self.d_sigma_over_sigma(t), self.data_gain(t)
            return self.d_alpha_over_alpha(t), self.score_gain(t) if source == "score" else self.noise_gain(t)
        alpha, sigma = self.alpha(t), self.sigma(t)
        if source == "velocity":
            data_x, data_v, noise_x, noise_v = self.split_velocity(t)
            if target == "data":
                return data_x, data_v
            return (noise_x, noise_v) if target == "noise" else (-noise_x / sigma, -noise_v / sigma)
        if source == "data":
            if target == "noise":
                return 1 / sigma, -alpha / sigma
            return -1 / sigma**2, alpha / sigma**2
        if target == "data":
            return 1 / alpha, sigma**2 / alpha if source == "score" else -sigma / alpha
        return zero, -sigma if source == "score" else -1 / sigma


def _derivative(function: Callable[[Tensor], Tensor], t: Tensor) -> Tensor:
    """The derivative of an elementwise function at t, in any mode of autograd."""
    return torch.func.jvp(function, (t,), (torch.ones_like(t),))[1]


INTERPOLANTS: Registry[type[Interpolant]] = Registry("path type")
"""What ``train.path_type`` names: classes that are built without arguments."""


@INTERPOLANTS.register("Linear")
class Linear(Interpolant):
    """alpha = t, sigma = 1 - t: straight paths (rectified flow, Liu et al. 2022; Lipman et al. 2022)."""

    def alpha(self, t: Tensor) -> Tensor:
        return t

    def d_alpha(self, t: Tensor) -> Tensor:
        return torch.ones_like(t)

    def sigma(self, t: Tensor) -> Tensor:
        return 1 - t

    def d_sigma(self, t: Tensor) -> Tensor:
        return -torch.ones_like(t)

    def d_alpha_over_alpha(self, t: Tensor) -> Tensor:
        return 1 / t

    def d_sigma_over_sigma(self, t: Tensor) -> Tensor:
        return -1 / (1 - t)

    def score_gain(self, t: Tensor) -> Tensor:
        return (1 - t) / t

    def noise_gain(self, t: Tensor) -> Tensor:
        return -1 / t

    def data_gain(self, t: Tensor) -> Tensor:
        return 1 / (1 - t)

    def split_velocity(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        one = torch.ones_like(t)
        return one, 1 - t, one, -t

    def time_of_log_snr(self, log_snr: Tensor) -> Tensor:
        return torch.sigmoid(log_snr / 2)


@INTERPOLANTS.register("GVP")
class GVP(Interpolant):
    """alpha = sin(pi t / 2), sigma = cos(pi t / 2): generalised variance preserving (SiT, section 2)."""

    # cos(pi t / 2) is taken as sin(pi (1 - t) / 2): exactly zero at t = 1 and accurate beside it.
    def _cos(self, t: Tensor) -> Tensor:
        return torch.sin(HALF_PI * (1 - t))

    def alpha(self, t: Tensor) -> Tensor:
        return torch.sin(HALF_PI * t)

    def d_alpha(self, t: Tensor) -> Tensor:
        return HALF_PI * self._cos(t)

    def sigma(self, t: Tensor) -> Tensor:
        return self._cos(t)

    def d_sigma(self, t: Tensor) -> Tensor:
        return -HALF_PI * torch.sin(HALF_PI * t)

    def d_alpha_over_alpha(self, t: Tensor) -> Tensor:
        return HALF_PI * self._cos(t) / torch.sin(HALF_PI * t)

    def d_sigma_over_sigma(self, t: Tensor) -> Tensor:
        return -HALF_PI * torch.sin(HALF_PI * t) / self._cos(t)

    def score_gain(self, t: Tensor) -> Tensor:
        return self.d_alpha_over_alpha(t)

    def noise_gain(self, t: Tensor) -> Tensor:
        return -HALF_PI / torch.sin(HALF_PI * t)

    def data_gain(self, t: Tensor) -> Tensor:
        return HALF_PI / self._cos(t)

    def split_velocity(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        sin, cos = torch.sin(HALF_PI * t), self._cos(t)
        return sin, cos / HALF_PI, cos, -sin / HALF_PI

    def time_of_log_snr(self, log_snr: Tensor) -> Tensor:
        return torch.atan(torch.exp(log_snr / 2)) / HALF_PI


class VP(Interpolant):
    """Variance preserving with beta linear in 1 - t (Song et al. 2021, eq. 32, time reversed), or any schedule.

    log alpha = -(beta_max - beta_min) (1-t)^2 / 4 - beta_min (1-t) / 2, sigma^2 = 1 - alpha^2.
    alpha(0) is small but not zero, so t = 0 is regular; sigma' is infinite at t = 1.
    """

    def __init__(self, beta_min: float = 0.1, beta_max: float = 20.0, schedule: Schedule | None = None):
        self.schedule = LinearBeta(beta_min, beta_max) if schedule is None else schedule

    def _log_alpha(self, t: Tensor) -> Tensor:
        return self.schedule.log_alpha(1 - t)

    def alpha(self, t: Tensor) -> Tensor:
        return self._log_alpha(t).exp()

    def d_alpha(self, t: Tensor) -> Tensor:
        return self.alpha(t) * self.d_alpha_over_alpha(t)

    def sigma(self, t: Tensor) -> Tensor:
        return self._variance(t).sqrt()

    def _variance(self, t: Tensor) -> Tensor:
        return -torch.expm1(2 * self._log_alpha(t))

    def d_sigma(self, t: Tensor) -> Tensor:
        return -self.alpha(t) * self.d_alpha(t) / self.sigma(t)

    def d_alpha_over_alpha(self, t: Tensor) -> Tensor:
        return self.schedule.rate(1 - t)

    def d_sigma_over_sigma(self, t: Tensor) -> Tensor:
        return -self.alpha(t) * self.d_alpha(t) / self._variance(t)

    def score_gain(self, t: Tensor) -> Tensor:
        return self.d_alpha_over_alpha(t)

    def noise_gain(self, t: Tensor) -> Tensor:
        return -self.d_alpha_over_alpha(t) / self.sigma(t)

    def data_gain(self, t: Tensor) -> Tensor:
        return self.d_alpha(t) / self._variance(t)

    def split_velocity(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        sigma = self.sigma(t)
        return self.alpha(t), self._variance(t) / self.d_alpha(t), sigma, -sigma / self.d_alpha_over_alpha(t)

    def log_snr(self, t: Tensor) -> Tensor:
        return 2 * self._log_alpha(t) - self._variance(t).log()

    def time_of_log_snr(self, log_snr: Tensor) -> Tensor:
        return 1 - self.schedule.time_of_log_alpha(0.5 * torch.nn.functional.logsigmoid(log_snr))


INTERPOLANTS.register("VP", VP)


class PathProcess(Process, Protocol):
    """A process whose states are alpha(t) x1 + sigma(t) x0 along an interpolant."""

    path: Interpolant

    def convert(self, value: Tensor, x: Tensor, t: Tensor, target: str, source: str | None = None) -> Tensor:
        """A prediction (B, ...) as another one; ``source`` None: the process's own."""
        ...


def has_path(process: Process) -> TypeGuard[PathProcess]:
    """Whether the process has a path of alpha and sigma."""
    return getattr(process, "path", None) is not None
