"""The selective scan of an installed mamba-ssm package, through the compiled module that it brings.

``selective_scan_cuda`` is what every release of mamba-ssm calls; the package itself imports far more than a scan needs.
Its forward and backward functions are registered as one functional pair of operators, their saved states outputs of
the first: torch.compile and activation checkpointing see them as they see the project's own kernels, and there is no
second derivative. The kernels are channel-major: every sequence is transposed on its way in, once more for backward
(keeping the copies would double what is saved), and every result on its way out. The gradients of A, B, C, D and
delta_bias are added up with float atomics: they are not the same bits from run to run.

Shapes: B batch, L tokens, E channels, N states, K chunks of the package.
"""

import functools
from typing import Any

import torch
from torch import Tensor

from dis_kernels.dispatch import transform_reason
from dis_kernels.installed import check_probe, refusal, tensor_reason

from .call import ScanCall
from .gradient import empty_gradients
from .reference import ReferenceScan

_MAX_STATES = 256
# Chosen by the package; its backward pass reads the states of forward's chunks.
_CHUNK = 2048


class PackageScan:
    """Runs on CUDA devices where mamba-ssm does. Refuses float64, forward-mode AD and torch.func transforms."""

    name = "cuda_package"

    def unavailable(self) -> str | None:
        return _unavailable()

    def accepts(self, call: ScanCall) -> str | None:
        if call.A.shape[1] > _MAX_STATES:
            return f"mamba-ssm takes at most {_MAX_STATES} states, got {call.A.shape[1]}"
        return tensor_reason(call[:8]) or transform_reason(call[:8])

    def run(self, call: ScanCall) -> Tensor:
        return package_scan(*call)[0]


# A compiler need not trace the probe, whose answer is fixed.
@torch.compiler.assume_constant_result
@functools.cache
def _unavailable() -> str | None:
    return refusal("mamba-ssm", probe_scan)


def probe_scan(device: str) -> None:
    """Scan a few tokens, forward and backward; raises what the package raises."""
    u = torch.linspace(-1, 1, 12, device=device).view(1, 4, 3)
    B = torch.linspace(0.5, 1, 8, device=device).view(1, 4, 2)
    A, D = -torch.ones(3, 2, device=device), torch.ones(3, device=device)
    call = ScanCall(u, u, A, B, B, D, u, D, True, False)
    out, states, ungated = package_scan(*call)
    check_probe("mamba-ssm", out, ReferenceScan().run(call))
    package_scan_backward(out, *call[:8], states, ungated, True, False)


def _module() -> Any:
    import selective_scan_cuda  # pyright: ignore[reportMissingImports]

    return selective_scan_cuda


@torch.library.custom_op("zigflow::package_scan", mutates_args=())
def package_scan(
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
) -> tuple[Tensor, Tensor, Tensor]:
    """The output (B,L,E), the package's states (B,E,K,2N) in float32, and with a gate the output before it (B,E,L)."""
    out, states, ungated = _outputs(u, delta, A, B, C, z)
    if u.shape[0] == 0:
        return out, states, ungated
    arguments = _arguments(u, delta, A, B, C, D, z, delta_bias, reverse)
    y_BEL, states, *gated = _module().fwd(*arguments, delta_softplus)
    out = _token_major(gated[0] if gated else y_BEL, u.dtype, reverse)
    # Operators may not return one tensor twice.
    return out, states, y_BEL.contiguous() if gated else ungated


