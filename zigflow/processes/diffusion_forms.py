"""Diffusion coefficients D(t) of the sampling SDE dX = (velocity + D score) dt + sqrt(2 D) dW.

Any D >= 0 leaves the marginals of the path unchanged (SiT, section 2.3, with w = 2 D); the choices differ
in the error of a finite number of steps. All take the interpolant, times (B,) and the scale ``norm``; all
return (B,).
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from zigflow.registry import Registry

from .interpolants import Interpolant

DiffusionForm = Callable[[Interpolant, Tensor, float], Tensor]
DIFFUSION_FORMS: Registry[DiffusionForm] = Registry("diffusion form")


@DIFFUSION_FORMS.register("constant")
def constant(path: Interpolant, t: Tensor, norm: float) -> Tensor:
    return torch.full_like(t, norm)


@DIFFUSION_FORMS.register("SBDM")
def sbdm(path: Interpolant, t: Tensor, norm: float) -> Tensor:
    """The coefficient of score-based diffusion, whose forward SDE makes the path; infinite at alpha = 0."""
    return norm * path.score_gain(t)


@DIFFUSION_FORMS.register("sigma")
def sigma(path: Interpolant, t: Tensor, norm: float) -> Tensor:
    return norm * path.sigma(t)


@DIFFUSION_FORMS.register("linear")
def linear(path: Interpolant, t: Tensor, norm: float) -> Tensor:
    return norm * (1 - t)


@DIFFUSION_FORMS.register("decreasing")
def decreasing(path: Interpolant, t: Tensor, norm: float) -> Tensor:
    return 0.25 * (norm * torch.cos(math.pi * t) + 1) ** 2


@DIFFUSION_FORMS.register("increasing-decreasing")
def increasing_decreasing(path: Interpolant, t: Tensor, norm: float) -> Tensor:
    return norm * torch.sin(math.pi * t) ** 2


# The published code knows this form only by a misspelt name, which its checkpoints' configs carry.
DIFFUSION_FORMS.register("inccreasing-decreasing", increasing_decreasing)
