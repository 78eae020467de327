"""Add, norm, modulate, and gate, add, in Triton: the kernels' launches, registered with torch, and their backends.

Shapes: B batch, L tokens, D width, R runs of tokens of a row of the batch, K sums.
"""

from typing import Any

import torch
from torch import Tensor

from dis_kernels.dispatch import transform_reason
from dis_kernels.native import rows_in_one_piece
from dis_kernels.triton_launch import interpreted, launch_reason, unavailable

from .call import Read, ReadCall, WriteCall, read_mismatch
from .gradient import (
    read_gradients,
    read_results,
    register_read,
    register_write,
    write_gradients,
)

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Backward keeps some twelve values of every channel, and a multiprocessor has 65,536 registers: more would spill.
_MAX_WIDTH = 4096
# Channels of one warp: 16 bytes of float32 to a lane, so that no store wants another layout than the sums.
_CHANNELS = 128
# Backward's programs: enough for a large GPU, in runs that keep their sums a small part of all that is written.
_PROGRAMS, _SHORTEST, _LONGEST = 1024, 4, 64


class TritonRead:
    """Runs on CUDA devices, eagerly. Refuses float64, forward-mode AD and torch.func transforms."""

    name = "triton"
    eager_only = True

    def unavailable(self) -> str | None:
        return unavailable()

    def accepts(self, call: ReadCall) -> str | None:
        tensors = (call.residual, call.hidden, call.weight, call.shift, call.scale)
        return _refusal(call.residual, call.dtype, tensors) or read_mismatch(call)

    def run(self, call: ReadCall) -> Read:
        hidden, residual, weight, shift, scale, _, inverse, *options = call
        x, normed, stream = triton_add_norm_modulate(
            hidden, residual, weight, shift, scale, inverse, *options
        )
        return x, normed if call.keep_normed else None, residual if hidden is None else stream


class TritonWrite:
    """Runs on CUDA devices, eagerly. Refuses float64, forward-mode AD and torch.func transforms."""

    name = "triton"
    eager_only = True

    def unavailable(self) -> str | None:
        return unavailable()

    def accepts(self, call: WriteCall) -> str | None:
        return _refusal(call.base, call.y.dtype, call[:3])

    def run(self, call: WriteCall) -> Tensor:
        return triton_gated_add(call.base, call.y, call.gate, call.order)


def _refusal(stream: Tensor, dtype: torch.dtype, tensors: tuple[Tensor | None, ...]) -> str | None:
    if torch.compiler.is_compiling():
        return "torch.compile makes one kernel of these operations and their neighbors: use backend='torch'"
    if not stream.is_cuda and not interpreted():
        return f"it takes CUDA tensors, got {stream.device.type}"
    if torch.float64 in (stream.dtype, dtype):
        return "it computes in float32, and an argument is float64: use backend='torch'"
    if stream.dtype not in _DTYPES or dtype not in _DTYPES:
        return f"the stream is {stream.dtype} beside {dtype}: use backend='torch'"
    batch, length, width = stream.shape
    if width > _MAX_WIDTH:
        got = f"{_MAX_WIDTH} channels does not fit into registers, got {width}"
        return f"a token of more than {got}: use backend='torch'"
    return launch_reason(length, (batch * length,)) or transform_reason(tensors)


