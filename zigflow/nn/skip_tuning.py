"""Weights of what long skip connections bring, by the noise level: "skip tuning" as DiM publishes it.

Block by block they lie at 1 - (1 - b) t / 1000 for net times t in 0..1000, 1000 being pure noise; b goes evenly from
the bound of the first joining block to that of the last one. The published code takes t = 1 whatever the time is, by
which the weights are 1 within 2e-4.
"""

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


class SkipTuning:
    """Part of a model with long skips: how sampling weighs what they bring.

    Attributes:
        official_skip_tuning: None, "as_published" or "as_intended".
        skip_tune_param: b of the last and of the first joining block.
        skip: whether the model was built with its long skips.
    """

    official_skip_tuning: str | None = None
    skip_tune_param: tuple[float, float] = (0.82, 1.0)
    skip: bool = True

    def set_skip_tuning(self, mode: str | None, bounds: tuple[float, float]) -> None:
        """Weigh the long skips from now on.

        Raises:
            UnknownNameError: an unknown mode.
            ValueError: the model was built without long skips.
        """
        check_skip_tuning(mode)
        if not self.skip:
            raise ValueError(
                f"{type(self).__name__} was built with skip=False and has no long skip connections to tune: drop skip "
                "tuning"
            )
        low, high = bounds
        self.official_skip_tuning, self.skip_tune_param = mode, (low, high)

    def skip_weights(self, t_B: Tensor, joining: int) -> list[Tensor | None]:
        """For each of ``joining`` blocks, first to last, the weights (B,) of what it joins at net times t, or None."""
        return skip_weights(t_B, self.official_skip_tuning, self.skip_tune_param, joining)
