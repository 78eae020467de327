"""Initial values of a Mamba mixer's state-space parameters (Gu and Dao, arXiv 2312.00752, section 3.6)."""

import math

import torch
from torch import Tensor, nn


def state_matrix_log(
    channels: int, num_states: int, device=None, dtype: torch.dtype | None = None
) -> nn.Parameter:
    """A_log (E, N) with A = -exp(A_log) = -1 .. -N in every row (S4D-Real). Never below float32.

    The parameter carries ``_no_weight_decay = True``: decay would pull A towards -1.
    """
    row = torch.arange(1, num_states + 1, dtype=_at_least_float32(dtype), device=device).log()
    parameter = nn.Parameter(row.repeat(channels, 1))
    parameter._no_weight_decay = True  # type: ignore[attr-defined]
    return parameter


def skip_weight(channels: int, device=None, dtype: torch.dtype | None = None) -> nn.Parameter:
    """D (E,) of ones, never below float32, with ``_no_weight_decay = True``."""
    parameter = nn.Parameter(torch.ones(channels, dtype=_at_least_float32(dtype), device=device))
    parameter._no_weight_decay = True  # type: ignore[attr-defined]
    return parameter


@torch.no_grad()
def init_step_projection(
    projection: nn.Linear,
    dt_min: float = 1e-3,
    dt_max: float = 0.1,
    dt_init: str = "random",
    dt_scale: float = 1.0,
    dt_init_floor: float = 1e-4,
) -> None:
    """Initialize dt_proj (R -> E) so that softplus(bias) is log-uniform on [dt_min, dt_max].

    The weight is uniform within +-R^-0.5 * dt_scale, or that constant. The bias carries ``_no_reinit = True``: a
    model that zeroes the biases of its linear layers must leave it alone.

    Raises:
        ValueError: ``dt_init`` is neither "random" nor "constant", or not 0 < dt_min <= dt_max.
    """
    if dt_init not in ("random", "constant"):
        raise ValueError(f"unknown dt_init {dt_init!r}, expected 'random' or 'constant'")
    if not 0 < dt_min <= dt_max:
        raise ValueError(f"dt_min = {dt_min} and dt_max = {dt_max}: expected 0 < dt_min <= dt_max")
    bound = projection.in_features**-0.5 * dt_scale
    if dt_init == "constant":
        projection.weight.fill_(bound)
    else:
        projection.weight.uniform_(-bound, bound)
    bias = projection.bias
    uniform = torch.rand(bias.shape, dtype=_at_least_float32(bias.dtype), device=bias.device)
    step = torch.exp(math.log(dt_min) + uniform * (math.log(dt_max) - math.log(dt_min))).clamp_(
        min=dt_init_floor
    )
    bias.copy_(inverse_softplus(step))
    bias._no_reinit = True  # type: ignore[attr-defined]


def inverse_softplus(y: Tensor) -> Tensor:
    """x with softplus(x) = y, for y > 0, without overflow: y + log(1 - exp(-y))."""
    return y + torch.log(-torch.expm1(-y))


def _at_least_float32(dtype: torch.dtype | None) -> torch.dtype:
    return torch.promote_types(dtype or torch.get_default_dtype(), torch.float32)
