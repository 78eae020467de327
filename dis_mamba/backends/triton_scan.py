"""The selective scan in Triton: the kernels' launches, registered with torch, and the backend that offers them.

Shapes: B batch, L tokens, E channels, N states, S chunk boundaries, P programs along E.
"""

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from dis_kernels.dispatch import transform_reason
from dis_kernels.triton_launch import GRID_LIMITS, interpreted, launch_reason, unavailable

from .call import ScanCall
from .gradient import empty_gradients, empty_outputs, register

# A float32 state every 64 tokens of a bfloat16 sequence is half an activation at N = 16.
CHUNK = 64
# What the registers of a lane hold without spilling: states (forward), steps times channels (backward).
_STATES, _GROUP, _TILE, _VECTORS = 16, 4, 8, 2
# One-warp programs that keep a large GPU busy: two for each of the 528 schedulers of 132 multiprocessors. Where there
# are less than half, sequences are cut; by the shape alone, so that the number of multiprocessors changes no bit.
_PROGRAMS = 1024
_LOG2_E = math.log2(math.e)
_MAX_STATES = 256
# The gradients of B and C have two sums per token and state, and the kernel finds them by 32 bits: 64 take registers
# that it does not have on compute capability 8.
_MAX_SUMS = 2**30
# The programs along the channels are the second axis of a grid.
_MAX_CHANNELS = 32 * GRID_LIMITS[1]


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
        (batch, length, _), states = call.u.shape, call.A.shape[1]
        if (length + _TILE) * states > _MAX_SUMS:
            got = f"{length} times {states}"
            return f"it takes at most {_MAX_SUMS} tokens times states, got {got}: use backend='torch'"
        return launch_reason(length, (batch,)) or transform_reason(call[:8])

    def run(self, call: ScanCall) -> Tensor:
        if call.u.shape[2] <= _MAX_CHANNELS:
            return triton_scan(*call)[0]
        return torch.cat([triton_scan(*part)[0] for part in _by_channels(call)], dim=2)


def _by_channels(call: ScanCall) -> Iterator[ScanCall]:
    """Calls of as many channels as a grid takes, each a scan of its own: channels share nothing but B and C."""
    for first in range(0, call.u.shape[2], _MAX_CHANNELS):
        here = slice(first, first + _MAX_CHANNELS)
        u, delta, z = (None if t is None else t[:, :, here] for t in (call.u, call.delta, call.z))
        D, bias = (None if t is None else t[here] for t in (call.D, call.delta_bias))
        yield call._replace(u=u, delta=delta, A=call.A[here], D=D, z=z, delta_bias=bias)


def _launch(name: str, grid: tuple[int, int, int], *arguments: Any, **constants: Any) -> None:
    # Imported at use: Triton is missing on some platforms.
    from . import triton_backward, triton_kernels

    kernel = getattr(triton_backward if name == "scan_backward" else triton_kernels, name)
    kernel[grid](*arguments, **constants, num_warps=1, enable_fp_fusion=True)


def state_block(num_states: int) -> int:
    """How many states are taken at a time: a power of two."""
    return min(_STATES, 1 << (num_states - 1).bit_length())


def group_of(num_states: int) -> int:
    """Steps that forward loads together: fewer where sums over blocks, and masks of a last block, need registers."""
    if num_states <= _STATES:
        return _GROUP
    return 1 if num_states % _STATES else 2


def vectors_of(num_states: int, capability: tuple[int, int] | None) -> int:
    """Vectors of 32 channels that a program of the backward pass owns, on a GPU of that compute capability."""
    # The compiler unrolls the loop over a few states.
    return 1 if num_states < 4 or (capability is not None and capability < (9, 0)) else _VECTORS


