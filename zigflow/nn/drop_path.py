"""Stochastic depth (Huang et al. 2016), drawn for all layers at once, outside of the compiled blocks."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from zigflow.keyed import current_draws


def drop_path_ramp(rate: float, depth: int, blocks: int) -> tuple[float, ...]:
    """Rates of ``blocks`` inputs and of what the last block gives: 0, then evenly from 0 to ``rate`` over the depth.

    Raises:
        ValueError: a rate outside [0, 1).
    """
    if not 0 <= rate < 1:
        raise ValueError(f"drop_path_rate lies in [0, 1), got {rate}")
    ramp = np.linspace(0, rate, depth, dtype=np.float32).tolist()
    return (*(0.0, *ramp)[:blocks], rate)


def drop_path_scales(rates: Sequence[float], batch: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """(layers, B): 0 where the sample's path is dropped, 1 / (1 - rate) where it is kept.

    The draw follows the ambient ``KeyedDraws`` when one is active (the trainer's), else torch's generator.

    Raises:
        ValueError: a rate outside [0, 1).
    """
    if any(not 0 <= r < 1 for r in rates):
        raise ValueError(f"drop path rates lie in [0, 1), got {list(rates)}")
    draws = current_draws()
    if draws is None:
        u_BN = torch.rand(batch, len(rates), device=device)
    else:
        u_BN = draws.uniform("drop_path", (len(rates),)).to(device)
    keep = 1.0 - torch.tensor(rates, dtype=torch.float32, device=device)
    return ((u_BN < keep).float() / keep).t().contiguous().to(dtype)
