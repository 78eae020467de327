"""Autocast and loss scaling.

The scaler is our own: it decides from the norm of the whole gradient, so it needs no look inside sharded
parameters, its state is two numbers, and it runs on the CPU, where tests can force an overflow.
"""

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from zigflow.errors import ZigflowError

__all__ = ["LossScaler", "TooManyOverflowsError", "autocast", "clip_gradients", "gradient_norm"]

_DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}


class TooManyOverflowsError(ZigflowError, RuntimeError):
    """fp16 gradients overflowed so often in a row that lowering the scale does not help."""


def autocast(mixed_precision: str | None, device: torch.device) -> AbstractContextManager:
    """The context in which the model runs: ``no``, or None, is a plain one."""
    if mixed_precision in (None, "no"):
        return nullcontext()
    return torch.autocast(device.type, dtype=_DTYPES[mixed_precision])


def gradient_norm(parameters: Sequence[Tensor]) -> Tensor:
    """Two-norm of all gradients together, 0-dimensional; for sharded ones every rank must call this."""
    norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


def clip_gradients(parameters: Sequence[Tensor], max_norm: float, norm: Tensor) -> None:
    """Scale the gradients down in place when ``norm``, theirs, is above ``max_norm``."""
    torch.nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)


class LossScaler:
    """Dynamic loss scale for float16 gradients (Micikevicius et al., "Mixed precision training", ICLR 2018).

    Args:
        enabled: when false the scale is 1 and never changes.
        scale: the first scale, a power of two so that scaling is exact.
        growth_interval: good steps in a row after which the scale doubles.
        max_skips: overflows in a row that raise.
    """

    def __init__(
        self, enabled: bool, *, scale: float = 65536.0, growth_interval: int = 2000, max_skips: int = 50
    ):
        self.enabled = enabled
        self.scale = scale if enabled else 1.0
        self.growth_interval = growth_interval
        self.max_skips = max_skips
        self.good_steps = 0
        self.skips_in_a_row = 0

    @torch.no_grad()
    def unscale(self, parameters: Sequence[Tensor]) -> None:
        """Divide the gradients by the scale, in place."""
        if self.enabled and self.scale != 1.0:
            gradients = [p.grad for p in parameters if p.grad is not None]
            if gradients:
                torch._foreach_mul_(gradients, 1.0 / self.scale)  # pyright: ignore[reportPrivateImportUsage]

    def accepts(self, norm: float) -> bool:
        """Whether the step may be taken, given the norm of the unscaled gradient; adapts the scale.

        Raises:
            TooManyOverflowsError: ``max_skips`` overflows in a row.
        """
        if not self.enabled:
            return True
        if math.isfinite(norm):
            self.skips_in_a_row = 0
            self.good_steps += 1
            if self.good_steps == self.growth_interval:
                self.scale, self.good_steps = min(self.scale * 2.0, 2.0**24), 0
            return True
        self.skips_in_a_row += 1
        self.good_steps = 0
        self.scale = max(self.scale / 2.0, 2.0**-24)
        if self.skips_in_a_row >= self.max_skips:
            raise TooManyOverflowsError(
                f"{self.skips_in_a_row} fp16 gradient overflows in a row, loss scale {self.scale:g}; "
                "use mixed_precision=bf16 or a lower learning rate"
            )
        return False

    def state_dict(self) -> dict[str, float | int]:
        return {
            "enabled": self.enabled,
            "scale": self.scale,
            "good_steps": self.good_steps,
            "skips_in_a_row": self.skips_in_a_row,
        }

    def load_state_dict(self, state: dict) -> None:
        """Take over a stored state; a run may change its precision when it resumes."""
        # Early checkpoints do not say; in them, a scale of 1 was that of another precision.
        if self.enabled and state.get("enabled", state.get("scale", 1.0) != 1.0):
            self.scale = float(state["scale"])
            self.good_steps = int(state["good_steps"])
            self.skips_in_a_row = int(state["skips_in_a_row"])