def _cut(programs: int, length: int) -> tuple[int, int]:
    """Into how many segments a sequence is cut, and the chunks of one, given the programs of uncut sequences."""
    chunks = -(-length // CHUNK)
    wanted = 1 if 2 * programs > _PROGRAMS else min(chunks, _PROGRAMS // programs)
    per_segment = -(-chunks // wanted)
    return -(-chunks // per_segment), per_segment


def _enter_segments(
    ends: Tensor, value: Tensor, delta: Tensor, rate_NE: Tensor, taken: Tensor, gate: Tensor | None,
    bias: Tensor | None, steps: int, adjoint: bool, flags: dict[str, Any],
) -> None:  # fmt: skip
    """Fill ``ends`` (B,S,N,E), zeros so far, with what enters each segment of ``steps`` steps."""
    batch, length, channels = value.shape
    segments, num_states = ends.shape[1:3]
    if segments == 1:
        return
    parts, blocks = -(-channels // 32), -(-num_states // flags["NB"])
    spans = torch.empty((batch, segments, channels), dtype=torch.float32, device=value.device)
    walk = {name: flags[name] for name in ("N", "NB", "HAS_BIAS", "SOFTPLUS", "REVERSE")}
    _launch(
        "segment_ends", (batch, parts, segments - 1),
        value, delta, rate_NE, taken, gate, bias, ends, spans, length, channels, steps,
        GROUP=_GROUP, ADJOINT=adjoint, HAS_Z=gate is not None, **walk,
    )  # fmt: skip
    _launch(
        "join_segments", (batch, parts, blocks),
        rate_NE, spans, ends, channels, segments, N=flags["N"], NB=flags["NB"], ADJOINT=adjoint,
    )  # fmt: skip


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
    parts = -(-channels // 32)
    segments, per_segment = _cut(batch * parts, length)
    u, delta, B, C = (t.contiguous() for t in (u, delta, B, C))
    D, z, delta_bias = (None if t is None else t.contiguous() for t in (D, z, delta_bias))
    rate_NE = _base_two_rate(A)
    flags = _flags(A, D, z, delta_bias, delta_softplus, reverse)
    starts = u.new_zeros((batch, segments if segments > 1 else 0, *rate_NE.shape), dtype=torch.float32)
    partial = u.new_empty(u.shape if A.shape[1] > flags["NB"] else 0, dtype=torch.float32)
    steps = per_segment * CHUNK
    if segments > 1:
        _enter_segments(starts, u, delta, rate_NE, B, None, delta_bias, steps, False, flags)
    _launch(
        "scan_forward", (batch, parts, segments),
        u, delta, rate_NE, B, C, D, z, delta_bias, starts, partial, out, states, length, channels, steps,
        GROUP=group_of(A.shape[1]), STARTS=segments > 1, CHUNK=CHUNK, **flags,
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
    vectors = vectors_of(num_states, torch.cuda.get_device_capability(u.device) if u.is_cuda else None)
    width = 32 * vectors
    parts, tiles_of_L = -(-channels // width), -(-length // _TILE)
    segments, per_segment = _cut(batch * parts, length) if batch else (1, 1)

    def scratch(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=u.device)

    tensors = (u, delta, A, B, C, D, z, delta_bias)
    grad_u, grad_delta, *_, grad_z, _ = empty_gradients(*tensors)
    grad_E = scratch(batch, segments, num_states + 2, channels)
    grad_BC = scratch(parts, batch, tiles_of_L, num_states, 2, _TILE)
    if batch:
        grad, u, delta, B, C = (t.contiguous() for t in (grad, u, delta, B, C))
        D, z, delta_bias = (None if t is None else t.contiguous() for t in (D, z, delta_bias))
        rate_NE = _base_two_rate(A)
        flags = _flags(A, D, z, delta_bias, delta_softplus, reverse)
        carry = u.new_zeros((batch, segments, num_states, channels), dtype=torch.float32)
        _enter_segments(carry, grad, delta, rate_NE, C, z, delta_bias, per_segment * CHUNK, True, flags)
        tiles = scratch(batch, segments, parts, CHUNK // _TILE, num_states, width)
        _launch(
            "scan_backward", (batch, parts, segments),
            grad, u, delta, rate_NE, B, C, D, z, delta_bias, states,
            grad_u, grad_delta, grad_z, grad_E, grad_BC, tiles, carry,
            length, channels, per_segment,
            CHUNK=CHUNK, GROUP=_GROUP, TILE=_TILE, VECTORS=vectors, **flags,
        )  # fmt: skip
    grad_B, grad_C = _by_token(grad_BC.sum(0), length, reverse)
    by_channel = grad_E.sum((0, 1))
    new = {"memory_format": torch.contiguous_format, "copy": True}
    return (
        grad_u,
        grad_delta,
        by_channel[:num_states].t().to(A.dtype, **new),
        grad_B.to(B.dtype, **new),
        grad_C.to(C.dtype, **new),
        by_channel.new_empty(0) if D is None else by_channel[num_states].to(D.dtype, **new),
        grad_z,
        by_channel.new_empty(0)
        if delta_bias is None
        else by_channel[num_states + 1].to(delta_bias.dtype, **new),
    )


def _by_token(sums: Tensor, length: int, reverse: bool) -> Tensor:
    """(B, tiles, N, 2, steps of a tile) in the order of the walk -> (2, B, L, N) in the order of the tokens."""
    by_step = sums.permute(3, 0, 1, 4, 2).flatten(2, 3)[:, :, :length]
    return by_step.flip(2) if reverse else by_step


def _flags(A: Tensor, D: Any, z: Any, bias: Any, softplus: bool, reverse: bool) -> dict[str, Any]:
    num_states = A.shape[1]
    return {
        "N": num_states, "NB": state_block(num_states),
        "HAS_D": D is not None, "HAS_Z": z is not None, "HAS_BIAS": bias is not None,
        "SOFTPLUS": softplus, "REVERSE": reverse,
    }  # fmt: skip


def _base_two_rate(A: Tensor) -> Tensor:
    """(N, E): log2(e) goes into A once, since the hardware has exp2 alone."""
    return (A.t() * _LOG2_E).contiguous()


register("zigflow::triton_scan", "zigflow::triton_scan_backward", triton_scan_backward, "triton", CHUNK)
