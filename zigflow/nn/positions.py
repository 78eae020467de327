"""Position tables. Legend: h w token grid, T frames, L tokens, D width."""

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
    table_1LD: Tensor, built: tuple[int, int, int], wanted: tuple[int, int, int]
) -> Tensor:
    """Resample a table (1, T * h * w, D) from grid ``built`` = (T, h, w) to ``wanted``.

    Space is resampled bicubically (corners not aligned, as Vision Transformers do), time linearly. The
    result equals the table itself when the grids agree.
    """
    if built == wanted:
        return table_1LD
    (t0, h0, w0), (t1, h1, w1) = built, wanted
    dim = table_1LD.shape[-1]
    x = table_1LD.reshape(t0, h0, w0, dim).permute(0, 3, 1, 2).float()
    if (h0, w0) != (h1, w1):
        x = F.interpolate(x, size=(h1, w1), mode="bicubic", align_corners=False)
    if t0 != t1:
        x = x.permute(2, 3, 1, 0).reshape(h1 * w1, dim, t0)
        x = F.interpolate(x, size=t1, mode="linear", align_corners=False)
        x = x.reshape(h1, w1, dim, t1).permute(3, 2, 0, 1)
    return x.permute(0, 2, 3, 1).reshape(1, t1 * h1 * w1, dim).to(table_1LD.dtype)
