"""Laws of the training time, as inverse distribution functions on the training interval.

A law is a function of uniforms, so that keyed uniforms give the same times on every machine and batch layout.
"""

import math
from abc import ABC, abstractmethod

import torch
from torch import Tensor

from zigflow.registry import Registry


class TimeLaw(ABC):
    """Maps u in [0, 1) to a time in [low, high], increasing in u. Laws without a logit ignore its moments."""

    def __init__(self, logit_mean: float = 0.0, logit_std: float = 1.0):
        self.mean = logit_mean
        self.std = logit_std

    @abstractmethod
    def quantile(self, u: Tensor, low: float, high: float) -> Tensor: ...


TIME_LAWS: Registry[type[TimeLaw]] = Registry("time law")


@TIME_LAWS.register("uniform")
class Uniform(TimeLaw):
    def quantile(self, u: Tensor, low: float, high: float) -> Tensor:
        return u * (high - low) + low


@TIME_LAWS.register("logit_normal")
class LogitNormal(TimeLaw):
    """t = sigmoid(z), z ~ N(mean, std^2), given low <= t <= high (Esser et al. 2024, section 3.1).

    Raises:
        ValueError: the mean is not finite, or the standard deviation not positive and finite.
    """

    def __init__(self, logit_mean: float = 0.0, logit_std: float = 1.0):
        super().__init__(logit_mean, logit_std)
        if not logit_std > 0 or not math.isfinite(logit_std) or not math.isfinite(logit_mean):
            raise ValueError(
                f"logit_mean is {logit_mean} and logit_std {logit_std}; give a finite mean and a positive, "
                "finite standard deviation"
            )

    def _probability_below(self, t: float) -> float:
        if t <= 0 or t >= 1:
            return float(t >= 1)
        z = (math.log(t) - math.log1p(-t) - self.mean) / self.std
        return 0.5 * math.erfc(-z / math.sqrt(2))

    def quantile(self, u: Tensor, low: float, high: float) -> Tensor:
        below, upto = self._probability_below(low), self._probability_below(high)
        # Apple's GPU has no float64; elsewhere the tails of the quantile function deserve it.
        wide = u.float() if u.device.type == "mps" else u.double()
        z = torch.special.ndtri(below + wide * (upto - below))
        return torch.sigmoid(self.mean + self.std * z).clamp(low, high)
