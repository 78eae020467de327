"""The validated arguments of both operations, as every backend receives them."""

from typing import NamedTuple

import torch
from torch import Tensor

Read = tuple[Tensor, Tensor | None, Tensor]


class ReadCall(NamedTuple):
    """hidden, residual (B,L,D); weight (D,) in ``state_dtype``; shift, scale (B,D) in ``dtype``; order, inverse."""

    hidden: Tensor | None
    residual: Tensor
    weight: Tensor | None
    shift: Tensor | None
    scale: Tensor | None
    order: Tensor | None
    inverse: Tensor | None
    eps: float
    centered: bool
    keep_normed: bool
    dtype: torch.dtype


class WriteCall(NamedTuple):
    """base (B,L,D); y (B,L,D) and gate (B,D) of one dtype, no wider; order, inverse: token l takes ``y[order[l]]``."""

    base: Tensor
    y: Tensor
    gate: Tensor
    order: Tensor | None
    inverse: Tensor | None


def read_mismatch(call: ReadCall) -> str | None:
    """Why kernels that read and write two dtypes, the stream's and ``call.dtype``, do not take a call, or None."""
    if call.hidden is not None and call.hidden.dtype != call.dtype:
        return f"hidden is {call.hidden.dtype}, the tokens to read are {call.dtype}"
    return None
