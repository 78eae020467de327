"""Kernels of packages that are installed beside this project: what they take, and whether they work here."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor


def tensor_reason(tensors: tuple[Tensor | None, ...]) -> str | None:
    """Why the packages' kernels do not take these tensors, or None."""
    given = [t for t in tensors if isinstance(t, Tensor)]
    if not given[0].is_cuda:
        return f"it takes CUDA tensors, got {given[0].device.type}"
    if torch.float64 in {t.dtype for t in given}:
        return "it computes in float32, and an argument is float64: use backend='torch'"
    if torch.are_deterministic_algorithms_enabled():
        return "its backward pass may add with float atomics, and deterministic algorithms are asked for"
    return None


def refusal(package: str, probe: Callable[[str], None], device: str = "cuda") -> str | None:
    """Why ``probe(device)``, a tiny computation with the package, fails here, or None.

    An installed package may lack its compiled part, or hold one for another torch, driver or GPU, which shows when
    a kernel is launched and not before.
    """
    if device == "cuda" and not torch.cuda.is_available():
        return "no CUDA device"
    # A thread of its own: transforms, autocast and default devices of the caller stay out of the probe.
    with ThreadPoolExecutor(1) as pool:
        try:
            pool.submit(probe, device).result()
        # A compiled function raises TypeError and a module AttributeError where another version differs.
        except (ImportError, RuntimeError, OSError, TypeError, AttributeError) as error:
            lines = str(error).strip().splitlines() or ["no message"]
            return f"{package} does not run here: {type(error).__name__}: {lines[0]} (docs: extra mamba-cuda)"
    return None


def check_probe(package: str, got: Tensor, want: Tensor) -> None:
    """Raise RuntimeError when the package computes something else than the definition."""
    if not torch.allclose(got, want, rtol=1e-3, atol=1e-3):
        raise RuntimeError(f"{package} computes wrong values: the installed binary does not fit this machine")
