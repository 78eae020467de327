"""What the registered operators share: the shapes of their results and how autograd joins forward and backward.

Operator pairs have these signatures; absent results and gradients are empty tensors::

    add_norm_modulate(hidden, residual, weight, shift, scale, rows, eps, centered, keep_normed, dtype)
        -> x, normed, stream (B,L,D)
    add_norm_modulate_backward(grad_x, grad_normed, grad_stream, stream, weight, scale, rows, eps, centered, dtype)
        -> gradients of residual, weight, shift, scale
    gated_add(base, y, gate, rows) -> (B,L,D)
    gated_add_backward(grad, y, gate, rows) -> gradients of y, gate

``rows[l]`` is the place of the raster's token l in the mixer's sequence. Nothing but the stream is kept for backward:
the norm is computed again, which costs less than reading it.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from dis_kernels.dtypes import state_dtype


def read_results(
    hidden: Tensor | None, residual: Tensor, keep_normed: bool, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Uninitialized memory for x, normed and stream."""
    shape = residual.shape
    return (
        residual.new_empty(shape, dtype=dtype),
        residual.new_empty(shape if keep_normed else 0, dtype=dtype),
        residual.new_empty(0 if hidden is None else shape),
    )


def read_gradients(
    stream: Tensor, weight: Tensor | None, scale: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Uninitialized memory for the gradients of residual, weight, shift, scale."""
    batch, _, width = stream.shape
    modulation = (0,) if scale is None else (batch, width)
    return (
        stream.new_empty(stream.shape),
        stream.new_empty(0 if weight is None else width, dtype=state_dtype(stream.dtype)),
        stream.new_empty(modulation, dtype=dtype),
        stream.new_empty(modulation, dtype=dtype),
    )


def write_gradients(y: Tensor, gate: Tensor) -> tuple[Tensor, Tensor]:
    """Uninitialized memory for the gradients of y and gate."""
    return y.new_empty(y.shape), gate.new_empty(gate.shape)


def register_read(forward: str, backward: str, run_backward: Callable, backend: str) -> None:
    """Give the operators "namespace::name" their fake results and autograd rules; ``run_backward`` is the second."""

    def fake(hidden, residual, weight, shift, scale, rows, eps, centered, keep_normed, dtype):
        return read_results(hidden, residual, keep_normed, dtype)

    def fake_backward(grad_x, grad_normed, grad_stream, stream, weight, scale, rows, eps, centered, dtype):
        return read_gradients(stream, weight, scale, dtype)

    def save(ctx, inputs, output) -> None:
        hidden, residual, weight, _, scale, rows, ctx.eps, ctx.centered, ctx.keep_normed, ctx.dtype = inputs
        ctx.has_hidden = hidden is not None
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(residual if hidden is None else output[2], weight, scale, rows)

    def gradient(ctx, grad_x, grad_normed, grad_stream):
        stream, weight, scale, rows = ctx.saved_tensors
        if not ctx.keep_normed:
            grad_normed = None
        if not ctx.has_hidden:
            grad_stream = None
        if grad_x is None and grad_normed is None and grad_stream is None:
            return (None,) * 10
        whole, *others = run_backward(
            grad_x, grad_normed, grad_stream, stream, weight, scale, rows, ctx.eps, ctx.centered, ctx.dtype
        )
        present = (weight, scale, scale)
        others = (g if t is not None else None for g, t in zip(others, present, strict=True))
        hidden = whole.to(ctx.dtype) if ctx.has_hidden and ctx.needs_input_grad[0] else None
        return hidden, whole, *others, *(None,) * 5

    torch.library.register_fake(forward, fake)
    torch.library.register_fake(backward, fake_backward)
    torch.library.register_autograd(forward, gradient, setup_context=save)
    torch.library.register_autograd(backward, _no_second_derivative("add_norm_modulate", backend))


def register_write(forward: str, backward: str, run_backward: Callable, backend: str) -> None:
    """Give the operators "namespace::name" their fake results and autograd rules; ``run_backward`` is the second."""

    def fake(base, y, gate, rows):
        return base.new_empty(base.shape)

    def fake_backward(grad, y, gate, rows):
        return write_gradients(y, gate)

    def save(ctx, inputs, output) -> None:
        _, y, gate, rows = inputs
        ctx.save_for_backward(y, gate, rows)

    def gradient(ctx, grad):
        return grad, *run_backward(grad, *ctx.saved_tensors), None

    torch.library.register_fake(forward, fake)
    torch.library.register_fake(backward, fake_backward)
    torch.library.register_autograd(forward, gradient, setup_context=save)
    torch.library.register_autograd(backward, _no_second_derivative("gated_add", backend))


def _no_second_derivative(op: str, backend: str) -> Callable:
    def second(ctx, *grads):
        raise RuntimeError(f"{op}: backend {backend!r} has no second derivative: use use_backend('torch')")

    return second
