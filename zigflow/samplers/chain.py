"""Sampling a discrete chain step by step: ancestral (DDPM) and DDIM with any eta, its inversion, and the bound.

Ho et al. 2020; Song, Meng & Ermon 2021 (DDIM); Nichol & Dhariwal 2021 (learned variance, respacing). Differences
from the published code: keyed noise per sample, no noise drawn where none is used (the last step, eta 0).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from zigflow.keyed import KeyedDraws, current_draws
from zigflow.processes import Process
from zigflow.processes.chain import BoundedProcess, Chain, ChainProcess
from zigflow.processes.process import (
    ModelFunction,
    mean_over_sample,
    predict_with_variance,
    working_dtype,
)
from zigflow.registry import unknown_name

from .conditions import pad_batch
from .solver import DIFFUSION_SAMPLERS, Callback, FiniteWatch, TimeRange, full_time

NoiseFunction = Callable[[int, Tensor], Tensor]
"""``noise(step, x) -> standard normals of the shape of x`` for steps 0, 1, ... in the order they are made."""

CHAIN_METHODS = ("ddpm", "ddim")


def _ddim_step(chain: Chain, data: Tensor, x: Tensor, step: Tensor, eta: float) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of x_{i-1} (DDIM, eq. 12 and 16) for the expected data."""
    here, before = chain.alphas_bar, chain.alphas_bar_prev
    spread = eta * ((1 - before) / (1 - here) * (1 - here / before)).sqrt()
    return _ddim_move(chain, data, x, step, before, spread), chain.at(spread, step, x)


def _ddim_move(
    chain: Chain, data: Tensor, x: Tensor, step: Tensor, target: Tensor, spread: Tensor | float
) -> Tensor:
    """The state at alpha_bar ``target`` (K,) with the noise that x at ``step`` and the expected data imply."""
    here = chain.alphas_bar
    noise = (x - chain.at(here.sqrt(), step, x) * data) / chain.at((1 - here).sqrt(), step, x)
    remaining = (1 - target - spread**2).clamp_min(0).sqrt()
    return chain.at(target.sqrt(), step, x) * data + chain.at(remaining, step, x) * noise


