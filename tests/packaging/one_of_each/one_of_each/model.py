"""A model: ``model=each_pixelwise`` (config/model/each_pixelwise.yaml)."""

import torch
from torch import nn


class Pixelwise(nn.Module):
    """x (B, C, H, W), t (B,) -> (B, C, H, W): one small network at every pixel."""

    time_scale = 1.0
    has_text = False
    num_classes = -1
    video_frames = 0

    def __init__(self, in_channels, img_dim, width=8):
        super().__init__()
        self.in_channels, self.img_dim = in_channels, (img_dim, img_dim)
        self.enter = nn.Conv2d(in_channels + 1, width, 1)
        self.leave = nn.Conv2d(width, in_channels, 1)

    def forward(self, x, t, y=None, return_features=()):
        time = t.to(x.dtype).view(-1, 1, 1, 1).expand(-1, 1, *x.shape[2:])
        return self.leave(torch.relu(self.enter(torch.cat([x, time], dim=1))))
