"""Argument checks of the operations."""

from typing import Any

import torch
from torch import Tensor

from .dtypes import FLOAT_DTYPES


def check_tensor(
    op: str, name: str, value: Any, axes: str, sizes: dict[str, int], device: torch.device
) -> None:
    """Check one tensor argument of ``op``; ``axes`` such as "BLE" are looked up in ``sizes``.

    Raises:
        TypeError: not a tensor, or not of a floating dtype that the operation computes in.
        ValueError: another shape than ``axes`` says, or on another device than the first argument.
    """
    check_float(op, name, value)
    wanted = tuple(sizes[axis] for axis in axes)
    if value.shape != wanted:
        raise ValueError(
            f"{op}: {name} has shape {tuple(value.shape)}, expected ({','.join(axes)}) = {wanted}"
        )
    if value.device != device:
        raise ValueError(
            f"{op}: {name} is on {value.device}, the first argument on {device}: move one of them"
        )


def check_float(op: str, name: str, value: Any) -> None:
    """Raise TypeError unless ``value`` is a tensor of a floating dtype that the operations compute in."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{op}: {name} must be a tensor, got {type(value).__name__}")
    if value.dtype not in FLOAT_DTYPES:
        allowed = ", ".join(str(dtype).removeprefix("torch.") for dtype in FLOAT_DTYPES)
        raise TypeError(f"{op}: {name} has dtype {value.dtype}, expected one of {allowed}")


def check_sequence(op: str, name: str, value: Any, axes: str) -> None:
    """Check a batch-first sequence argument: a float tensor of ``len(axes)`` dimensions, none of them empty.

    Raises:
        TypeError: as ``check_float``.
        ValueError: another number of dimensions, or an empty one (batch excepted).
    """
    check_float(op, name, value)
    if value.ndim != len(axes):
        raise ValueError(f"{op}: {name} has shape {tuple(value.shape)}, expected ({','.join(axes)})")
    if 0 in value.shape[1:]:
        raise ValueError(
            f"{op}: {name} has shape {tuple(value.shape)}: ({','.join(axes[1:])}) must be at least 1"
        )