@torch.library.custom_op("zigflow::package_scan_backward", mutates_args=())
def package_scan_backward(
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
    ungated: Tensor,
    delta_softplus: bool,
    reverse: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of u, delta, A, B, C, D, z, delta_bias, each in its tensor's dtype; empty for an absent tensor."""
    inputs = (u, delta, A, B, C, D, z, delta_bias)
    if u.shape[0] == 0:
        return tuple(t.zero_() for t in empty_gradients(*inputs))  # type: ignore[return-value]
    arguments = _arguments(*inputs, reverse)
    grad_BEL = _channel_major(grad, _dtype(u, delta, B, C, z), reverse)
    found = _module().bwd(
        *arguments, grad_BEL, states, None if z is None else ungated, None, delta_softplus, False
    )
    grad_u, grad_delta, grad_A, grad_B, grad_C, grad_D, grad_bias, *grad_z = found
    return (
        _token_major(grad_u, u.dtype, reverse),
        _token_major(grad_delta, delta.dtype, reverse),
        grad_A.to(A.dtype).contiguous(),
        _token_major(grad_B.squeeze(1), B.dtype, reverse),
        _token_major(grad_C.squeeze(1), C.dtype, reverse),
        _absent(u) if D is None else grad_D.to(D.dtype),
        u.new_empty(0) if z is None else _token_major(grad_z[0], z.dtype, reverse),
        _absent(u) if delta_bias is None else grad_bias.to(delta_bias.dtype),
    )


def _arguments(u, delta, A, B, C, D, z, delta_bias, reverse: bool) -> tuple[Tensor | None, ...]:
    """The package's arguments: sequences (B,E,L) in one dtype, B and C (B,1,N,L) as one group of channels."""
    dtype = _dtype(u, delta, B, C, z)
    return (
        _channel_major(u, dtype, reverse),
        _channel_major(delta, dtype, reverse),
        A.contiguous(),
        _channel_major(B, dtype, reverse).unsqueeze(1),
        _channel_major(C, dtype, reverse).unsqueeze(1),
        None if D is None else D.contiguous(),
        None if z is None else _channel_major(z, dtype, reverse),
        None if delta_bias is None else delta_bias.contiguous(),
    )


def _dtype(*sequences: Tensor | None) -> torch.dtype:
    """One dtype for all sequences, which the kernels want, that holds each without loss."""
    return functools.reduce(torch.promote_types, (t.dtype for t in sequences if t is not None))


def _channel_major(x: Tensor, dtype: torch.dtype, reverse: bool) -> Tensor:
    return (x.flip(1) if reverse else x).to(dtype).transpose(1, 2).contiguous()


def _token_major(y_BEL: Tensor, dtype: torch.dtype, reverse: bool) -> Tensor:
    y = y_BEL.transpose(1, 2)
    return (y.flip(1) if reverse else y).to(dtype).contiguous()


def _absent(u: Tensor) -> Tensor:
    return u.new_empty(0, dtype=torch.float32)


def _outputs(u, delta, A, B, C, z) -> tuple[Tensor, Tensor, Tensor]:
    batch, length, channels = u.shape
    states = (batch, channels, -(-length // _CHUNK), 2 * A.shape[1])
    return (
        u.new_empty(u.shape),
        A.new_empty(states),
        u.new_empty(0 if z is None else (batch, channels, length), dtype=_dtype(u, delta, B, C, z)),
    )


@torch.library.register_fake("zigflow::package_scan")
def _(u, delta, A, B, C, D, z, delta_bias, delta_softplus, reverse):
    return _outputs(u, delta, A, B, C, z)


@torch.library.register_fake("zigflow::package_scan_backward")
def _(grad, u, delta, A, B, C, D, z, delta_bias, states, ungated, delta_softplus, reverse):
    return empty_gradients(u, delta, A, B, C, D, z, delta_bias)


def _save(ctx, inputs, output) -> None:
    *tensors, ctx.delta_softplus, ctx.reverse = inputs
    _, states, ungated = output
    ctx.mark_non_differentiable(states, ungated)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, states, ungated)


def _backward(ctx, grad, *_):
    *tensors, states, ungated = ctx.saved_tensors
    if grad is None:
        return (None,) * 10
    grads = package_scan_backward(grad, *tensors, states, ungated, ctx.delta_softplus, ctx.reverse)
    return *(g if t is not None else None for g, t in zip(grads, tensors, strict=True)), None, None


def _no_double_backward(ctx, *grads):
    raise RuntimeError(
        "selective_scan: backend 'cuda_package' has no second derivative: use backend='reference'"
    )


torch.library.register_autograd("zigflow::package_scan", _backward, setup_context=_save)
torch.library.register_autograd("zigflow::package_scan_backward", _no_double_backward)
