"""The project's comparisons, one place for the tolerances of the design (docs/numerics.md)."""

import numpy as np
import torch

OUTPUT_RTOL_OF_MAX = 1e-4
GRADIENT_RTOL_OF_MAX = 1e-3
BF16_RELATIVE_RMS = 2e-2


def _as_tensor(x) -> torch.Tensor:
    if isinstance(x, np.ndarray):
        x = torch.from_numpy(x)
    return x.detach().to(torch.float64).cpu()


def assert_close(name, got, want, *, of_max=OUTPUT_RTOL_OF_MAX, floor=0.0):
    """|got - want| <= max(of_max * absmax(want), floor), every value finite, shapes equal."""
    got, want = _as_tensor(got), _as_tensor(want)
    assert got.shape == want.shape, f"{name}: shape {tuple(got.shape)}, expected {tuple(want.shape)}"
    assert torch.isfinite(got).all(), f"{name}: not finite"
    if want.numel() == 0:
        return
    error = (got - want).abs().max().item()
    allowed = max(of_max * want.abs().max().item(), floor)
    assert error <= allowed, f"{name}: largest error {error:.3e}, allowed {allowed:.3e}"


def assert_relative_rms(name, got, want, ratio):
    """RMS of the difference over RMS of the wanted value."""
    got, want = _as_tensor(got), _as_tensor(want)
    assert got.shape == want.shape, f"{name}: shape {tuple(got.shape)}, expected {tuple(want.shape)}"
    assert torch.isfinite(got).all(), f"{name}: not finite"
    error = (got - want).pow(2).mean().sqrt() / want.pow(2).mean().sqrt().clamp_min(1e-30)
    assert error.item() <= ratio, f"{name}: relative RMS {error.item():.3e}, allowed {ratio:.3e}"
