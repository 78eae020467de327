"""Noise schedules of diffusion processes, in float64: tables of betas, subsets of steps, and log alpha of a time.

Here a time s runs from 0 (data) to 1 (noise), as in the papers; x_s = alpha x1 + sigma x0, alpha^2 + sigma^2 = 1.
Ho et al. 2020 (linear), Nichol & Dhariwal 2021 (cosine, respacing), Song et al. 2021 (continuous), Rombach et al.
2022 (scaled linear), Lu et al. 2022 (a table as a continuous schedule).
"""

import math
from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from zigflow.registry import Registry

BETAS: Registry[Callable[[int], Tensor]] = Registry("beta schedule")
"""``betas(num_steps) -> (num_steps,)`` in float64."""


@BETAS.register("linear")
def linear_betas(num_steps: int) -> Tensor:
    """1e-4 to 0.02, scaled so that another number of steps than 1000 ends at the same noise."""
    scale = 1000 / num_steps
    return torch.linspace(1e-4 * scale, 0.02 * scale, num_steps, dtype=torch.float64)


@BETAS.register("cosine")
def cosine_betas(num_steps: int) -> Tensor:
    """alpha_bar(s) = cos^2((s + 0.008) / 1.008 pi / 2), no beta above 0.999."""
    s = torch.arange(num_steps + 1, dtype=torch.float64) / num_steps
    alpha_bar = torch.cos((s + 0.008) / 1.008 * math.pi / 2) ** 2
    return (1 - alpha_bar[1:] / alpha_bar[:-1]).clamp_max(0.999)


# The published name.
BETAS.register("squaredcos_cap_v2", cosine_betas)


@BETAS.register("scaled_linear")
def scaled_linear_betas(num_steps: int) -> Tensor:
    """Stable Diffusion: linear in the square root, 0.00085 to 0.012."""
    return _quadratic(num_steps, 0.00085, 0.012)


@BETAS.register("quad")
def quadratic_betas(num_steps: int) -> Tensor:
    return _quadratic(num_steps, 1e-4, 0.02)


def _quadratic(num_steps: int, first: float, last: float) -> Tensor:
    return torch.linspace(first**0.5, last**0.5, num_steps, dtype=torch.float64) ** 2


@BETAS.register("const")
def constant_betas(num_steps: int) -> Tensor:
    return torch.full((num_steps,), 0.02, dtype=torch.float64)


@BETAS.register("jsd")
def jsd_betas(num_steps: int) -> Tensor:
    """1/T, 1/(T-1), ..., 1."""
    return 1 / torch.linspace(num_steps, 1, num_steps, dtype=torch.float64)


def warmup_betas(num_steps: int, fraction: float) -> Tensor:
    """0.02 after a linear warm-up from 1e-4 over a fraction of the steps."""
    betas = constant_betas(num_steps)
    warm = int(num_steps * fraction)
    betas[:warm] = torch.linspace(1e-4, 0.02, warm, dtype=torch.float64)
    return betas


BETAS.register("warmup10", lambda num_steps: warmup_betas(num_steps, 0.1))
BETAS.register("warmup50", lambda num_steps: warmup_betas(num_steps, 0.5))


def spaced_steps(num_steps: int, spacing: str | int | None) -> list[int]:
    """The steps, ascending, that a shorter chain keeps of 0..num_steps-1.

    Args:
        spacing: None or "": all; "250": so many, evenly spread, both ends among them; "ddim50": so many at an
            integer stride from 0; "10,15,20": so many of each of that many equal sections.

    Raises:
        ValueError: the spacing cannot be read, or asks for more steps than there are.
    """
    text = "" if spacing is None else str(spacing).strip()
    if not text:
        return list(range(num_steps))
    if text.startswith("ddim"):
        return _strided_steps(num_steps, text)
    try:
        counts = [int(part) for part in text.split(",")]
    except ValueError:
        counts = []
    if not counts or min(counts) < 1:
        raise ValueError(
            f"the spacing {spacing!r} names no steps; give a number such as 250, 'ddim50', or sections '10,15,20'"
        )
    kept: list[int] = []
    start = 0
    for number, count in enumerate(counts):
        size = num_steps // len(counts) + (number < num_steps % len(counts))
        if count > size:
            raise ValueError(
                f"the spacing {spacing!r} asks for {count} of the {size} steps of a section of {num_steps}; give fewer"
            )
        stride = (size - 1) / (count - 1) if count > 1 else 1.0
        place = 0.0
        for _ in range(count):
            # Added up and rounded to even, as published: other sums differ in some steps.
            kept.append(start + round(place))
            place += stride
        start += size
    return sorted(set(kept))


def _strided_steps(num_steps: int, text: str) -> list[int]:
    wanted = text.removeprefix("ddim")
    if wanted.isdecimal():
        for stride in range(1, num_steps):
            if len(range(0, num_steps, stride)) == int(wanted):
                return list(range(0, num_steps, stride))
    raise ValueError(
        f"the spacing {text!r}: no integer stride makes that many of {num_steps} steps; give another number, or it "
        "without 'ddim'"
    )


