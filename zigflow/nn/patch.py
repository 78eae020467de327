"""Images to tokens and back.

Legend: B batch, C channels, H W image size, h w token grid, L = h * w tokens, D width, p patch size.
"""

import torch
from torch import Tensor, nn


class PatchEmbed(nn.Module):
    """Non-overlapping patches by one strided convolution, tokens in row-major order (Dosovitskiy et al. 2021).

    The parameters are ``proj.weight`` (D, C, p, p) and ``proj.bias``.
    """

    def __init__(self, in_channels: int, embed_dim: int, patch_size: int, device=None, dtype=None):
        super().__init__()
        self.patch_size = patch_size
        self.proj = nn.Conv2d(
            in_channels, embed_dim, kernel_size=patch_size, stride=patch_size, device=device, dtype=dtype
        )

    def reset_parameters(self) -> None:
        """Xavier-uniform on the flattened kernel, bias zero, as for a linear layer."""
        nn.init.xavier_uniform_(self.proj.weight.view(self.proj.weight.shape[0], -1))
        if self.proj.bias is not None:
            nn.init.zeros_(self.proj.bias)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, L, D). The caller has checked that p divides H and W."""
        return self.proj(x_BCHW).flatten(2).transpose(1, 2)


def check_divisible(height: int, width: int, patch_size: int) -> tuple[int, int]:
    """The token grid (h, w) of an image.

    Raises:
        ValueError: the patch size does not divide the image, or is below 1.
    """
    if patch_size < 1:
        raise ValueError(f"patch_size must be at least 1, got {patch_size}")
    if height % patch_size or width % patch_size:
        raise ValueError(
            f"an image of {height} x {width} is not divisible into patches of {patch_size} x {patch_size}; "
            f"choose sizes that are multiples of {patch_size}"
        )
    return height // patch_size, width // patch_size


def unpatchify(x_BLK: Tensor, height: int, width: int, patch_size: int, out_channels: int) -> Tensor:
    """(B, h * w, p * p * C) -> (B, C, h * p, w * p); the channel is the fastest index of the last axis."""
    p = patch_size
    x = x_BLK.view(x_BLK.shape[0], height, width, p, p, out_channels)
    return torch.einsum("bhwpqc->bchpwq", x).reshape(-1, out_channels, height * p, width * p)
