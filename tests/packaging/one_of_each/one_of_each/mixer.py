"""A mixer: ``model.mixer=each_average``."""

import torch
from torch import nn

from dis_mamba import register_mixer


@register_mixer("each_average")
class RunningAverage(nn.Module):
    """(B, L, D) -> (B, L, D): each token sees the mean of those before it."""

    def __init__(self, d_model, device=None, dtype=None):
        super().__init__()
        self.gate = nn.Linear(d_model, d_model, device=device, dtype=dtype)
        self.out = nn.Linear(d_model, d_model, device=device, dtype=dtype)

    def forward(self, x):
        count = torch.arange(1, x.shape[1] + 1, device=x.device, dtype=x.dtype).view(1, -1, 1)
        return self.out(x.cumsum(1) / count * torch.sigmoid(self.gate(x)))
