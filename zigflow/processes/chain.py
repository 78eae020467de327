"""A Markov chain of K noising steps and its Gaussian posteriors, in float64 (Ho et al. 2020, eq. 6-7).

Step i = 0 is nearest to the data; alpha_bar = alpha^2. Tables are (K,) and are picked by steps (B,).
"""

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from .process import Process, over_batch


@dataclass(frozen=True)
class Chain:
    """``times`` (K,) are process times, falling; ``alphas_bar`` (K,) falls too."""

    times: Tensor
    alphas_bar: Tensor

    def __len__(self) -> int:
        return len(self.alphas_bar)

    @cached_property
    def alphas_bar_prev(self) -> Tensor:
        return torch.cat([self.alphas_bar.new_ones(1), self.alphas_bar[:-1]])

    @cached_property
    def alphas_bar_next(self) -> Tensor:
        return torch.cat([self.alphas_bar[1:], self.alphas_bar.new_zeros(1)])

    @cached_property
    def betas(self) -> Tensor:
        return 1 - self.alphas_bar / self.alphas_bar_prev

    @cached_property
    def posterior_variance(self) -> Tensor:
        return self.betas * (1 - self.alphas_bar_prev) / (1 - self.alphas_bar)

    @cached_property
    def posterior_log_variance(self) -> Tensor:
        """Step 0 has variance 0 and takes that of step 1 (its beta in a chain of one step)."""
        first = self.posterior_variance[1:2] if len(self) > 1 else self.betas
        return torch.cat([first, self.posterior_variance[1:]]).log()

    @cached_property
    def data_coefficient(self) -> Tensor:
        """Of the data in the posterior mean."""
        return self.betas * self.alphas_bar_prev.sqrt() / (1 - self.alphas_bar)

    @cached_property
    def state_coefficient(self) -> Tensor:
        """Of x_i in the posterior mean."""
        return (1 - self.alphas_bar_prev) * (1 - self.betas).sqrt() / (1 - self.alphas_bar)

    def at(self, table: Tensor, step: Tensor, x: Tensor) -> Tensor:
        """The entries (B, 1, ...) of a table for steps (B,), in the dtype and on the device of ``x``."""
        return over_batch(table[step.to(table.device)].to(device=x.device, dtype=x.dtype), x)

    def noised(self, x1: Tensor, x0: Tensor, step: Tensor) -> Tensor:
        """x_i = sqrt(alpha_bar) x1 + sqrt(1 - alpha_bar) x0."""
        alpha, sigma = self.alphas_bar.sqrt(), (1 - self.alphas_bar).sqrt()
        return self.at(alpha, step, x1) * x1 + self.at(sigma, step, x1) * x0

    def posterior_mean(self, data: Tensor, x: Tensor, step: Tensor) -> Tensor:
        """The mean of x_{i-1} given x_i and the data."""
        return self.at(self.data_coefficient, step, x) * data + self.at(self.state_coefficient, step, x) * x

    def log_variance(self, variance: str, logits: Tensor | None, x: Tensor, step: Tensor) -> Tensor:
        """Log variance of the model's step x_i -> x_{i-1}, of the shape of x or broadcasting to it.

        Args:
            variance: "learned_range" (``logits`` from -1 to 1 go from the posterior's variance to beta, in logs),
                "fixed_large" (beta) or "fixed_small" (the posterior's).

        Raises:
            ValueError: a learned range without logits.
        """
        if variance == "fixed_small":
            return self.at(self.posterior_log_variance, step, x)
        if variance == "fixed_large":
            first = self.posterior_variance[1:2] if len(self) > 1 else self.betas
            return self.at(torch.cat([first, self.betas[1:]]).log(), step, x)
        if logits is None:
            raise ValueError(
                "variance=learned_range needs a model with twice the channels of its input (learn_sigma=true); use "
                "variance=auto, fixed_large or fixed_small"
            )
        share = (logits + 1) / 2
        smallest = self.at(self.posterior_log_variance, step, x)
        return share * self.at(self.betas.log(), step, x) + (1 - share) * smallest


@runtime_checkable
class ChainProcess(Process, Protocol):
    """A process whose samples can be made step by step, along a Markov chain over some of its times."""

    def chain(self, spacing: str | int | None = None) -> Chain:
        """The chain of the steps that ``spacing`` keeps; ValueError for one that cannot be made."""
        ...

    def backward_step(
        self,
        chain: Chain,
        output: Tensor,
        logits: Tensor | None,
        x: Tensor,
        step: Tensor,
        clip: bool = False,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Mean and log variance of the step from x at ``step`` (B,), and the expected data."""
        ...


@runtime_checkable
class BoundedProcess(ChainProcess, Protocol):
    """A process whose chain has a variational bound of the data's likelihood."""

    def variational_term(
        self,
        chain: Chain,
        output: Tensor,
        logits: Tensor | None,
        x1: Tensor,
        x_t: Tensor,
        step: Tensor,
        clip: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """One term (B,) in bits per dimension, and the expected data."""
        ...

    def prior_term(self, chain: Chain, x1: Tensor) -> Tensor:
        """Bits per dimension (B,) by which the noised data differ from the prior."""
        ...

    def convert(self, value: Tensor, x: Tensor, t: Tensor, target: str, source: str | None = None) -> Tensor:
        """``value``, a ``source`` (default: the process's prediction) at (x, t), as a ``target``."""
        ...


def gaussian_kl(mean1: Tensor, log_variance1: Tensor, mean2: Tensor, log_variance2: Tensor) -> Tensor:
    """KL divergence of two diagonal Gaussians, elementwise, in nats."""
    ratio = (log_variance1 - log_variance2).exp()
    distance = (mean1 - mean2) ** 2 * (-log_variance2).exp()
    return 0.5 * (log_variance2 - log_variance1 - 1 + ratio + distance)


def _normal_cdf(x: Tensor) -> Tensor:
    # The approximation, not erf, is part of the published loss.
    return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def discretized_log_likelihood(x: Tensor, mean: Tensor, log_scale: Tensor) -> Tensor:
    """Log probability, elementwise in nats, of the 8-bit bin of x in [-1, 1] under N(mean, exp(log_scale)^2).

    Bins are 2/255 wide; those of -1 and 1 reach to infinity.
    """
    inverse = (-log_scale).exp()
    upper = _normal_cdf(inverse * (x - mean + 1 / 255))
    lower = _normal_cdf(inverse * (x - mean - 1 / 255))
    middle = torch.where(x > 0.999, 1 - lower, upper - lower)
    return torch.where(x < -0.999, upper, middle).clamp_min(1e-12).log()
