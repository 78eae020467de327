"""Initialization statistics of a stored model against those of ours."""

import math

import torch


def check_statistics(name: str, got: torch.Tensor, want: dict) -> None:
    """Zeros and ones exactly; standard deviations within 5 standard errors of both samples."""
    assert list(got.shape) == want["shape"], name
    if want["std"] < 1e-9:
        assert torch.all((got - want["mean"]).abs() < 1e-6), name
        return
    n = got.numel()
    centered = got.double() - got.double().mean()
    kurtosis = centered.pow(4).mean().item() / max(centered.pow(2).mean().item() ** 2, 1e-300)
    # Var(s) = sigma^2 (kurtosis - 1) / (4 n), for the difference of two samples twice that. Nothing is drawn from a
    # flatter law than the uniform one, of kurtosis 1.8; that of a few values may come out lower.
    error = want["std"] * math.sqrt(max(kurtosis - 1, 0.8) / (4 * n) * 2)
    assert abs(got.double().std().item() - want["std"]) <= 5 * error, (
        name,
        got.std().item(),
        want["std"],
        error,
    )
    assert abs(got.double().mean().item() - want["mean"]) <= 5 * want["std"] * math.sqrt(2 / n), name
