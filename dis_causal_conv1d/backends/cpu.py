"""The causal convolution in C++: ``csrc/conv.cpp``, compiled on first use (``dis_kernels.native``)."""

import struct
from pathlib import Path

import torch
from torch import Tensor

from dis_kernels.dispatch import transform_reason
from dis_kernels.dtypes import state_dtype
from dis_kernels.native import NativeLibrary, parallel_address, pointer, rows_in_one_piece

from .call import ConvCall
from .gradient import empty_gradients, register

MOST_TAPS = 16
LIBRARY = NativeLibrary(Path(__file__).parents[1] / "csrc" / "conv.cpp", {"ZIGFLOW_MOST_TAPS": MOST_TAPS})
_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float64: 2}
_CALL = struct.Struct("9q4Q4q5Q")


class CpuConv:
    """Takes CPU tensors and up to 16 taps. Refuses forward-mode AD and torch.func transforms (``reference``)."""

    name = "cpu"

    def unavailable(self) -> str | None:
        return _reason()

    def accepts(self, call: ConvCall) -> str | None:
        if call.x.device.type != "cpu":
            return f"the tensors are on {call.x.device}, it runs on the CPU"
        if call.weight.shape[1] > MOST_TAPS:
            return f"weight has {call.weight.shape[1]} taps, at most {MOST_TAPS} fit"
        return transform_reason(call[:3])

    def run(self, call: ConvCall) -> Tensor:
        dtype = state_dtype(call.x.dtype)
        bias = None if call.bias is None else call.bias.to(dtype)
        x = call.x if call.x.dtype in _DTYPES else call.x.to(dtype)
        return cpu_conv(x, call.weight.to(dtype), bias, call.silu, call.reverse).to(call.x.dtype)


# Under torch.compile the answer, which compiles and loads a library, is a constant of the trace.
@torch.compiler.assume_constant_result
def _reason() -> str | None:
    return LIBRARY.reason()


@torch.library.custom_op("zigflow::cpu_conv", mutates_args=())
def cpu_conv(x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool, reverse: bool) -> Tensor:
    """The convolution (B,L,E) in the dtype of ``x``; weight and bias are float32, float64 where ``x`` is."""
    out = x.new_empty(x.shape)
    if x.shape[0] > 0:
        _run(x, weight, bias, None, (out, None, None, None), silu, reverse)
    return out


@torch.library.custom_op("zigflow::cpu_conv_backward", mutates_args=())
def cpu_conv_backward(
    grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool, reverse: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, weight and bias, each in its tensor's dtype; the last is empty without a bias."""
    grad_x, grad_weight, grad_bias = empty_gradients(x, weight, bias)
    if x.shape[0] == 0:
        return grad_x, grad_weight.zero_(), grad_bias.zero_()
    outputs = (None, grad_x, grad_weight, None if bias is None else grad_bias)
    _run(x, weight, bias, grad, outputs, silu, reverse)
    return grad_x, grad_weight, grad_bias


def _run(x: Tensor, weight: Tensor, bias, grad, outputs, silu: bool, reverse: bool) -> None:
    """Pack the arguments as the struct ``Call`` of conv.cpp says, allocate its workspace, and run it."""
    batch, length, channels = x.shape
    x, grad = rows_in_one_piece(x), None if grad is None else rows_in_one_piece(grad)
    weight, bias = weight.contiguous(), None if bias is None else bias.contiguous()
    strides = (*x.stride()[:2], *((0, 0) if grad is None else grad.stride()[:2]))
    sizes = (batch, length, channels, weight.shape[1], silu, reverse, torch.get_num_threads())
    function = LIBRARY.function("zigflow_conv")
    backward = grad is not None

    def pack(workspace: int) -> bytes:
        tensors = map(pointer, (x, weight, bias, grad))
        return _CALL.pack(
            *sizes,
            _DTYPES[x.dtype],
            parallel_address(),
            *tensors,
            *strides,
            *map(pointer, outputs),
            workspace,
        )

    workspace = (
        torch.empty(-(-function(pack(0), backward, True) // 4), dtype=torch.float32) if backward else None
    )
    function(pack(pointer(workspace)), backward, False)


register("zigflow::cpu_conv", "zigflow::cpu_conv_backward", cpu_conv_backward, "cpu")
