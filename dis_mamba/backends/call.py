"""The validated arguments of one selective scan, as every backend receives them."""

from typing import NamedTuple

import torch
from torch import Tensor


class ScanCall(NamedTuple):
    """u, delta, z (B,L,E); A (E,N); B, C (B,L,N); D, delta_bias (E,). A, D and delta_bias are in ``state_dtype``."""

    u: Tensor
    delta: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    D: Tensor | None
    z: Tensor | None
    delta_bias: Tensor | None
    delta_softplus: bool
    reverse: bool


def state_dtype(u_dtype: torch.dtype) -> torch.dtype:
    """The dtype of the recurrence: float64 for float64 input, else float32."""
    return torch.float64 if u_dtype == torch.float64 else torch.float32
