"""Log densities along the ODE: d log p(x_t) / dt = -div velocity, with the divergence from backward passes.

Chen et al. 2018 (instantaneous change of variables); Hutchinson 1990 for the trace estimate.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from zigflow.keyed import KeyedDraws, current_draws
from zigflow.registry import unknown_name

from .solver import Drift

Probe = Tensor | Callable[[int], Tensor]
"""Probe vectors with identity covariance, (num_probes, B, ...); or a function of the number of the evaluation
of the drift (from 0) that returns them, for estimates with fresh probes at every call."""

TRACES = ("hutchinson", "exact")
LARGEST_EXACT = 4096


@dataclass(frozen=True)
class Likelihood:
    """``log_density`` (B,) in nats, ``bits_per_dim`` (B,), and the noise ``x0`` (B, ...) that the data map to."""

    log_density: Tensor
    bits_per_dim: Tensor
    x0: Tensor

    @classmethod
    def of(cls, log_density: Tensor, x0: Tensor, bin_width: float) -> "Likelihood":
        """Bits per dimension of data whose bins are ``bin_width`` wide: -(log p / D + log bin_width) / log 2.

        Raises:
            ValueError: ``bin_width`` is not positive.
        """
        if not bin_width > 0:
            raise ValueError(
                f"bin_width is {bin_width}; give the positive width of a bin, or 1 for a density"
            )
        dims = x0[0].numel()
        return cls(log_density, -(log_density / dims + math.log(bin_width)) / math.log(2), x0)


def prior_log_density(x: Tensor, scale: float) -> Tensor:
    """log N(x; 0, scale^2 I) per sample, (B,)."""
    flat = x.flatten(1) / scale
    return -0.5 * flat.pow(2).sum(1) - flat.shape[1] * (0.5 * math.log(2 * math.pi) + math.log(scale))


def probe_source(
    x: Tensor, trace: str, num_probes: int, probe: Probe | None, draws: KeyedDraws | None
) -> Callable[[int], Tensor]:
    """A function of the number of the evaluation that returns probes (K, B, ...) like ``x``.

    Raises:
        UnknownNameError: an unknown trace.
        ValueError: fewer than one probe, probes of a wrong shape, or a sample too large for "exact".
    """
    if trace not in TRACES:
        raise unknown_name("trace", trace, list(TRACES))
    dims = x[0].numel()
    if trace == "exact":
        if dims > LARGEST_EXACT:
            raise ValueError(
                f"an exact trace takes one backward pass per element, {dims} here and {LARGEST_EXACT} at most; "
                "use trace='hutchinson'"
            )
        basis = torch.eye(dims, dtype=x.dtype, device=x.device).reshape(dims, 1, *x.shape[1:])
        unit = basis.expand(dims, *x.shape)
        return lambda evaluation: unit
    if num_probes < 1:
        raise ValueError(f"num_probes is {num_probes}; give at least 1")
    if probe is None:
        probe = _rademacher(x, num_probes, draws)
    given = probe

    def source(evaluation: int) -> Tensor:
        vectors = given(evaluation) if callable(given) else given
        if vectors.shape[1:] != x.shape:
            raise ValueError(f"probes have shape {tuple(vectors.shape)}; give (num_probes, {tuple(x.shape)})")
        return vectors.to(x) / math.sqrt(vectors.shape[0])

    return source


def _rademacher(x: Tensor, count: int, draws: KeyedDraws | None) -> Tensor:
    draws = current_draws() if draws is None else draws
    if draws is None:
        uniform = torch.rand((count, *x.shape), device=x.device)
    else:
        uniform = draws.uniform("sample.likelihood", (count, *x.shape[1:])).transpose(0, 1)
    return torch.where(uniform < 0.5, -1.0, 1.0).to(x)


def augmented_drift(drift: Drift, shape: torch.Size, probes: Callable[[int], Tensor]) -> Drift:
    """The drift of (x, integral of the divergence), for states (B, D + 1) with x flattened in front."""
    evaluation = 0

    def augmented(state: Tensor, t: Tensor) -> Tensor:
        nonlocal evaluation
        vectors = probes(evaluation)
        evaluation += 1
        with torch.enable_grad():
            x = state[:, :-1].reshape(shape).detach().requires_grad_()
            velocity = drift(x, t)
            divergence: Any = state.new_zeros(state.shape[0])
            for index, vector in enumerate(vectors):
                more = index + 1 < len(vectors)
                product = torch.autograd.grad((velocity * vector).sum(), x, retain_graph=more)[0]
                divergence = divergence + (product * vector).flatten(1).sum(1)
        return torch.cat([velocity.detach().flatten(1), divergence.unsqueeze(1)], dim=1)

    return augmented
