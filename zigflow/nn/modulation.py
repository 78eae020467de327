"""Adaptive normalization's affine part. Legend: B batch, L tokens, D width."""

from torch import Tensor


def modulate(x_BLD: Tensor, shift_BD: Tensor, scale_BD: Tensor) -> Tensor:
    """x * (1 + scale) + shift, the same for every token of a sample (Peebles and Xie 2023)."""
    return x_BLD * (1 + scale_BD.unsqueeze(1)) + shift_BD.unsqueeze(1)
