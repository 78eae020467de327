"""What Triton kernels need of a machine, and how much one launch takes."""

import functools
import os
from collections.abc import Sequence

import torch

# The most programs that CUDA takes along the first two axes of a grid.
GRID_LIMITS = (2**31 - 1, 2**16 - 1)
# Kernels count tokens, and a few more than there are, in 32 bits.
_MAX_TOKENS = 2**30


def interpreted() -> bool:
    """Whether Triton runs its kernels in Python, on CPU tensors (``TRITON_INTERPRET=1``)."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@functools.cache
def unavailable() -> str | None:
    """Why Triton kernels cannot run on this machine, or None."""
    if not torch.cuda.is_available() and not interpreted():
        return "no CUDA device"
    try:
        import triton  # noqa: F401
    except (ImportError, RuntimeError, OSError) as error:
        return f"triton cannot be imported: {error}"
    return None


def launch_reason(length: int, grid: Sequence[int]) -> str | None:
    """Why a kernel with that grid, for batch (and tokens) and then channels, cannot walk ``length`` tokens, or None."""
    if length > _MAX_TOKENS:
        return f"it takes at most {_MAX_TOKENS} tokens, got {length}: use backend='torch'"
    for what, programs, most in zip(("batch and tokens", "channels"), grid, GRID_LIMITS, strict=False):
        if programs > most:
            return f"it takes at most {most} programs for the {what}, and this needs {programs}: use backend='torch'"
    return None
