"""The causal convolution in Triton, SiLU and its derivative fused.

Shapes: B batch, L tokens, E channels, W taps.
"""

from typing import Any

import torch
from torch import Tensor

from dis_kernels.dispatch import transform_reason
from dis_kernels.triton_launch import interpreted, launch_reason, unavailable

from .call import ConvCall
from .gradient import register

_TILE, _WARPS = 16, 4
_MAX_TAPS = 16


def conv_grid(batch: int, length: int, channels: int) -> tuple[int, int]:
    """Programs along batch and tokens, in one axis since only the first takes more than 65,535, and channels."""
    return batch * -(-length // _TILE), -(-channels // (32 * _WARPS))


class TritonConv:
    """Runs on CUDA devices. Refuses float64, forward-mode AD and torch.func transforms."""

    name = "triton"

    def unavailable(self) -> str | None:
        return unavailable()

    def accepts(self, call: ConvCall) -> str | None:
        if not call.x.is_cuda and not interpreted():
            return f"it takes CUDA tensors, got {call.x.device.type}"
        if torch.float64 in {t.dtype for t in call[:3] if isinstance(t, Tensor)}:
            return "it computes in float32, and an argument is float64: use backend='torch'"
        if call.weight.shape[1] > _MAX_TAPS:
            return f"it takes at most {_MAX_TAPS} taps, got {call.weight.shape[1]}"
        return launch_reason(call.x.shape[1], conv_grid(*call.x.shape)) or transform_reason(call[:3])

    def run(self, call: ConvCall) -> Tensor:
        return triton_conv(*call)


def _launch(kernel: str, x: Tensor, *tensors: Any, W: int, bias: Any, silu: bool, reverse: bool) -> None:
    from . import triton_kernels

    getattr(triton_kernels, kernel)[conv_grid(*x.shape)](
        *tensors, *x.shape[1:], W=W, SILU=silu, HAS_BIAS=bias is not None, REVERSE=reverse,
        TILE=_TILE, WIDTH=32 * _WARPS, num_warps=_WARPS,
    )  # fmt: skip


@torch.library.custom_op("zigflow::triton_conv", mutates_args=())
def triton_conv(x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool, reverse: bool) -> Tensor:
    """The convolution (B,L,E) in the dtype of ``x``, accumulated in float32."""
    out = x.new_empty(x.shape)
    if x.shape[0]:
        taps_WE, x = weight.t().contiguous(), x.contiguous()
        bias = None if bias is None else bias.contiguous()
        _launch(
            "conv_forward", x, x, taps_WE, bias, out, W=weight.shape[1], bias=bias, silu=silu, reverse=reverse
        )
    return out


@torch.library.custom_op("zigflow::triton_conv_backward", mutates_args=())
def triton_conv_backward(
    grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool, reverse: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, weight and bias, each in its tensor's dtype; the last is empty without a bias."""
    batch, _, channels = x.shape
    width = weight.shape[1]
    parts, _ = conv_grid(*x.shape)

    def scratch(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=x.device)

    grad_x, grad_y = x.new_empty(x.shape), scratch(*x.shape)
    grad_taps, grad_bias = scratch(parts, width, channels), scratch(parts, 0 if bias is None else channels)
    if batch:
        taps_WE, x, grad = weight.t().contiguous(), x.contiguous(), grad.contiguous()
        bias = None if bias is None else bias.contiguous()
        _launch(
            "conv_backward_taps", x, grad, x, taps_WE, bias, grad_y, grad_taps, grad_bias,
            W=width, bias=bias, silu=silu, reverse=reverse,
        )  # fmt: skip
        # The gradient of x walks the same taps the other way.
        _launch(
            "conv_forward", x, grad_y, taps_WE, None, grad_x, W=width, bias=None, silu=False, reverse=not reverse
        )  # fmt: skip
    return (
        grad_x,
        grad_taps.sum(0).t().to(weight.dtype, memory_format=torch.contiguous_format, copy=True),
        torch.empty(0, dtype=torch.float32, device=x.device)
        if bias is None
        else grad_bias.sum(0).to(bias.dtype),
    )


register("zigflow::triton_conv", "zigflow::triton_conv_backward", triton_conv_backward, "triton")
