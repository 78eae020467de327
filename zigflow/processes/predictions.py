"""What a network can be asked to predict: a combination a(t) x1 + b(t) x0 of data and noise.

With the state x = alpha x1 + sigma x0 and D = alpha b - sigma a, a prediction p determines both again:

    x1 = (b x - sigma p) / D        x0 = (alpha p - a x) / D

so that any prediction turns into any other. Processes write these quotients out for the predictions that they know,
where an end point makes one of them zero over zero. ``a`` and ``b`` are (B,), as the times are.
"""

from abc import ABC, abstractmethod
from typing import Protocol

import torch
from torch import Tensor

from zigflow.registry import Registry

from .process import over_batch


class Path(Protocol):
    """What a prediction asks of an interpolant; see :class:`~zigflow.processes.interpolants.Interpolant`."""

    def alpha(self, t: Tensor) -> Tensor: ...

    def sigma(self, t: Tensor) -> Tensor: ...

    def d_alpha(self, t: Tensor) -> Tensor: ...

    def d_sigma(self, t: Tensor) -> Tensor: ...


class Prediction(ABC):
    """One prediction. A new one needs ``pair`` alone.

    Attributes:
        bounded: a and b are finite for every path and time. Diffusion processes, which are trained at all times, take
            such predictions alone.
        regular: where the path's derivatives are finite at both ends, a network can be trained and asked at all times.
    """

    bounded = True
    regular = False

    @abstractmethod
    def pair(self, path: Path, t: Tensor) -> tuple[Tensor, Tensor]:
        """(a, b) at times t (B,)."""

    def error_pair(self, path: Path, t: Tensor) -> tuple[Tensor, Tensor]:
        """(a, b) of the quantity whose error :meth:`error` is, up to its sign."""
        return self.pair(path, t)

    def target(self, path: Path, x1: Tensor, x0: Tensor, t: Tensor) -> Tensor:
        """What a perfect network would output for data x1 and noise x0 (B, ...) at times t (B,)."""
        a, b = self.pair(path, t)
        return over_batch(a, x1) * x1 + over_batch(b, x0) * x0

    def error(self, path: Path, output: Tensor, x1: Tensor, x0: Tensor, t: Tensor) -> Tensor:
        """What the loss squares, (B, ...)."""
        return output - self.target(path, x1, x0, t)


PREDICTIONS: Registry[Prediction] = Registry("prediction")
"""What ``train.prediction`` and ``process.prediction`` name."""


def register_prediction(name: str):
    """Register a class of :class:`Prediction`, which is built without arguments, under ``name``."""

    def add(cls: type[Prediction]) -> type[Prediction]:
        PREDICTIONS.register(name, cls())
        return cls

    return add


def bounded_predictions() -> list[str]:
    """The names of predictions that are finite at all times."""
    return [name for name in PREDICTIONS.names() if PREDICTIONS.get(name).bounded]


class _Velocity(Prediction):
    """alpha' x1 + sigma' x0."""

    bounded = False
    regular = True

    def pair(self, path: Path, t: Tensor) -> tuple[Tensor, Tensor]:
        return path.d_alpha(t), path.d_sigma(t)


class _Score(Prediction):
    """-x0 / sigma; its error is taken times sigma, which is that of the noise."""

    bounded = False

    def pair(self, path: Path, t: Tensor) -> tuple[Tensor, Tensor]:
        return torch.zeros_like(t), -1 / path.sigma(t)

    def error_pair(self, path: Path, t: Tensor) -> tuple[Tensor, Tensor]:
        return torch.zeros_like(t), torch.ones_like(t)

    def target(self, path: Path, x1: Tensor, x0: Tensor, t: Tensor) -> Tensor:
        return -x0 / over_batch(path.sigma(t), x0)

    def error(self, path: Path, output: Tensor, x1: Tensor, x0: Tensor, t: Tensor) -> Tensor:
        return output * over_batch(path.sigma(t), output) + x0


class _Noise(Prediction):
    def pair(self, path: Path, t: Tensor) -> tuple[Tensor, Tensor]:
        return torch.zeros_like(t), torch.ones_like(t)

    def target(self, path: Path, x1: Tensor, x0: Tensor, t: Tensor) -> Tensor:
        return x0


class _Data(Prediction):
    def pair(self, path: Path, t: Tensor) -> tuple[Tensor, Tensor]:
        return torch.ones_like(t), torch.zeros_like(t)

    def target(self, path: Path, x1: Tensor, x0: Tensor, t: Tensor) -> Tensor:
        return x1


class _V(Prediction):
    """alpha x0 - sigma x1 (Salimans & Ho 2022)."""

    def pair(self, path: Path, t: Tensor) -> tuple[Tensor, Tensor]:
        return -path.sigma(t), path.alpha(t)

    def target(self, path: Path, x1: Tensor, x0: Tensor, t: Tensor) -> Tensor:
        return over_batch(path.alpha(t), x0) * x0 - over_batch(path.sigma(t), x1) * x1


PREDICTIONS.register("velocity", _Velocity())
PREDICTIONS.register("score", _Score())
PREDICTIONS.register("noise", _Noise())
PREDICTIONS.register("data", _Data())
PREDICTIONS.register("v", _V())


def conversion(path: Path, source: str, target: str, t: Tensor) -> tuple[Tensor, Tensor]:
    """(p, q) with target = p x + q source at times t (B,), by the general formula.

    Raises:
        UnknownNameError: a prediction that does not exist.
    """
    a, b = PREDICTIONS.get(source).pair(path, t)
    c, d = PREDICTIONS.get(target).pair(path, t)
    alpha, sigma = path.alpha(t), path.sigma(t)
    whole = alpha * b - sigma * a
    return (c * b - d * a) / whole, (d * alpha - c * sigma) / whole
