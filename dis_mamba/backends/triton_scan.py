"""The selective scan in Triton: the kernels' launches, registered with torch, and the backend that offers them.

Shapes: B batch, L tokens, E channels, N states, S chunk boundaries, P programs along E.
"""

import math
from typing import Any

import torch
from torch import Tensor

from dis_causal_conv1d.backends.triton_conv import interpreted, unavailable
from dis_causal_conv1d.dispatch import transform_reason

from .call import ScanCall
from .gradient import empty_gradients, empty_outputs, register

# A float32 state every 64 tokens of a bfloat16 sequence is half an activation at N = 16.
CHUNK = 64
# Eight tokens are what the registers of a lane hold without spilling.
_TILE = 8
_FORWARD_WARPS, _BACKWARD_WARPS = 1, 4
_LOG2_E = math.log2(math.e)
_MAX_STATES = 256


class TritonScan:
    """Runs on CUDA devices. Refuses float64, forward-mode AD and torch.func transforms."""

    name = "triton"

    def unavailable(self) -> str | None:
        return unavailable()

    def accepts(self, call: ScanCall) -> str | None:
        if not call.u.is_cuda and not interpreted():
            return f"it takes CUDA tensors, got {call.u.device.type}"
        if torch.float64 in {t.dtype for t in call[:8] if isinstance(t, Tensor)}:
            return "it computes in float32, and an argument is float64: use backend='torch'"
        if call.A.shape[1] > _MAX_STATES:
            return f"it takes at most {_MAX_STATES} states, got {call.A.shape[1]}"
        return transform_reason(call[:8])

    def run(self, call: ScanCall) -> Tensor:
        return triton_scan(*call)[0]


def _kernels() -> Any:
    # Imported at use: Triton is missing on some platforms.
    from . import triton_kernels

    return triton_kernels


@torch.library.custom_op("zigflow::triton_scan", mutates_args=())
def triton_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
    reverse: bool,
) -> tuple[Tensor, Tensor]:
    """The output (B,L,E) and the states at the chunk boundaries (B,S,N,E) in float32."""
    batch, length, channels = u.shape
    out, states = empty_outputs(u, A, CHUNK)
    if batch == 0:
        return out, states
    width = 32 * _FORWARD_WARPS
    u, delta, B, C = (t.contiguous() for t in (u, delta, B, C))
    D, z, delta_bias = (None if t is None else t.contiguous() for t in (D, z, delta_bias))
    rate_NE = _base_two_rate(A)
    _kernels().scan_forward[(batch, -(-channels // width))](
        u, delta, rate_NE, B, C, D, z, delta_bias, out, states, length, channels,
        WIDTH=width, num_warps=_FORWARD_WARPS, STAGES=4,
        **_flags(A, D, z, delta_bias, delta_softplus, reverse),
    )  # fmt: skip
    return out, states


@torch.library.custom_op("zigflow::triton_scan_backward", mutates_args=())
def triton_scan_backward(
    grad: Tensor,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    states: Tensor,
    delta_softplus: bool,
    reverse: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of u, delta, A, B, C, D, z, delta_bias, each in its tensor's dtype; empty for an absent tensor."""
    batch, length, channels = u.shape
    num_states = A.shape[1]
    width = 32 * _BACKWARD_WARPS
    parts = -(-channels // width)

    def scratch(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=u.device)

    tensors = (u, delta, A, B, C, D, z, delta_bias)
    grad_u, grad_delta, *_, grad_z, _ = empty_gradients(*tensors)
    grad_A = torch.zeros((batch, num_states, channels), dtype=torch.float32, device=u.device)
    grad_B, grad_C = (scratch(parts, batch, length, num_states) for _ in range(2))
    grad_D = scratch(*(() if D is None else (batch,)), 0 if D is None else channels)
    grad_bias = scratch(*(() if delta_bias is None else (batch,)), 0 if delta_bias is None else channels)
    if batch:
        grad, u, delta, B, C = (t.contiguous() for t in (grad, u, delta, B, C))
        D, z, delta_bias = (None if t is None else t.contiguous() for t in (D, z, delta_bias))
        rate_NE = _base_two_rate(A)
        _kernels().scan_backward[(batch, parts)](
            grad, u, delta, rate_NE, B, C, D, z, delta_bias, states,
            grad_u, grad_delta, grad_z, grad_A, grad_B, grad_C, grad_D, grad_bias,
            scratch(batch, CHUNK // _TILE, num_states, channels), torch.zeros_like(grad_A), length, channels,
            WIDTH=width, TILE=_TILE, num_warps=_BACKWARD_WARPS, STAGES=3,
            **_flags(A, D, z, delta_bias, delta_softplus, reverse),
        )  # fmt: skip
    return (
        grad_u,
        grad_delta,
        grad_A.sum(0).t().to(A.dtype, memory_format=torch.contiguous_format, copy=True),
        grad_B.sum(0).to(B.dtype),
        grad_C.sum(0).to(C.dtype),
        grad_D if D is None else grad_D.sum(0).to(D.dtype),
        grad_z,
        grad_bias if delta_bias is None else grad_bias.sum(0).to(delta_bias.dtype),
    )


def _flags(A: Tensor, D: Any, z: Any, bias: Any, softplus: bool, reverse: bool) -> dict[str, Any]:
    num_states = A.shape[1]
    return {
        "N": num_states, "NP": 1 << (num_states - 1).bit_length(), "CHUNK": CHUNK,
        "HAS_D": D is not None, "HAS_Z": z is not None, "HAS_BIAS": bias is not None,
        "SOFTPLUS": softplus, "REVERSE": reverse,
    }  # fmt: skip


def _base_two_rate(A: Tensor) -> Tensor:
    """(N, E): log2(e) goes into A once, since the hardware has exp2 alone."""
    return (A.t() * _LOG2_E).contiguous()


register("zigflow::triton_scan", "zigflow::triton_scan_backward", triton_scan_backward, "triton", CHUNK)