def tile(width: int) -> dict[str, int]:
    """The channels that a program holds, a power of two, and its warps."""
    block = 1 << (width - 1).bit_length()
    return {"BLOCK": block, "num_warps": max(1, block // _CHANNELS)}


def runs_of(batch: int, length: int) -> tuple[int, int]:
    """Runs of a row of the batch, and the tokens of one; by the shape alone, so that no other GPU changes a bit."""
    tokens = min(length, max(_SHORTEST, min(_LONGEST, batch * length // _PROGRAMS)))
    return -(-length // tokens), tokens


def _launch(name: str, programs: int, *arguments: Any, **constants: Any) -> None:
    # Imported at use: Triton is missing on some platforms.
    from . import triton_kernels

    getattr(triton_kernels, name)[(programs,)](*arguments, **constants, enable_fp_fusion=True)


def _whole(*tensors: Tensor | None) -> list[Tensor | None]:
    return [None if t is None else t.contiguous() for t in tensors]


def _by_batch(tensor: Tensor | None) -> tuple[Tensor | None, int]:
    """Rows (B,D), each in one piece, and how far apart two of them are."""
    if tensor is None:
        return None, 0
    tensor = rows_in_one_piece(tensor)
    return tensor, tensor.stride(0)


@torch.library.custom_op("zigflow::triton_add_norm_modulate", mutates_args=())
def triton_add_norm_modulate(
    hidden: Tensor | None,
    residual: Tensor,
    weight: Tensor | None,
    shift: Tensor | None,
    scale: Tensor | None,
    rows: Tensor | None,
    eps: float,
    centered: bool,
    keep_normed: bool,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """x, normed (empty unless kept) and the stream (empty without ``hidden``), see ``gradient``."""
    results = read_results(hidden, residual, keep_normed, dtype)
    batch, length, width = residual.shape
    if batch:
        hidden, residual_, weight, rows = _whole(hidden, residual, weight, rows)
        (shift, shift_step), (scale, scale_step) = _by_batch(shift), _by_batch(scale)
        _launch(
            "read_forward", batch * length,
            hidden, residual_, weight, shift, scale, rows, *results, length, width, shift_step, scale_step, eps,
            HAS_HIDDEN=hidden is not None, HAS_WEIGHT=weight is not None, MODULATED=scale is not None,
            HAS_ROWS=rows is not None, KEEP_NORMED=keep_normed, CENTERED=centered, **tile(width),
        )  # fmt: skip
    return results


@torch.library.custom_op("zigflow::triton_add_norm_modulate_backward", mutates_args=())
def triton_add_norm_modulate_backward(
    grad_x: Tensor | None,
    grad_normed: Tensor | None,
    grad_stream: Tensor | None,
    stream: Tensor,
    weight: Tensor | None,
    scale: Tensor | None,
    rows: Tensor | None,
    eps: float,
    centered: bool,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of residual, weight, shift and scale."""
    grads = read_gradients(stream, weight, scale, dtype)
    batch, length, width = stream.shape
    runs, run = runs_of(batch, length)
    modulated, weighted = scale is not None, weight is not None
    sums_BRKD = torch.empty(
        (batch, runs, 2 * modulated + weighted, width), dtype=torch.float32, device=stream.device
    )
    if batch:
        grad_x, grad_normed, grad_stream, stream_, weight, rows = _whole(
            grad_x, grad_normed, grad_stream, stream, weight, rows
        )
        scale, scale_step = _by_batch(scale)
        _launch(
            "read_backward", batch * runs,
            grad_x, grad_normed, grad_stream, stream_, weight, scale, rows, grads[0], sums_BRKD,
            length, width, run, runs, scale_step, eps,
            HAS_X=grad_x is not None, HAS_NORMED=grad_normed is not None, HAS_STREAM=grad_stream is not None,
            HAS_WEIGHT=weighted, MODULATED=modulated, HAS_ROWS=rows is not None, CENTERED=centered, **tile(width),
        )  # fmt: skip
    if modulated or weighted:
        sums_BKD = sums_BRKD.sum(1)
        if modulated:
            grads[2].copy_(sums_BKD[:, 0])
            grads[3].copy_(sums_BKD[:, 1])
        if weighted:
            grads[1].copy_(sums_BKD[:, -1].sum(0))
    return grads


@torch.library.custom_op("zigflow::triton_gated_add", mutates_args=())
def triton_gated_add(base: Tensor, y: Tensor, gate: Tensor, rows: Tensor | None) -> Tensor:
    """``base[l] + gate * y[rows[l]]`` in the dtype of the base."""
    out = base.new_empty(base.shape)
    batch, length, width = base.shape
    if batch:
        base_, y_, rows = _whole(base, y, rows)
        gate_, gate_step = _by_batch(gate)
        _launch(
            "write_forward", batch * length, base_, y_, gate_, rows, out, length, width, gate_step,
            HAS_ROWS=rows is not None, **tile(width),
        )  # fmt: skip
    return out


@torch.library.custom_op("zigflow::triton_gated_add_backward", mutates_args=())
def triton_gated_add_backward(
    grad: Tensor, y: Tensor, gate: Tensor, rows: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Gradients of y and gate; that of the base is ``grad``."""
    grad_y, grad_gate = write_gradients(y, gate)
    batch, length, width = y.shape
    runs, run = runs_of(batch, length)
    sums_BRD = torch.empty((batch, runs, width), dtype=torch.float32, device=y.device)
    if batch:
        grad_, y_, rows = _whole(grad, y, rows)
        gate_, gate_step = _by_batch(gate)
        _launch(
            "write_backward", batch * runs,
            grad_, y_, gate_, rows, grad_y, sums_BRD, length, width, run, runs, gate_step,
            HAS_ROWS=rows is not None, **tile(width),
        )  # fmt: skip
    return grad_y, grad_gate.copy_(sums_BRD.sum(1))


register_read(
    "zigflow::triton_add_norm_modulate",
    "zigflow::triton_add_norm_modulate_backward",
    triton_add_norm_modulate_backward,
    "triton",
)
register_write(
    "zigflow::triton_gated_add", "zigflow::triton_gated_add_backward", triton_gated_add_backward, "triton"
)
