"""Classifier-free guidance (Ho & Salimans 2022), optionally on an interval of times (Kynkaanniemi et al. 2024)."""

import math
from typing import Any

import torch
from torch import Tensor

from zigflow.nn import as_denoiser
from zigflow.processes.process import Process, channel_axis

from .conditions import concatenate


class ModelFunction:
    """What stands in a model's place for a sampler: all but the output is asked of the model itself."""

    model: Any

    @property
    def time_scale(self) -> float:
        return as_denoiser(self.model).time_scale

    @property
    def time_factor(self) -> float:
        return as_denoiser(self.model).time_factor

    def null_condition(self, y: Any) -> Any:
        return self.model.null_condition(y)

    def always_doubled(self) -> "ModelFunction":
        """The same without calls that are left out for a whole batch, where a sample's bits would follow the others."""
        return self


class Guided(ModelFunction):
    """A model function: out = uncond + w (cond - uncond), from one call of ``model`` on a doubled batch.

    Args:
        model: ``model(x, t, y)`` with ``null_condition(y)``, which returns the condition "nothing" built like y.
        scale: w, a number or one per sample (B,); 1 is off and calls the model once, undoubled.
        interval: (low, high) process times between which guidance acts; elsewhere the output is conditional.
        channels: guide the first so many channels only; the rest is the conditional output (official DiT
            and DiS checkpoints: 3). None: those of the prediction; a learned variance stays conditional.
        process: whose times ``interval`` is about; None: those that a flow feeds.

    Published scales s with s = w - 1 (U-ViT, DiM) are converted by the caller.

    Raises:
        ValueError: a scale that is not finite, an empty interval, guidance of a model that cannot be
            asked without a condition.
    """

    def __init__(
        self,
        model: Any,
        scale: float | Tensor,
        interval: tuple[float, float] = (0.0, 1.0),
        channels: int | None = None,
        skip_outside: bool = True,
        process: Process | None = None,
    ):
        if not isinstance(scale, Tensor) and not math.isfinite(scale):
            raise ValueError(f"the guidance scale is {scale}; give a finite number (1 = off)")
        low, high = interval
        if not low <= high:
            raise ValueError(
                f"the guidance interval {tuple(interval)} is empty; give (low, high) with low <= high"
            )
        if channels is not None and channels < 1:
            raise ValueError(f"guidance on {channels} channels; give a positive number, or None for all")
        self.model = model
        self.scale = scale
        self.interval = (low, high)
        self.channels = channels
        self.skip_outside = skip_outside
        self.process = process
        if self.active and not as_denoiser(model).has_null:
            raise ValueError(
                f"guidance with scale {scale} asks {type(model).__name__} for an output without condition, but it has "
                "no null_condition; train it with class_dropout_prob > 0, or sample with cfg_scale=1"
            )

    @property
    def active(self) -> bool:
        return isinstance(self.scale, Tensor) or self.scale != 1

    def always_doubled(self) -> "Guided":
        """The same guidance without the single call outside the interval.

        Where the samples of a batch are at different times, whether all of them are outside would depend on the
        neighbours, and so would a sample's bits.
        """
        return Guided(self.model, self.scale, self.interval, self.channels, False, self.process)

    def __call__(self, x: Tensor, t: Tensor, y: Any = None) -> Tensor:
        """Guided output (B, ...) for x (B, ...), net times t (B,) and a condition y.

        Raises:
            ValueError: guidance is on and y is None.
        """
        if not self.active:
            return self.model(x, t, y)
        if y is None:
            raise ValueError(
                f"guidance with scale {self.scale} needs a condition y; give labels or tokens, or use cfg_scale=1"
            )
        inside = self._inside(t)
        if inside is not None and self.skip_outside and not inside.any():
            return self.model(x, t, y)
        doubled = self.model(
            torch.cat([x, x]), torch.cat([t, t]), concatenate(y, self.model.null_condition(y))
        )
        dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        cond, uncond = doubled.to(dtype).chunk(2)
        weight = self._weights(inside, cond)
        guided = uncond + weight * (cond - uncond)
        if inside is not None:
            guided = torch.where(inside.reshape(weight.shape), guided, cond)
        axis = channel_axis(cond)
        channels = min(x.shape[axis], cond.shape[axis]) if self.channels is None else self.channels
        rest = cond.shape[axis] - channels
        if rest < 0:
            raise ValueError(f"guidance on {channels} channels of an output with {cond.shape[axis]}")
        if rest == 0:
            return guided
        return torch.cat([guided.narrow(axis, 0, channels), cond.narrow(axis, channels, rest)], dim=axis)

    def _inside(self, t: Tensor) -> Tensor | None:
        """(B,) mask of samples that are guided at net time t; None where the interval is all of [0, 1]."""
        low, high = self.interval
        if low <= 0 and high >= 1:
            return None
        process_time = t / self.time_scale if self.process is None else self.process.process_time(t, self)
        return (process_time >= low) & (process_time <= high)

    def _weights(self, inside: Tensor | None, x: Tensor) -> Tensor:
        scale = torch.as_tensor(self.scale, dtype=x.dtype, device=x.device)
        if scale.ndim and scale.shape != x.shape[:1]:
            raise ValueError(
                f"guidance scales have shape {tuple(scale.shape)}; give one number or ({x.shape[0]},)"
            )
        return scale.expand(x.shape[0]).reshape(-1, *(1,) * (x.ndim - 1))
