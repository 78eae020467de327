"""The selective scan in C++: ``csrc/scan.cpp``, compiled on first use (``dis_kernels.native``)."""

import struct
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from dis_kernels.dispatch import transform_reason
from dis_kernels.dtypes import state_dtype
from dis_kernels.native import NativeLibrary, parallel_address, pointer, rows_in_one_piece

from .call import ScanCall
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
    u, delta, A, B, C, D, z, bias = tensors
    u, delta, B, C = (rows_in_one_piece(t) for t in (u, delta, B, C))
    z, grad = (None if t is None else rows_in_one_piece(t) for t in (z, grad))
    A, D, bias = A.contiguous(), *(None if t is None else t.contiguous() for t in (D, bias))
    strides = [s for t in (u, delta, B, C, z, grad) for s in ((0, 0) if t is None else t.stride()[:2])]
    sizes = (*u.shape, A.shape[1], delta_softplus, reverse, torch.get_num_threads(), _DTYPES[u.dtype])
    backward = grad is not None
    workspace = torch.empty(_workspace_size(LIBRARY, sizes, backward), dtype=torch.float32)
    call = _CALL.pack(
        *sizes,
        parallel_address(),
        *map(pointer, (u, delta, A, B, C, D, z, bias, grad)),
        *strides,
        *map(pointer, outputs),
        *(map(pointer, grads) if backward else (0,) * 8),  # an empty tensor's address is 0
        workspace.data_ptr(),
    )
    LIBRARY.function("zigflow_scan")(call, backward, False)


@lru_cache(maxsize=1024)
def _workspace_size(library: NativeLibrary, sizes: tuple[int, ...], backward: bool) -> int:
    """In elements of float32."""
    call = _CALL.pack(*sizes, *(0,) * 33)
    return -(-library.function("zigflow_scan")(call, backward, True) // 4)


register("zigflow::cpu_scan", "zigflow::cpu_scan_backward", cpu_scan_backward, "cpu")
