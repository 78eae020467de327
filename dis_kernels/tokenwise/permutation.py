"""The gather that carries a sequence into a visiting order and back."""

import torch
from torch import Tensor

from dis_kernels.dispatch import transform_reason


class _Permute(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
        return x.index_select(1, order)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        _, order, inverse = inputs
        ctx.save_for_backward(order, inverse)

    @staticmethod
    def backward(ctx, *grads):
        order, inverse = ctx.saved_tensors
        return _Permute.apply(grads[0], inverse, order), None, None


def check_order(op: str, x: Tensor, order: Tensor | None, inverse: Tensor | None) -> None:
    """Check the indices of a walk over the tokens of ``x`` (B,L,D), but not that one undoes the other.

    Raises:
        TypeError, ValueError: as ``permute``.
    """
    for name, index in (("order", order), ("inverse", inverse)):
        if not isinstance(index, Tensor) or index.dtype != torch.int64:
            raise TypeError(
                f"{op}: {name} must be an int64 tensor, got {getattr(index, 'dtype', type(index))}"
            )
        if index.ndim == 2:
            raise ValueError(
                f"{op}: {name} has shape {tuple(index.shape)}; orders (K,L) and (B,L) are reserved for later, "
                "give one order of shape (L,)"
            )
        if index.shape != x.shape[1:2]:
            raise ValueError(f"{op}: {name} has shape {tuple(index.shape)}, expected (L,) = ({x.shape[1]},)")
        if index.device != x.device:
            raise ValueError(f"{op}: {name} is on {index.device}, x on {x.device}: move one of them")


def permute(x: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
    """``x[:, order]`` whose backward is the gather ``grad[:, inverse]``.

    An index's own backward scatters, which is ten times slower. Tokens of ``x`` visited along ``order`` are put
    back by ``permute(y, inverse, order)``.

    Args:
        x: (B, L, D).
        order: (L,) int64, the index of the k-th visited token.
        inverse: (L,) int64 with ``inverse[order] = arange(L)``; not checked, it would cost a pass per call. It may
            be ``order`` itself.

    Returns:
        (B, L, D).

    Raises:
        TypeError: an index is not an int64 tensor.
        ValueError: shapes or devices do not fit. Orders of shape (K, L) and (B, L) are reserved.
    """
    if x.ndim != 3:
        raise ValueError(f"permute: x has shape {tuple(x.shape)}, expected (B,L,D)")
    check_order("permute", x, order, inverse)
    if transform_reason((x,)) is not None:
        return x.index_select(1, order)
    if order is inverse:
        # An order that is its own inverse: torch.compile refuses one tensor as two arguments.
        inverse = inverse.view_as(inverse)
    return _Permute.apply(x, order, inverse)
