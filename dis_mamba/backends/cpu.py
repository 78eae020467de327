"""The selective scan in C++: ``csrc/scan.cpp``, compiled on first use (``dis_causal_conv1d.native``)."""

import struct
from pathlib import Path

import torch
from torch import Tensor

from dis_causal_conv1d.dispatch import transform_reason
from dis_causal_conv1d.native import NativeLibrary, parallel_address, pointer, rows_in_one_piece

from .call import ScanCall, state_dtype
from .gradient import CHUNK, empty_gradients, empty_outputs, register

LIBRARY = NativeLibrary(Path(__file__).parents[1] / "csrc" / "scan.cpp", {"ZIGFLOW_CHUNK": CHUNK})
_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float64: 2}
_CALL = struct.Struct("9q9Q12q11Q")


class CpuScan:
    """Takes CPU tensors. Refuses forward-mode AD and torch.func transforms, which need ``reference``."""

    name = "cpu"

    def unavailable(self) -> str | None:
        return _reason()

    def accepts(self, call: ScanCall) -> str | None:
        if call.u.device.type != "cpu":
            return f"the tensors are on {call.u.device}, it runs on the CPU"
        return transform_reason(call[:8])

    def run(self, call: ScanCall) -> Tensor:
        sequences = (call.u, call.delta, call.B, call.C, call.z)
        dtypes = {t.dtype for t in sequences if t is not None}
        if len(dtypes) == 1 and call.u.dtype in _DTYPES:
            return cpu_scan(*call)[0]
        # float16 and mixed dtypes are computed in the type of the state.
        dtype = state_dtype(call.u.dtype)
        u, delta, B, C, z = (None if t is None else t.to(dtype) for t in sequences)
        wide = call._replace(u=u, delta=delta, B=B, C=C, z=z)
        return cpu_scan(*wide)[0].to(call.u.dtype)


# Under torch.compile the answer, which compiles and loads a library, is a constant of the trace.
@torch.compiler.assume_constant_result
def _reason() -> str | None:
    return LIBRARY.reason()


@torch.library.custom_op("zigflow::cpu_scan", mutates_args=())
def cpu_scan(
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
    """The output (B,L,E) and the states at the chunk boundaries (B,S,N,E). The sequences share one dtype."""
    out, states = empty_outputs(u, A)
    if u.shape[0] > 0:
        tensors = (u, delta, A, B, C, D, z, delta_bias)
        _run(tensors, None, (out, states), (), delta_softplus, reverse)
    return out, states


@torch.library.custom_op("zigflow::cpu_scan_backward", mutates_args=())
def cpu_scan_backward(
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
    tensors = (u, delta, A, B, C, D, z, delta_bias)
    grads = empty_gradients(*tensors)
    if u.shape[0] == 0:
        return tuple(g.zero_() for g in grads)  # type: ignore[return-value]
    _run(tensors, grad, (None, states.contiguous()), grads, delta_softplus, reverse)
    return grads


def _run(tensors, grad, outputs, grads, delta_softplus: bool, reverse: bool) -> None:
    """Pack the arguments as the struct ``Call`` of scan.cpp says, allocate its workspace, and run it."""
    u, delta, B, C = (rows_in_one_piece(tensors[i]) for i in (0, 1, 3, 4))
    z, grad = (None if t is None else rows_in_one_piece(t) for t in (tensors[6], grad))
    A, D, bias = (None if t is None else t.contiguous() for t in (tensors[2], tensors[5], tensors[7]))
    sequences = (u, delta, B, C, z, grad)
    strides = [s for t in sequences for s in ((0, 0) if t is None else t.stride()[:2])]
    sizes = (
        *u.shape,
        tensors[2].shape[1],
        delta_softplus,
        reverse,
        torch.get_num_threads(),
        _DTYPES[u.dtype],
    )
    absent = [t is None for t in tensors]
    function = LIBRARY.load().zigflow_scan
    pointers = [0 if a else g.data_ptr() for g, a in zip(grads, absent, strict=False)] or [0] * 8

    def pack(workspace: int) -> bytes:
        tensors = map(pointer, (u, delta, A, B, C, D, z, bias, grad))
        return _CALL.pack(
            *sizes, parallel_address(), *tensors, *strides, *map(pointer, outputs), *pointers, workspace
        )

    backward = grad is not None
    workspace = torch.empty(-(-function(pack(0), backward, True) // 4), dtype=torch.float32)
    function(pack(workspace.data_ptr()), backward, False)


register("zigflow::cpu_scan", "zigflow::cpu_scan_backward", cpu_scan_backward, "cpu")
