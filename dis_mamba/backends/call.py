"""The validated arguments of one selective scan, as every backend receives them."""

from typing import NamedTuple

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
