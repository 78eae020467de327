"""Weights of what long skip connections bring, by the noise level: "skip tuning" as DiM publishes it.

Block by block they lie at 1 - (1 - b) t / 1000 for net times t in 0..1000, 1000 being pure noise; b goes evenly from
the bound of the first joining block to that of the last one. The published code takes t = 1 whatever the time is, by
which the weights are 1 within 2e-4.
"""

from typing import Any

import torch
from torch import Tensor

from zigflow.registry import unknown_name

SKIP_TUNING = ("as_published", "as_intended")


def check_skip_tuning(mode: str | None) -> None:
    """Raises:
    UnknownNameError: neither None nor in SKIP_TUNING.
    """
    if mode is not None and mode not in SKIP_TUNING:
        raise unknown_name("skip tuning", mode, list(SKIP_TUNING))


def skip_weights(
    t_B: Tensor, mode: str | None, bounds: tuple[float, float], joining: int
) -> list[Tensor | None]:
    """For each of ``joining`` blocks, first to last, the weights (B,) of what it joins, or None.

    Args:
        t_B: net times, 0..1000.
        mode: None, "as_published" or "as_intended".
        bounds: b of the last and of the first joining block.
    """
    if mode is None:
        return [None] * joining
    last, first = bounds
    noise_B = t_B.to(torch.promote_types(t_B.dtype, torch.float32)) / 1000
    if mode == "as_published":
        noise_B = torch.full_like(noise_B, 1 / 1000)
    b = torch.linspace(first, last, joining, dtype=noise_B.dtype, device=noise_B.device)
    return list(1 - (1 - b.unsqueeze(1)) * noise_B)


def set_skip_tuning(model: Any, mode: str | None, bounds: tuple[float, float]) -> None:
    """Weigh the long skips of ``model`` from now on.

    Raises:
        UnknownNameError: an unknown mode.
        ValueError: the model has no long skips to weigh.
    """
    check_skip_tuning(mode)
    if not hasattr(model, "official_skip_tuning") or getattr(model, "skip", True) is False:
        raise ValueError(
            f"{type(model).__name__} has no long skip connections to tune: drop skip tuning, or use dim, uvit or dis"
        )
    model.official_skip_tuning, model.skip_tune_param = mode, tuple(bounds)
