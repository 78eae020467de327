"""The causal depthwise convolution as shifted multiply-adds on token-major data, with an analytical backward.

Nothing is transposed, padded or kept for backward but the arguments: backward computes the value before the SiLU
again, which costs less than writing and reading it.

Shapes: B batch, L tokens, E channels, W taps, R rows of the batch in one block.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from dis_kernels.dispatch import transform_reason
from dis_kernels.dtypes import state_dtype
from dis_kernels.elementwise import elementwise, room, sum_of_tokens

from .call import ConvCall
from .gradient import register

_BLOCK_ELEMENTS_CPU = 1 << 18
_BLOCK_ELEMENTS_DEVICE = 1 << 27


class TorchConv:
    """Runs wherever torch does. Refuses forward-mode AD and torch.func transforms, which need ``reference``."""

    name = "torch"

    def unavailable(self) -> str | None:
        return None

    def accepts(self, call: ConvCall) -> str | None:
        return transform_reason(call[:3])

    def run(self, call: ConvCall) -> Tensor:
        return shifted_conv(*call)


@torch.library.custom_op("zigflow::shifted_conv", mutates_args=())
def shifted_conv(x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool, reverse: bool) -> Tensor:
    """The convolution (B,L,E) in the dtype of ``x``, accumulated in float32 (float64 for float64)."""
    dtype = state_dtype(x.dtype)
    out = x.new_empty(x.shape)
    with torch.autocast(x.device.type, enabled=False):
        taps_WE, bias = _parameters(weight, bias, dtype)
        for rows in _rows(x):
            y_RLE = _convolve(x[rows].to(dtype), taps_WE, bias, reverse)
            out[rows] = elementwise(torch.ops.aten.silu_, y_RLE) if silu else y_RLE
    return out


@torch.library.custom_op("zigflow::shifted_conv_backward", mutates_args=())
def shifted_conv_backward(
    grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool, reverse: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, weight and bias, each in its tensor's dtype; the last is empty without a bias."""
    dtype = state_dtype(x.dtype)
    width = weight.shape[1]
    grad_x = x.new_empty(x.shape)
    grad_taps_WE = torch.zeros((width, x.shape[2]), dtype=dtype, device=x.device)
    grad_bias = torch.zeros(0 if bias is None else bias.shape, dtype=dtype, device=x.device)
    with torch.autocast(x.device.type, enabled=False):
        taps_WE, bias_E = _parameters(weight, bias, dtype)
        for rows in _rows(x):
            x_RLE, g_RLE = x[rows].to(dtype), grad[rows].to(dtype)
            if silu:
                g_RLE = elementwise(
                    torch.ops.aten.silu_backward, g_RLE, _convolve(x_RLE, taps_WE, bias_E, reverse)
                )
            grad_x[rows] = _convolve(g_RLE, taps_WE, None, not reverse)
            for shift in range(min(width, x.shape[1])):
                seen, target = _shifted(shift, reverse)
                grad_taps_WE[width - 1 - shift] += _summed_product(g_RLE[:, target], x_RLE[:, seen])
            if bias is not None:
                grad_bias += sum_of_tokens(g_RLE)
    return (
        grad_x,
        grad_taps_WE.t().to(weight.dtype, memory_format=torch.contiguous_format, copy=True),
        grad_bias if bias is None else grad_bias.to(bias.dtype),
    )


def _convolve(x_RLE: Tensor, taps_WE: Tensor, bias: Tensor | None, reverse: bool) -> Tensor:
    width = taps_WE.shape[0]
    if bias is None:
        y_RLE = torch.mul(x_RLE, taps_WE[-1], out=room(x_RLE))
    else:
        y_RLE = torch.addcmul(bias, x_RLE, taps_WE[-1], out=room(x_RLE))
    for shift in range(1, min(width, x_RLE.shape[1])):
        seen, target = _shifted(shift, reverse)
        y_RLE[:, target].addcmul_(x_RLE[:, seen], taps_WE[width - 1 - shift])
    return y_RLE


def _summed_product(a_RLE: Tensor, b_RLE: Tensor) -> Tensor:
    return sum_of_tokens(torch.mul(a_RLE, b_RLE, out=room(a_RLE)))


def _shifted(shift: int, reverse: bool) -> tuple[slice, slice]:
    """The tokens that are read and those that they reach, ``shift`` places further along the walk."""
    head, tail = slice(None, -shift or None), slice(shift, None)
    return (tail, head) if reverse else (head, tail)


def _rows(x: Tensor) -> Iterator[slice]:
    wanted = _BLOCK_ELEMENTS_CPU if x.device.type == "cpu" else _BLOCK_ELEMENTS_DEVICE
    step = max(1, wanted // (x.shape[1] * x.shape[2]))
    return (slice(start, start + step) for start in range(0, x.shape[0], step))


def _parameters(weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    return weight.to(dtype).t().contiguous(), None if bias is None else bias.to(dtype)


register("zigflow::shifted_conv", "zigflow::shifted_conv_backward", shifted_conv_backward, "torch")
