"""Position tables and rotations.

Legend: h w token grid, T frames, L tokens, D width, B batch, H heads, K head width.
"""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor


def sincos_positions(height: int, width: int, dim: int) -> Tensor:
    """Frozen 2-D sine-cosine table (1, h * w, D), float32 (He et al. 2022, in float64 and rounded once).

    The first D/2 entries encode the column, the last D/2 the row; each half is [sin | cos] with
    frequencies 10000^(-i / (D/4)).

    Raises:
        ValueError: D is not a multiple of 4.
    """
    if dim % 4:
        raise ValueError(f"a 2-D sine-cosine table needs a width divisible by 4, got {dim}")
    omega = 1.0 / 10000 ** (np.arange(dim // 4, dtype=np.float64) / (dim / 4.0))
    row, column = np.meshgrid(
        np.arange(height, dtype=np.float64), np.arange(width, dtype=np.float64), indexing="ij"
    )

    def encode(position: np.ndarray) -> np.ndarray:
        angle = position.reshape(-1, 1) * omega
        return np.concatenate([np.sin(angle), np.cos(angle)], axis=1)

    table = np.concatenate([encode(column), encode(row)], axis=1)
    return torch.from_numpy(table).to(torch.float32).unsqueeze(0)


def interpolate_positions(
    table_1LD: Tensor,
    built: tuple[int, int, int],
    wanted: tuple[int, int, int],
    mode: str = "bicubic",
    extras: int = 0,
) -> Tensor:
    """Resample a table (1, extras + T * h * w, D) from grid ``built`` = (T, h, w) to ``wanted``; extras stay in front.

    Space is resampled bicubically (corners not aligned, as Vision Transformers do) or by another ``mode`` of
    ``F.interpolate``, time linearly. The result equals the table itself when the grids agree.
    """
    if built == wanted:
        return table_1LD
    if extras:
        resampled = interpolate_positions(table_1LD[:, extras:], built, wanted, mode)
        return torch.cat([table_1LD[:, :extras], resampled], dim=1)
    (t0, h0, w0), (t1, h1, w1) = built, wanted
    dim = table_1LD.shape[-1]
    x = table_1LD.reshape(t0, h0, w0, dim).permute(0, 3, 1, 2).float()
    if (h0, w0) != (h1, w1):
        x = F.interpolate(x, size=(h1, w1), mode=mode, align_corners=False)
    if t0 != t1:
        x = x.permute(2, 3, 1, 0).reshape(h1 * w1, dim, t0)
        x = F.interpolate(x, size=t1, mode="linear", align_corners=False)
        x = x.reshape(h1, w1, dim, t1).permute(3, 2, 0, 1)
    return x.permute(0, 2, 3, 1).reshape(1, t1 * h1 * w1, dim).to(table_1LD.dtype)


def axial_rotations(
    built: tuple[int, int], wanted: tuple[int, int], head_dim: int, extras: int = 0, device=None
) -> Tensor:
    """(2, extras + h * w, K): cosines and sines that ``rotate`` turns queries and keys by, float32.

    Rotary positions (Su et al. 2021) on two axes: the first half of a head is turned by the column, the second by
    the row, with frequencies 10000^(-i / (K/4)). On another grid than ``built`` = (h, w) the positions are
    interpolated: the patches of ``wanted`` lie spread over the built one. The first ``extras`` tokens stay as they
    are.

    Raises:
        ValueError: K is not a multiple of 4.
    """
    if head_dim % 4:
        raise ValueError(f"rotary positions need a head width divisible by 4, got {head_dim}")
    quarter = head_dim // 4
    omega = 10000.0 ** (-torch.arange(quarter, dtype=torch.float32, device=device) / quarter)
    row, column = (
        (torch.arange(n, dtype=torch.float32, device=device) + 0.5) * (n0 / n) - 0.5
        for n0, n in zip(built, wanted, strict=True)
    )
    row, column = row.repeat_interleave(wanted[1]), column.repeat(wanted[0])
    angle = torch.cat([column.unsqueeze(1) * omega, row.unsqueeze(1) * omega], dim=1)
    angle = F.pad(angle.repeat_interleave(2, dim=1), (0, 0, extras, 0))
    return torch.stack([angle.cos(), angle.sin()])


def rotate(x_BHLK: Tensor, rotations_2LK: Tensor) -> Tensor:
    """Turn neighboring pairs of a head's entries; (B, H, L, K) -> the same shape, in float32 or wider."""
    cos, sin = rotations_2LK
    pairs = x_BHLK.unflatten(-1, (-1, 2))
    turned = torch.stack([-pairs[..., 1], pairs[..., 0]], dim=-1).flatten(-2)
    return x_BHLK * cos + turned * sin
