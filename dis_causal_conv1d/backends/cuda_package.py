"""The causal convolution of an installed causal-conv1d package, version 1.5 or later.

The package's two low-level functions are registered as one functional pair of operators: torch.compile and
activation checkpointing see them as they see the project's own kernels, and there is no second derivative. The
package's kernels take a transposed view of token-major data as it is where E is a multiple of 8; other widths are
copied to channel-major and back. The package adds up the gradients of weight and bias with float atomics, which
are not the same bits from run to run. Recent releases do otherwise where torch is asked for deterministic
algorithms, older ones do not: such calls are refused.

Shapes: B batch, L tokens, E channels, W taps.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dis_kernels.dispatch import transform_reason
from dis_kernels.installed import check_probe, refusal, tensor_reason

from .call import ConvCall
from .gradient import empty_gradients, register
from .reference import ReferenceConv

_TAPS = (2, 3, 4)
# The package's vector loads: elements of a row, bytes of an address.
_VECTOR, _ALIGNMENT = 8, 16


class PackageConv:
    """Runs on CUDA devices where causal-conv1d does. Refuses float64, forward-mode AD and torch.func transforms."""

    name = "cuda_package"

    def unavailable(self) -> str | None:
        return _unavailable()

    def accepts(self, call: ConvCall) -> str | None:
        if call.weight.shape[1] not in _TAPS:
            return f"causal-conv1d takes 2 to 4 taps, got {call.weight.shape[1]}"
        return tensor_reason(call[:3]) or transform_reason(call[:3])

    def run(self, call: ConvCall) -> Tensor:
        return package_conv(*call)


# A compiler need not trace the probe, whose answer is fixed.
@torch.compiler.assume_constant_result
@functools.cache
def _unavailable() -> str | None:
    return refusal("causal-conv1d", probe_conv)


def probe_conv(device: str) -> None:
    """Convolve a few tokens, forward and backward, both layouts; raises what the package raises."""
    for channels in (_VECTOR, 3):
        x = torch.linspace(-1, 1, 5 * channels, device=device).view(1, 5, channels)
        weight = torch.linspace(-1, 1, 4 * channels, device=device).view(channels, 4)
        call = ConvCall(x, weight, weight[:, 0].contiguous(), True, False)
        check_probe("causal-conv1d", package_conv(*call), ReferenceConv().run(call))
        package_conv_backward(x, *call)


def _functions() -> tuple[Callable[..., Any], Callable[..., Any]]:
    from causal_conv1d.cpp_functions import (  # pyright: ignore[reportMissingImports]
        causal_conv1d_bwd_function,
        causal_conv1d_fwd_function,
    )

    return causal_conv1d_fwd_function, causal_conv1d_bwd_function


@torch.library.custom_op("zigflow::package_conv", mutates_args=())
def package_conv(x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool, reverse: bool) -> Tensor:
    """The convolution (B,L,E) in the dtype of ``x``, accumulated in float32."""
    if x.shape[0] == 0:
        return x.new_empty(x.shape)
    forward, _ = _functions()
    weight, bias = _parameters(weight, bias)
    y_BEL = forward(_channel_major(x, reverse), weight, bias, None, None, None, silu)
    return _token_major(y_BEL, reverse)


@torch.library.custom_op("zigflow::package_conv_backward", mutates_args=())
def package_conv_backward(
    grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool, reverse: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, weight and bias, each in its tensor's dtype; the last is empty without a bias."""
    if x.shape[0] == 0:
        return tuple(t.zero_() for t in empty_gradients(x, weight, bias))  # type: ignore[return-value]
    _, backward = _functions()
    taps, offset = _parameters(weight, bias)
    grad_x, grad_weight, grad_bias, *_ = backward(
        _channel_major(x, reverse), taps, offset, _channel_major(grad.to(x.dtype), reverse),
        None, None, None, None, False, silu,
    )  # fmt: skip
    return (
        _token_major(grad_x, reverse),
        grad_weight.to(weight.dtype).contiguous(),
        x.new_empty(0, dtype=torch.float32) if bias is None else grad_bias.to(bias.dtype),
    )


def _parameters(weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Both in one dtype, which the kernels want."""
    if bias is None:
        return weight.contiguous(), None
    dtype = torch.promote_types(weight.dtype, bias.dtype)
    return weight.to(dtype).contiguous(), bias.to(dtype).contiguous()


def _channel_major(x: Tensor, reverse: bool) -> Tensor:
    """(B,L,E) as (B,E,L): a view where the kernels read it, a copy elsewhere."""
    x_BEL = (x.flip(1) if reverse else x).contiguous().transpose(1, 2)
    readable = x.shape[2] % _VECTOR == 0 and x_BEL.data_ptr() % _ALIGNMENT == 0
    return x_BEL if readable else x_BEL.contiguous()


def _token_major(y_BEL: Tensor, reverse: bool) -> Tensor:
    y = y_BEL.transpose(1, 2)
    return (y.flip(1) if reverse else y).contiguous()


register("zigflow::package_conv", "zigflow::package_conv_backward", package_conv_backward, "cuda_package")