class Schedule(Protocol):
    """log alpha as a function of s; all methods keep the shape and the dtype of their tensor."""

    def log_alpha(self, s: Tensor) -> Tensor: ...

    def rate(self, s: Tensor) -> Tensor:
        """-d log alpha / ds, which is beta(s) / 2."""
        ...

    def time_of_log_alpha(self, log_alpha: Tensor) -> Tensor: ...


class LinearBeta:
    """beta(s) = beta_min + s (beta_max - beta_min) (Song et al. 2021, eq. 32).

    Raises:
        ValueError: a rate that is not positive, at which no noise is added.
    """

    def __init__(self, beta_min: float = 0.1, beta_max: float = 20.0):
        if not (beta_min > 0 and beta_max > 0):
            raise ValueError(f"beta_min is {beta_min} and beta_max {beta_max}; give positive numbers")
        self.beta_min = beta_min
        self.beta_max = beta_max

    def log_alpha(self, s: Tensor) -> Tensor:
        return -0.25 * (self.beta_max - self.beta_min) * s**2 - 0.5 * self.beta_min * s

    def rate(self, s: Tensor) -> Tensor:
        return 0.5 * (self.beta_min + s * (self.beta_max - self.beta_min))

    def time_of_log_alpha(self, log_alpha: Tensor) -> Tensor:
        half_min = 0.5 * self.beta_min
        root = (half_min**2 - (self.beta_max - self.beta_min) * log_alpha).sqrt()
        return -2 * log_alpha / (half_min + root)


class Cosine:
    """alpha(s) = cos((s + offset) / (1 + offset) pi / 2), divided by alpha(0). At s = 1 alpha is 0."""

    noise_end = 0.9946

    def __init__(self, offset: float = 0.008):
        self.offset = offset
        self._log_first = math.log(math.cos(self._angle_per_time() * offset))

    def _angle_per_time(self) -> float:
        return math.pi / 2 / (1 + self.offset)

    def _angle(self, s: Tensor) -> Tensor:
        return self._angle_per_time() * (s + self.offset)

    def log_alpha(self, s: Tensor) -> Tensor:
        # Rounded, the difference could exceed 0 at s = 0, and 1 - alpha^2 have no root.
        return (torch.cos(self._angle(s)).log() - self._log_first).clamp_max(0)

    def rate(self, s: Tensor) -> Tensor:
        return self._angle_per_time() * torch.tan(self._angle(s))

    def time_of_log_alpha(self, log_alpha: Tensor) -> Tensor:
        return torch.acos((log_alpha + self._log_first).exp()) / self._angle_per_time() - self.offset


SCHEDULES: Registry[Callable[[float, float], Schedule]] = Registry("schedule of a continuous diffusion")
"""What ``process.schedule`` names: ``schedule(beta_min, beta_max)``, which one without betas ignores. A schedule's
``noise_end`` is the time s, 1 if it has none, beyond which there is no score."""

SCHEDULES.register("linear", LinearBeta)


@SCHEDULES.register("cosine")
def _cosine(beta_min: float, beta_max: float) -> Cosine:
    return Cosine()


class Table:
    """log alpha linear between the steps of a table: step n, from 0 on, lies at s = (n + 1) / N.

    Args:
        betas: (N,) in float64.

    Raises:
        ValueError: a beta outside (0, 1), after which no noise schedule goes on.
    """

    def __init__(self, betas: Tensor):
        if not bool(((betas > 0) & (betas < 1)).all()):
            raise ValueError(
                f"betas must lie between 0 and 1, both excluded, and run from {float(betas.min()):g} to "
                f"{float(betas.max()):g}; choose another schedule"
            )
        self.values = 0.5 * torch.cumsum(torch.log1p(-betas.double()), 0)

    def _segment(self, place: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """For places in units of steps: the distance from the step below, log alpha there, its change to the next."""
        values = self.values.to(place)
        below = place.floor().clamp(0, len(values) - 2).long()
        return place - below, values[below], values[below + 1] - values[below]

    def log_alpha(self, s: Tensor) -> Tensor:
        distance, value, change = self._segment(s * len(self.values) - 1)
        return value + distance * change

    def rate(self, s: Tensor) -> Tensor:
        return -self._segment(s * len(self.values) - 1)[2] * len(self.values)

    def time_of_log_alpha(self, log_alpha: Tensor) -> Tensor:
        falling = -self.values.to(log_alpha)
        below = (torch.searchsorted(falling, -log_alpha.contiguous()) - 1).clamp(0, len(falling) - 2)
        change = falling[below + 1] - falling[below]
        return (below + (-log_alpha - falling[below]) / change + 1) / len(falling)
