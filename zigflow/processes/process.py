"""What every training process offers, and the arithmetic they share.

A process joins data x1 and noise x0 by a path x_t, says what the network has to predict on it, and turns
the prediction back into velocity, score, noise or data. The network knows nothing of it, and a sampler
knows nothing else.

Shapes: B batch; x has shape (B, ...) and t has shape (B,).
"""

from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

ModelFunction = Callable[..., Tensor]
"""``model(x, net_time, y) -> prediction`` of the shape of x; an ``nn.Module`` or any callable."""


@runtime_checkable
class Process(Protocol):
    """The interface that the training loop and the samplers rely on.

    ``prior_scale`` is the standard deviation of the state from which sampling starts. What a process can do beyond this
    is a protocol (:class:`SdeProcess`, :class:`~zigflow.processes.chain.ChainProcess`,
    :class:`~zigflow.processes.chain.BoundedProcess`) or an attribute that is false where it is missing:
    ``reads_variance`` (it trains or samples with the variance that a network of twice the channels predicts) and
    ``feeds_noise_level`` (the network is fed how much noise there is, 0 to about 1000). ``path`` is its interpolant.
    ``registries`` maps those keywords that name something registered to the registry.
    """

    prediction: str
    prior_scale: float

    def sample_time(self, u: Tensor) -> Tensor:
        """Training times (B,) from uniforms (B,) in [0, 1)."""
        ...

    def interval(self, use: str = "train") -> tuple[float, float]:
        """First and last time of training ("train") or of the sampling ODE ("ode")."""
        ...

    def time_map(self, t: Tensor, model: Any) -> Tensor:
        """The time that the network is fed, (B,), for process times (B,)."""
        ...

    def process_time(self, net_time: Tensor, model: Any) -> Tensor:
        """The inverse of :meth:`time_map`."""
        ...

    def loss(self, model: ModelFunction, x1: Tensor, x0: Tensor, t: Tensor, y: Any = None) -> Tensor:
        """One loss per sample, (B,)."""
        ...

    def velocity(self, output: Tensor, x: Tensor, t: Tensor) -> Tensor:
        """Velocity of the probability-flow ODE at (x, t), from the network's output there."""
        ...

    def score(self, output: Tensor, x: Tensor, t: Tensor) -> Tensor:
        """Gradient of the log density at (x, t), from the network's output there."""
        ...

    def noise(self, output: Tensor, x: Tensor, t: Tensor) -> Tensor:
        """Expected noise x0 given x at t, from the network's output there."""
        ...

    def data(self, output: Tensor, x: Tensor, t: Tensor) -> Tensor:
        """Expected data x1 given x at t, from the network's output there."""
        ...


class SdeProcess(Process, Protocol):
    """A process whose sampling SDE is dX = (velocity + D score) dt + sqrt(2 D) dW with D to choose."""

    def sde_interval(
        self, diffusion_form: str, last_step_size: float, evaluates_end: bool
    ) -> tuple[float, float]:
        """First and last time of the SDE; ``evaluates_end``: the solver asks for the drift at the last."""
        ...

    def diffusion(self, x: Tensor, t: Tensor, form: str, norm: float) -> Tensor:
        """D at times t (B,), of shape (B, 1, ...)."""
        ...


def working_dtype(x: Tensor) -> torch.dtype:
    """float64 for a float64 state, else float32: path coefficients lose too much in half precision."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def time_like(t: Tensor | float, x: Tensor) -> Tensor:
    """``t`` as a (B,) tensor on the device of ``x``, in the dtype that coefficients are computed in.

    Raises:
        ValueError: ``t`` is neither a number nor of shape (B,).
    """
    t = torch.as_tensor(t, dtype=working_dtype(x), device=x.device)
    if t.ndim == 0:
        t = t.expand(x.shape[0])
    if t.shape != x.shape[:1]:
        raise ValueError(
            f"t has shape {tuple(t.shape)} for a batch of shape {tuple(x.shape)}; give one time per sample, "
            f"shape ({x.shape[0]},)"
        )
    return t


def over_batch(coefficient: Tensor, x: Tensor) -> Tensor:
    """A (B,) coefficient with trailing axes of size 1, so that it multiplies ``x`` of shape (B, ...)."""
    return coefficient.reshape(coefficient.shape + (1,) * (x.ndim - coefficient.ndim))


def channel_axis(x: Tensor) -> int:
    """The axis of the channels: third from the end for images and videos, 1 for vectors and sequences."""
    return 1 if x.ndim < 4 else x.ndim - 3


def predict_with_variance(
    process: Process, model: ModelFunction, x: Tensor, t: Tensor, y: Any = None
) -> tuple[Tensor, Tensor | None]:
    """Call ``model`` at process time ``t``; its prediction and, of twice as many channels, the variance logits.

    Returns:
        The prediction in the working dtype of x and its shape, and the second half of the channels, or None.

    Raises:
        ValueError: the output has neither the shape of ``x`` nor twice its channels.
    """
    output = model(x, process.time_map(t, model).to(working_dtype(x)), y)
    axis = channel_axis(x)
    doubled = x.ndim > 1 and output.ndim == x.ndim and output.shape[axis] == 2 * x.shape[axis]
    value, variance = output.chunk(2, axis) if doubled else (output, None)
    if value.shape != x.shape:
        raise ValueError(
            f"the model returned shape {tuple(output.shape)} for a state of shape {tuple(x.shape)}; a "
            f"{process.prediction} prediction has the state's shape, with a learned variance twice its channels"
        )
    return value.to(working_dtype(x)), None if variance is None else variance.to(working_dtype(x))


def predict(process: Process, model: ModelFunction, x: Tensor, t: Tensor, y: Any = None) -> Tensor:
    """Call ``model`` at process time ``t`` and return its prediction in the working dtype of ``x``.

    The channels of a learned variance are dropped: only ancestral steps and the variational bound use them.

    Raises:
        ValueError: as :func:`predict_with_variance`.
    """
    return predict_with_variance(process, model, x, t, y)[0]


def mean_over_sample(value: Tensor) -> Tensor:
    """Mean over every axis but the first, (B,)."""
    return value.flatten(1).mean(1)
