"""What the registered convolutions share: the shapes of their results and how autograd joins forward and backward.

An operator pair has these signatures; the gradient of an absent bias is empty::

    forward(x, weight, bias, silu, reverse) -> out (B,L,E)
    backward(grad, x, weight, bias, silu, reverse) -> gradients of x, weight, bias
"""

from collections.abc import Callable

import torch
from torch import Tensor

from dis_kernels.dtypes import state_dtype


def empty_gradients(x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Uninitialized contiguous memory for a backward operator's results."""
    no_bias = x.new_empty(0, dtype=state_dtype(x.dtype))
    return (
        x.new_empty(x.shape),
        weight.new_empty(weight.shape),
        no_bias if bias is None else bias.new_empty(bias.shape),
    )


def register(forward: str, backward: str, run_backward: Callable, backend: str) -> None:
    """Give the operators "namespace::name" ``forward`` and ``backward`` their fake results and autograd rules.

    ``run_backward`` is the backward operator. A second derivative raises RuntimeError and names ``backend``.
    """

    def fake(x, weight, bias, silu, reverse):
        return x.new_empty(x.shape)

    def fake_backward(grad, x, weight, bias, silu, reverse):
        return empty_gradients(x, weight, bias)

    def save(ctx, inputs, output) -> None:
        x, weight, bias, ctx.silu, ctx.reverse = inputs
        ctx.save_for_backward(x, weight, bias)

    def gradient(ctx, grad):
        x, weight, bias = ctx.saved_tensors
        grad_x, grad_weight, grad_bias = run_backward(grad, x, weight, bias, ctx.silu, ctx.reverse)
        return grad_x, grad_weight, None if bias is None else grad_bias, None, None

    def second(ctx, *grads):
        raise RuntimeError(
            f"causal_conv1d: backend {backend!r} has no second derivative: use backend='reference'"
        )

    torch.library.register_fake(forward, fake)
    torch.library.register_fake(backward, fake_backward)
    torch.library.register_autograd(forward, gradient, setup_context=save)
    torch.library.register_autograd(backward, second)
