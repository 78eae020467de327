"""What a model's ODE says about given data: its likelihood, and the noise that it came from.

Legend: N samples, B batch, C channels, h w data.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from zigflow.data.loader import evaluation_loader
from zigflow.keyed import KeyedDraws

from .batches import condition

__all__ = ["bits_per_dim", "encode_data"]


def _batches(
    source: Any, codec: Any, model: nn.Module, seed: int, count: int, batch_size: int, device: Any
) -> Iterator:
    for batch in evaluation_loader(source, batch_size, num_samples=min(count, len(source))):
        draws = KeyedDraws(seed, batch.ids).to(device)
        batch = batch.to(device)
        with draws.active():
            yield batch.ids.cpu(), codec.encode(batch), condition(batch, model, draws), draws


def bits_per_dim(
    source: Any, codec: Any, model: nn.Module, process: Any, sampler: Any, *,
    seed: int, count: int, batch_size: int, device: Any, level: float | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Bits per dimension of the first ``count`` samples of a source.

    Args:
        level: width of a grey level in x1's units; each value is spread evenly over its level (uniform
            dequantization, Theis et al. 2016), which makes the result an upper bound for the discrete data.
            None measures the density as it is.

    Returns:
        (N,) float64 bits per dimension and (N,) int64 indices in the source.
    """
    bits, ids = [], []
    for index, x1, y, draws in _batches(source, codec, model, seed, count, batch_size, device):
        if level is not None:
            x1 = x1 + level * (draws.uniform("likelihood.dequantize", tuple(x1.shape[1:])) - 0.5)
        width = 1.0 if level is None else level
        found = sampler.log_likelihood(process, model, x1, y, draws=draws, bin_width=width)
        bits.append(found.bits_per_dim.double().cpu())
        ids.append(index)
    return torch.cat(bits), torch.cat(ids)


def encode_data(
    source: Any, codec: Any, model: nn.Module, process: Any, sampler: Any, *,
    seed: int, count: int, batch_size: int, device: Any,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The noise x0 that the ODE maps to the first ``count`` samples of a source: (N, C, h, w) and (N,) indices."""
    found, ids = [], []
    for index, x1, y, _ in _batches(source, codec, model, seed, count, batch_size, device):
        found.append(sampler.encode(process, model, x1, y).cpu())
        ids.append(index)
    return torch.cat(found), torch.cat(ids)
