"""Add, norm, modulate, and gate, add, in C++: ``csrc/tokenwise.cpp``, compiled on first use."""

import struct
from pathlib import Path

import torch
from torch import Tensor

from dis_kernels.dispatch import transform_reason
from dis_kernels.native import NativeLibrary, parallel_address, pointer, rows_in_one_piece

from .call import Read, ReadCall, WriteCall, read_mismatch
from .gradient import (
    read_gradients,
    read_results,
    register_read,
    register_write,
    write_gradients,
)

LIBRARY = NativeLibrary(Path(__file__).parent / "csrc" / "tokenwise.cpp")
# By the dtype of the stream and that of what the mixer reads and writes.
_TYPES = {
    (torch.float32, torch.float32): 0,
    (torch.float32, torch.bfloat16): 1,
    (torch.bfloat16, torch.bfloat16): 2,
    (torch.float64, torch.float64): 3,
}
_CALL = struct.Struct("6qd10Q3q13Q")


class CpuRead:
    """Takes CPU tensors of one dtype, or a float32 stream beside bfloat16. Refuses what has no autograd rule here."""

    name = "cpu"

    def unavailable(self) -> str | None:
        return _reason()

    def accepts(self, call: ReadCall) -> str | None:
        tensors = (call.residual, call.hidden, call.weight, call.shift, call.scale)
        return read_mismatch(call) or _refusal(call.residual, call.dtype, tensors)

    def run(self, call: ReadCall) -> Read:
        hidden, residual, weight, shift, scale, _, inverse, *options = call
        x, normed, stream = cpu_add_norm_modulate(hidden, residual, weight, shift, scale, inverse, *options)
        return x, normed if call.keep_normed else None, residual if hidden is None else stream


class CpuWrite:
    """Takes CPU tensors of one dtype, or a float32 base beside bfloat16. Refuses what has no autograd rule here."""

    name = "cpu"

    def unavailable(self) -> str | None:
        return _reason()

    def accepts(self, call: WriteCall) -> str | None:
        return _refusal(call.base, call.y.dtype, call[:3])

    def run(self, call: WriteCall) -> Tensor:
        return cpu_gated_add(call.base, call.y, call.gate, call.order)


def _refusal(stream: Tensor, dtype: torch.dtype, tensors: tuple[Tensor | None, ...]) -> str | None:
    if stream.device.type != "cpu":
        return f"the tensors are on {stream.device}, it runs on the CPU"
    if (stream.dtype, dtype) not in _TYPES:
        return f"the stream is {stream.dtype} beside {dtype}: use backend='torch'"
    return transform_reason(tensors)


# Under torch.compile the answer, which compiles and loads a library, is a constant of the trace.
@torch.compiler.assume_constant_result
def _reason() -> str | None:
    return LIBRARY.reason()


@torch.library.custom_op("zigflow::cpu_add_norm_modulate", mutates_args=())
def cpu_add_norm_modulate(
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
    """x, normed (empty unless kept) and the stream (empty without ``hidden``), see ``tokenwise``."""
    x, normed, stream = results = read_results(hidden, residual, keep_normed, dtype)
    tensors = {"hidden": hidden, "residual": residual, "weight": weight, "shift": shift, "scale": scale}
    outputs = {"x": x, "normed": normed, "stream": stream}
    _run("zigflow_add_norm_modulate", residual, dtype, rows, tensors, outputs, eps, centered)
    return results


@torch.library.custom_op("zigflow::cpu_add_norm_modulate_backward", mutates_args=())
def cpu_add_norm_modulate_backward(
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
    tensors = {"residual": stream, "weight": weight, "scale": scale}
    tensors |= {"grad_x": grad_x, "grad_normed": grad_normed, "grad_stream": grad_stream}
    outputs = {f"grad_{name}": g for name, g in zip(_MODEL, grads, strict=True)}
    _run("zigflow_add_norm_modulate", stream, dtype, rows, tensors, outputs, eps, centered, True)
    return grads


@torch.library.custom_op("zigflow::cpu_gated_add", mutates_args=())
def cpu_gated_add(base: Tensor, y: Tensor, gate: Tensor, rows: Tensor | None) -> Tensor:
    """``base[l] + gate * y[rows[l]]`` in the dtype of the base."""
    out = base.new_empty(base.shape)
    _run("zigflow_gated_add", base, y.dtype, rows, {"base": base, "y": y, "gate": gate}, {"stream": out})
    return out


@torch.library.custom_op("zigflow::cpu_gated_add_backward", mutates_args=())
def cpu_gated_add_backward(
    grad: Tensor, y: Tensor, gate: Tensor, rows: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Gradients of y and gate; that of the base is ``grad``."""
    grad_y, grad_gate = write_gradients(y, gate)
    tensors: dict[str, Tensor | None] = {"grad_stream": grad, "y": y, "gate": gate}
    outputs = {"grad_y": grad_y, "grad_gate": grad_gate}
    _run("zigflow_gated_add", grad, y.dtype, rows, tensors, outputs, backward=True)
    return grad_y, grad_gate


_TENSORS = ("hidden", "residual", "weight", "shift", "scale", "base", "y", "gate")
_GRADIENTS = ("grad_x", "grad_normed", "grad_stream")
_OUTPUTS = (
    "x",
    "normed",
    "stream",
    "grad_residual",
    "grad_weight",
    "grad_shift",
    "grad_scale",
    "grad_y",
    "grad_gate",
)
_MODEL = ("residual", "weight", "shift", "scale")
_BY_ROWS = ("shift", "scale", "gate")


def _run(
    name: str,
    stream: Tensor,
    dtype: torch.dtype,
    rows: Tensor | None,
    tensors: dict[str, Tensor | None],
    outputs: dict[str, Tensor],
    eps: float = 0.0,
    centered: bool = False,
    backward: bool = False,
) -> None:
    """Pack the arguments as the struct ``Call`` of tokenwise.cpp says, allocate its workspace, and run it.

    Raises:
        IndexError: ``rows`` is no permutation of the tokens.
    """
    if stream.shape[0] == 0:
        for output in outputs.values():
            output.zero_()
        return
    kept = {
        key: value if value is None else rows_in_one_piece(value) if key in _BY_ROWS else value.contiguous()
        for key, value in tensors.items()
    }
    rows = None if rows is None else rows.contiguous()
    strides = (0 if (value := kept.get(key)) is None else value.stride(0) for key in _BY_ROWS)
    sizes = (*stream.shape, torch.get_num_threads(), _TYPES[stream.dtype, dtype], centered)
    head = (*sizes, eps, parallel_address(), pointer(rows), *(pointer(kept.get(key)) for key in _TENSORS))
    tail = (pointer(kept.get(key)) for key in _GRADIENTS)
    # An empty tensor's address is 0.
    head = (*head, *strides, *tail, *(pointer(outputs.get(key)) for key in _OUTPUTS))
    function = LIBRARY.function(name)
    workspace = None
    if backward:
        size = function(_CALL.pack(*head, 0), True, True)
        workspace = torch.empty(-(-size // 4), dtype=torch.float32)
    if function(_CALL.pack(*head, pointer(workspace)), backward, False) < 0:
        raise IndexError(
            f"{name.removeprefix('zigflow_')}: the order is no permutation of {stream.shape[1]} tokens"
        )


register_read(
    "zigflow::cpu_add_norm_modulate",
    "zigflow::cpu_add_norm_modulate_backward",
    cpu_add_norm_modulate_backward,
    "cpu",
)
register_write("zigflow::cpu_gated_add", "zigflow::cpu_gated_add_backward", cpu_gated_add_backward, "cpu")