class ChainSampler:
    """Ancestral and DDIM sampling of any diffusion process.

    Args:
        method: "ddpm" or "ddim".
        spacing: the steps that are made, "250", "ddim50" or "10,15,20", see ``zigflow.processes.schedules``; in
            continuous time a number.
        eta: of DDIM: 0 is deterministic, 1 has as much noise as DDPM with the smaller variance.
        clip_denoised: clip the expected data to [-1, 1] in every step (pixels).
        batch_size: pad smaller batches to this size, so that a sample's bits do not depend on how many there are.

    ``num_function_evaluations`` counts the calls of the model in the last run.

    Raises:
        UnknownNameError: an unknown method.
        ValueError: eta outside [0, 1], or not of DDIM.
    """

    def __init__(
        self,
        method: str = "ddpm",
        spacing: str | int = "250",
        eta: float = 0.0,
        clip_denoised: bool = False,
        batch_size: int | None = None,
    ):
        if method not in CHAIN_METHODS:
            raise unknown_name("chain sampler", method, list(CHAIN_METHODS))
        if not 0 <= eta <= 1:
            raise ValueError(f"eta={eta} is not in [0, 1]: 0 is deterministic, 1 ancestral")
        if eta and method != "ddim":
            raise ValueError(f"eta={eta} is for ddim, not {method}: drop it")
        self.method = method
        self.spacing = spacing
        self.eta = eta
        self.clip_denoised = clip_denoised
        self.batch_size = batch_size
        self.num_function_evaluations = 0

    def unfit(self, process: Process) -> str | None:
        """A process without a chain, or one whose chain has no such steps."""
        try:
            chain_of(process, self.spacing)
        except TypeError as error:
            return str(error)
        except ValueError as error:
            return f"num_steps={self.spacing}: {error}"
        return None

    def unfit_to_encode(self) -> str | None:
        """Why data cannot be encoded into noise, or None."""
        if self.method == "ddim" and self.eta == 0:
            return None
        return f"{self.method} with eta {self.eta} has no inverse; use ddim with eta 0"

    def unfit_to_bound(self, process: Process) -> str | None:
        """Why there is no variational bound under ``process``, or None."""
        if self.method != "ddpm":
            return f"{self.method} has no variational bound; use ddpm"
        return _no_bound(process)

    def time_range(self, process: ChainProcess, backwards: bool = False) -> TimeRange:
        """The chain's first and last time; its last step goes to the data by its construction."""
        times = chain_of(process, self.spacing).times.tolist()
        return TimeRange(times[0], times[-1]) if backwards else TimeRange(times[-1], times[0], "data")

    @torch.no_grad()
    def sample(
        self,
        process: ChainProcess,
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

        The noise of the k-th step made is ``noise(k, x)`` if given, else ``draws.normal("sample.sde", ..., step=k)``,
        else from the ambient draws, else from torch's generator; deterministic steps draw none.

        Returns:
            x1, or with ``return_trajectory`` the states after each step, (K, B, ...).

        Raises:
            TypeError: the process is no diffusion.
            SamplingError: a state is not finite; the step and the samples are named.
        """
        chain = chain_of(process, self.spacing)
        rows = x0.shape[0]
        x, y, draws = pad_batch(x0.to(working_dtype(x0)), y, draws, self.batch_size)
        noise = noise or noise_source(draws)
        watch, states = FiniteWatch(x), []
        self.num_function_evaluations = 0
        for made, place in enumerate(reversed(range(len(chain)))):
            step = torch.full((x.shape[0],), place, device=x.device)
            output, logits = self._predict(process, model, chain, x, step, y)
            mean, log_variance, data = process.backward_step(
                chain, output, logits, x, step, self.clip_denoised
            )
            if self.method == "ddim":
                mean, spread = _ddim_step(chain, data, x, step, self.eta)
            else:
                spread = (0.5 * log_variance).exp()
            stochastic = place > 0 and (self.method == "ddpm" or self.eta > 0)
            x = mean + spread * noise(made, x).to(x) if stochastic else mean
            watch.check(x, made + 1, last=place == 0)
            states.append(x if return_trajectory else None)
            if callback is not None:
                callback(made + 1, full_time(float(chain.times[place - 1]) if place else 1.0, x), x)
        return torch.stack(states)[:, :rows] if return_trajectory else x[:rows]

    @torch.no_grad()
    def encode(
        self,
        process: ChainProcess,
        model: ModelFunction,
        x1: Tensor,
        y: Any = None,
        callback: Callback | None = None,
        *,
        return_trajectory: bool = False,
    ) -> Tensor:
        """The noise x0 (B, ...) of data x1 by DDIM's inversion; as published, data stand for the state of step 0.

        Raises:
            ValueError: not DDIM with eta 0.
            SamplingError: as in :meth:`sample`.
        """
        reason = self.unfit_to_encode()
        if reason is not None:
            raise ValueError(reason)
        chain = chain_of(process, self.spacing)
        rows = x1.shape[0]
        x, y, _ = pad_batch(x1.to(working_dtype(x1)), y, None, self.batch_size)
        watch, states = FiniteWatch(x), []
        self.num_function_evaluations = 0
        for place in range(len(chain) - 1):
            step = torch.full((x.shape[0],), place, device=x.device)
            output, logits = self._predict(process, model, chain, x, step, y)
            data = process.backward_step(chain, output, logits, x, step, self.clip_denoised)[2]
            x = _ddim_move(chain, data, x, step, chain.alphas_bar_next, 0.0)
            watch.check(x, place + 1, last=place == len(chain) - 2)
            states.append(x if return_trajectory else None)
            if callback is not None:
                callback(place + 1, full_time(float(chain.times[place + 1]), x), x)
        return torch.stack(states)[:, :rows] if return_trajectory else x[:rows]

    def bound(
        self,
        process: BoundedProcess,
        model: ModelFunction,
        x1: Tensor,
        y: Any = None,
        draws: KeyedDraws | None = None,
    ) -> "Bound":
        """The variational bound of data x1 (B, ...) under this chain, see :func:`variational_bound`.

        Raises:
            ValueError: not DDPM: the steps of DDIM have no density.
            TypeError: the process is no Gaussian diffusion in discrete steps.
        """
        if self.method != "ddpm":
            raise ValueError(f"{self.method} has no variational bound; use ddpm")
        return variational_bound(
            process, model, x1, y, draws, spacing=self.spacing, clip_denoised=self.clip_denoised
        )

    def _predict(
        self, process: ChainProcess, model: ModelFunction, chain: Chain, x: Tensor, step: Tensor, y: Any
    ) -> tuple[Tensor, Tensor | None]:
        self.num_function_evaluations += 1
        return predict_with_variance(process, model, x, chain.times.to(x.device)[step], y)


@dataclass(frozen=True)
class Bound:
    """The variational bound: all in bits per dimension; (B, K) columns run from the noisiest step to the cleanest.

    Attributes:
        total: (B,), the sum of ``prior`` (B,) and ``terms`` (B, K).
        data_error, noise_error: (B, K) mean squared errors of the expected data and noise.
    """

    total: Tensor
    prior: Tensor
    terms: Tensor
    data_error: Tensor
    noise_error: Tensor


@torch.no_grad()
def variational_bound(
    process: BoundedProcess,
    model: ModelFunction,
    x1: Tensor,
    y: Any = None,
    draws: KeyedDraws | None = None,
    *,
    spacing: str | int | None = None,
    clip_denoised: bool = True,
    noise: NoiseFunction | None = None,
) -> Bound:
    """Upper bound of the bits per dimension of 8-bit data x1 (B, ...), scaled to [-1, 1], under the chain.

    Args:
        spacing: the chain's steps; None: all.
        noise: as in :meth:`ChainSampler.sample`, the k-th for the k-th column.

    Raises:
        TypeError: the process is no Gaussian diffusion in discrete steps.
    """
    reason = _no_bound(process)
    if reason is not None:
        raise TypeError(reason)
    chain = chain_of(process, spacing)
    x1 = x1.to(working_dtype(x1))
    noise = noise or noise_source(draws)
    terms, data_errors, noise_errors = [], [], []
    for made, place in enumerate(reversed(range(len(chain)))):
        step = torch.full((x1.shape[0],), place, device=x1.device)
        x0 = noise(made, x1).to(x1)
        x = chain.noised(x1, x0, step)
        t = chain.times.to(x.device)[step]
        output, logits = predict_with_variance(process, model, x, t, y)
        term, data = process.variational_term(chain, output, logits, x1, x, step, clip_denoised)
        terms.append(term)
        data_errors.append(mean_over_sample((data - x1) ** 2))
        implied = process.convert(data, x, t, "noise", source="data")
        noise_errors.append(mean_over_sample((implied - x0) ** 2))
    stacked = torch.stack(terms, 1)
    prior = process.prior_term(chain, x1)
    return Bound(
        stacked.sum(1) + prior, prior, stacked, torch.stack(data_errors, 1), torch.stack(noise_errors, 1)
    )


def _no_bound(process: Process) -> str | None:
    if isinstance(process, BoundedProcess):
        return None
    return (
        f"{type(process).__name__} has no variational bound, which is that of process=gaussian: take the likelihood of "
        "the ODE (sample_mode=ODE)"
    )


def chain_of(process: Process, spacing: str | int | None) -> Chain:
    """The process's chain.

    Raises:
        TypeError: the process has none.
        ValueError: the spacing cannot be made.
    """
    if not isinstance(process, ChainProcess):
        raise TypeError(
            f"{type(process).__name__} has no chain of steps: set sample_mode=ODE or SDE, or train with a diffusion "
            "process (process=gaussian, vp or sd_discrete)"
        )
    return process.chain(spacing)


def noise_source(draws: KeyedDraws | None) -> NoiseFunction:
    """Noise of a step from keyed draws, the ambient ones, or torch's generator."""
    draws = current_draws() if draws is None else draws
    if draws is None:
        return lambda step, x: torch.randn_like(x)
    return lambda step, x: draws.normal("sample.sde", tuple(x.shape[1:]), step=step)


def _register(method: str) -> None:
    def make(
        *, num_steps: str = "50", eta: float = 0.0, clip_denoised: bool = False, last_step: bool = True
    ) -> ChainSampler:
        if not last_step:
            raise ValueError(f"last_step=false: the steps of {method} end at the data, drop it")
        return ChainSampler(method, num_steps, eta, clip_denoised)

    DIFFUSION_SAMPLERS.register(method, make)


for _method in CHAIN_METHODS:
    _register(_method)
