"""The validated arguments of one causal convolution, as every backend receives them."""

from typing import NamedTuple

from torch import Tensor


class ConvCall(NamedTuple):
    """x (B,L,E), weight (E,W), bias (E,) or None; ``silu``: apply SiLU to the result."""

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    silu: bool
    reverse: bool
