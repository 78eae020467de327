"""Time as a vector. Legend: B batch, D width, F frequencies."""

import math
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def sinusoidal_embedding(t_B: Tensor, dim: int, max_period: float = 10000.0) -> Tensor:
    """(B,) -> (B, dim): [cos | sin] of t * max_period^(-i / (dim/2)), cosines first, a zero last if dim is odd.

    Computed in float32, in float64 when t is float64; never in half precision, where t * 1000 has no digits.
    """
    half = dim // 2
    t_B = t_B.to(torch.promote_types(t_B.dtype, torch.float32))
    exponent = -math.log(max_period) * torch.arange(half, dtype=t_B.dtype, device=t_B.device) / half
    angle = t_B.unsqueeze(1) * torch.exp(exponent)
    embedding = torch.cat([torch.cos(angle), torch.sin(angle)], dim=1)
    return F.pad(embedding, (0, 1)) if dim % 2 else embedding


def time_mlp(dim: int, device=None, dtype=None) -> nn.Sequential:
    """Linear, SiLU, Linear on a sinusoid of the width of the tokens, four times as wide inside (Bao et al. 2023)."""
    return nn.Sequential(
        nn.Linear(dim, 4 * dim, device=device, dtype=dtype),
        nn.SiLU(),
        nn.Linear(4 * dim, dim, device=device, dtype=dtype),
    )


class TimestepEmbedder(nn.Module):
    """Sinusoid of ``scale * t``, then Linear, SiLU, Linear (Peebles and Xie 2023).

    The parameters are ``mlp.0`` (D, 256) and ``mlp.2`` (D, D).
    """

    def __init__(
        self, hidden_size: int, frequency_size: int = 256, scale: float = 1.0, device=None, dtype=None
    ):
        super().__init__()
        self.frequency_size = frequency_size
        self.scale = scale
        self.mlp = nn.Sequential(
            nn.Linear(frequency_size, hidden_size, device=device, dtype=dtype),
            nn.SiLU(),
            nn.Linear(hidden_size, hidden_size, device=device, dtype=dtype),
        )

    def reset_parameters(self) -> None:
        """Weights N(0, 0.02)."""
        for layer in self.mlp:
            if isinstance(layer, nn.Linear):
                nn.init.normal_(layer.weight, std=0.02)

    def extra_repr(self) -> str:
        return f"frequencies={self.frequency_size}, scale={self.scale}"

    def forward(self, t_B: Tensor) -> Tensor:
        """(B,) times -> (B, D)."""
        t_B = t_B.to(torch.promote_types(t_B.dtype, torch.float32))
        embedding = sinusoidal_embedding(t_B * self.scale, self.frequency_size)
        return self.mlp(embedding.to(cast(nn.Linear, self.mlp[0]).weight.dtype))
