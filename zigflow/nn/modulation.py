"""Modulation by a condition, alone and joined with the norm before it. Legend: B batch, L tokens, D width."""

from typing import Literal, overload

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook  # hooks on all modules; no public way to ask

from dis_kernels.tokenwise import add_norm_modulate, permute

from .norm import LayerNorm, RMSNorm


def modulate(x_BLD: Tensor, shift_BD: Tensor, scale_BD: Tensor) -> Tensor:
    """x * (1 + scale) + shift, the same for every token of a sample (Peebles and Xie 2023)."""
    return x_BLD * (1 + scale_BD.unsqueeze(1)) + shift_BD.unsqueeze(1)


@overload
def read_stream(
    norm: nn.Module,
    hidden_BLD: Tensor | None,
    residual_BLD: Tensor,
    shift_BD: Tensor | None = None,
    scale_BD: Tensor | None = None,
    order_L: Tensor | None = None,
    inverse_L: Tensor | None = None,
    *,
    dtype: torch.dtype,
    keep_normed: Literal[True],
) -> tuple[Tensor, Tensor, Tensor]: ...
@overload
def read_stream(
    norm: nn.Module,
    hidden_BLD: Tensor | None,
    residual_BLD: Tensor,
    shift_BD: Tensor | None = None,
    scale_BD: Tensor | None = None,
    order_L: Tensor | None = None,
    inverse_L: Tensor | None = None,
    *,
    dtype: torch.dtype,
    keep_normed: bool = False,
) -> tuple[Tensor, Tensor | None, Tensor]: ...
def read_stream(
    norm: nn.Module,
    hidden_BLD: Tensor | None,
    residual_BLD: Tensor,
    shift_BD: Tensor | None = None,
    scale_BD: Tensor | None = None,
    order_L: Tensor | None = None,
    inverse_L: Tensor | None = None,
    *,
    dtype: torch.dtype,
    keep_normed: bool = False,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """A block's input: the stream plus ``hidden``, normed, modulated, along an order; see ``add_norm_modulate``.

    ``norm`` is an ``RMSNorm`` or a ``LayerNorm`` without a bias, computed in one kernel with the rest; any other
    module, and one with hooks or a ``forward`` of its own, is called for what it is.

    Returns:
        The mixer's input (B,L,D), the norm before modulation (None unless kept) and the stream.
    """
    if isinstance(norm, RMSNorm | LayerNorm) and _joins(norm):
        return add_norm_modulate(
            hidden_BLD, residual_BLD, norm.weight, shift_BD, scale_BD, order_L, inverse_L,
            eps=norm.eps, centered=isinstance(norm, LayerNorm), keep_normed=keep_normed, dtype=dtype,
        )  # fmt: skip
    stream_BLD = residual_BLD if hidden_BLD is None else residual_BLD + hidden_BLD
    x = normed_BLD = norm(stream_BLD).to(dtype)
    if shift_BD is not None and scale_BD is not None:
        x = modulate(x, shift_BD, scale_BD)
    if order_L is not None and inverse_L is not None:
        x = permute(x, order_L, inverse_L)
    return x, normed_BLD if keep_normed else None, stream_BLD


def _joins(norm: RMSNorm | LayerNorm) -> bool:
    if norm._forward_hooks or norm._forward_pre_hooks or norm._backward_hooks or norm._backward_pre_hooks:
        return False
    if _has_any_global_hook() or "forward" in vars(norm):
        return False
    return type(norm) is RMSNorm or (type(norm) is LayerNorm and norm.bias is None)
