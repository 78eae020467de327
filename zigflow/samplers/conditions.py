"""What every sampler does with a batch: rows of whatever conditions a model, padding, noise of its steps."""

from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor

from zigflow.keyed import KeyedDraws, current_draws

NoiseFunction = Callable[[int, Tensor], Tensor]
"""``noise(step, x)``: fresh noise of the shape of x for a step."""


def map_tensors(function: Callable[..., Tensor], *values: Any) -> Any:
    """Apply ``function`` to the tensors of equally built values: None, Tensor, dataclass, mapping, list, tuple.

    Raises:
        TypeError: something else, or values that are built differently.
    """
    first = values[0]
    if any(type(v) is not type(first) for v in values[1:]):
        raise TypeError(f"conditions are built differently: {', '.join(type(v).__name__ for v in values)}")
    if first is None:
        return None
    if isinstance(first, Tensor):
        return function(*values)
    if is_dataclass(first) and not isinstance(first, type):
        parts = {f.name: map_tensors(function, *(getattr(v, f.name) for v in values)) for f in fields(first)}
        return replace(first, **parts)
    if isinstance(first, Mapping):
        return {key: map_tensors(function, *(v[key] for v in values)) for key in first}
    if isinstance(first, (list, tuple)):
        return type(first)(map_tensors(function, *parts) for parts in zip(*values, strict=True))
    raise TypeError(
        f"a condition holds tensors, None, dataclasses, mappings, lists or tuples, not {type(first).__name__}"
    )


def concatenate(first: Any, second: Any) -> Any:
    """The rows of ``first`` followed by those of ``second``."""
    return map_tensors(lambda a, b: torch.cat([a, b]), first, second)


def padding_index(rows: int, size: int, device: torch.device) -> Tensor:
    """0, 1, ..., rows - 1 and then the last row again up to ``size``.

    Raises:
        ValueError: there are no rows, or more than ``size``.
    """
    if not 0 < rows <= size:
        raise ValueError(
            f"a batch of {rows} samples cannot be padded to batch_size {size}; give 1..{size} samples"
        )
    return torch.arange(size, device=device).clamp_max(rows - 1)


def pad_batch(
    x: Tensor, y: Any, draws: KeyedDraws | None, size: int | None
) -> tuple[Tensor, Any, KeyedDraws | None]:
    """State, condition and draws padded to ``size`` rows; None leaves them as they are."""
    if size is None:
        return x, y, draws
    index = padding_index(x.shape[0], size, x.device)
    y = map_tensors(lambda part: part[index.to(part.device)], y)
    return x[index], y, None if draws is None else draws.select(index.to(draws.ids.device))


def noise_source(draws: KeyedDraws | None) -> NoiseFunction:
    """Noise of a step from keyed draws, the ambient ones, or torch's generator."""
    draws = current_draws() if draws is None else draws
    if draws is None:
        return lambda step, x: torch.randn_like(x)
    return lambda step, x: draws.normal("sample.sde", tuple(x.shape[1:]), step=step)
