"""What the registered scans share: the shapes of their results and how autograd joins forward and backward.

An operator pair has these signatures, with S boundary states between chunks of visited tokens (``chunk_of``)::

    forward(u, delta, A, B, C, D, z, delta_bias, delta_softplus, reverse) -> out (B,L,E), states (B,S,N,E)
    backward(grad, u, delta, A, B, C, D, z, delta_bias, states, delta_softplus, reverse) -> eight gradients

The gradient of an absent tensor is empty. The states are an output, so that selective checkpointing can keep them.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from dis_kernels.dtypes import state_dtype

CHUNK = 32


def chunk_of(dtype: torch.dtype) -> int:
    """Tokens from one boundary state to the next, for sequences of ``dtype``.

    At N = 16 the states, float32 at least, are half the size of one activation (B, L, E).
    """
    return CHUNK * max(1, 4 // dtype.itemsize)


def empty_outputs(u: Tensor, A: Tensor, chunk: int | None = None) -> tuple[Tensor, Tensor]:
    """Uninitialized memory for a forward operator's results, with a state every ``chunk`` tokens."""
    chunk = chunk or chunk_of(u.dtype)
    boundaries = (u.shape[1] + chunk - 1) // chunk - 1
    states = u.new_empty((u.shape[0], boundaries, A.shape[1], u.shape[2]), dtype=state_dtype(u.dtype))
    return torch.empty_like(u, memory_format=torch.contiguous_format), states


def empty_gradients(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Uninitialized contiguous memory for a backward operator's results."""
    dtype = state_dtype(u.dtype)

    def empty(tensor: Tensor | None, absent: torch.dtype) -> Tensor:
        if tensor is None:
            return u.new_empty(0, dtype=absent)
        return torch.empty_like(tensor, memory_format=torch.contiguous_format)

    return (
        empty(u, dtype),
        empty(delta, dtype),
        empty(A, dtype),
        empty(B, dtype),
        empty(C, dtype),
        empty(D, dtype),
        empty(z, u.dtype),
        empty(delta_bias, dtype),
    )


def register(
    forward: str, backward: str, run_backward: Callable, backend: str, chunk: int | None = None
) -> None:
    """Give the operators "namespace::name" ``forward`` and ``backward`` their fake results and autograd rules.

    ``run_backward`` is the backward operator; ``chunk`` counts the tokens between boundary states, where
    ``chunk_of`` does not. A second derivative raises RuntimeError and names ``backend``.
    """

    def fake(u, delta, A, B, C, D, z, delta_bias, delta_softplus, reverse):
        return empty_outputs(u, A, chunk)

    def fake_backward(grad, u, delta, A, B, C, D, z, delta_bias, states, delta_softplus, reverse):
        return empty_gradients(u, delta, A, B, C, D, z, delta_bias)

    def save(ctx, inputs, output) -> None:
        *tensors, ctx.delta_softplus, ctx.reverse = inputs
        states = output[1]
        ctx.mark_non_differentiable(states)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors, states)

    def gradient(ctx, grad, _):
        *tensors, states = ctx.saved_tensors
        if grad is None:
            return (None,) * 10
        grads = run_backward(grad, *tensors, states, ctx.delta_softplus, ctx.reverse)
        return *(g if t is not None else None for g, t in zip(grads, tensors, strict=True)), None, None

    def second(ctx, *grads):
        raise RuntimeError(
            f"selective_scan: backend {backend!r} has no second derivative: use backend='reference'"
        )

    torch.library.register_fake(forward, fake)
    torch.library.register_fake(backward, fake_backward)
    torch.library.register_autograd(forward, gradient, setup_context=save)
    torch.library.register_autograd(backward, second)
