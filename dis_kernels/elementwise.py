"""Elementwise functions and sums that have the same bits for every number of threads.

On the CPU torch cuts a large contiguous operation into equal pieces, one for each thread that it pays to use. Of a
piece it computes whole vectors, and what is left one by one: with exp and log of another library, which may round
otherwise, and in sums in another order. Here a tensor is lengthened by what lies behind it in memory until every
piece consists of whole vectors; then nothing is left, and where the cuts lie makes no difference.
"""

from collections.abc import Callable

import torch
from torch import Tensor

# Elements: twice the longest vector of any processor, for types of two bytes and more.
_VECTORS = 64
# Elements: what a sum takes at once of adjacent columns, and to what it rounds its cuts (128 bytes of float32).
_COLUMNS = 32
# Elements: the least that torch hands to a thread (at::internal::GRAIN_SIZE).
_GRAIN = 1 << 15


def spare(size: int) -> int:
    """How many elements behind one of ``size`` keep ``elementwise`` from copying it, for any number of threads."""
    return (size // _GRAIN + 1) * _VECTORS


def room(like: Tensor) -> Tensor | None:
    """Memory for a result of this shape and dtype, to be passed as ``out``; None where torch's own will do."""
    size, columns = like.numel(), like.shape[-1]
    if like.device.type != "cpu" or (_even(size) == size and _wide(columns, like.device) == columns):
        return None
    return like.new_empty(size + spare(size))[:size].view(like.shape)


def elementwise(function: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
    """``function(*tensors)`` of tensors that have one shape and dtype.

    A function that works in place may overwrite what lies behind its tensor, and its tensor may be a copy: use what
    is returned, and let nothing that is needed share the memory.
    """
    first = tensors[0]
    size = first.numel()
    if size <= _GRAIN or first.device.type != "cpu":
        return function(*tensors)
    length = _even(size)
    if length == size and all(x.is_contiguous() for x in tensors):
        return function(*tensors)
    return function(*(_lengthened(x, length) for x in tensors))[:size].view(first.shape)


def sum_of_tokens(x: Tensor) -> Tensor:
    """The sum of ``x`` (R,T,...) over rows and tokens."""
    shape = x.shape[2:]
    columns = shape.numel()
    wide = _wide(columns, x.device)
    if wide == columns:
        return x.contiguous().flatten(0, 1).sum(0)
    long = _lengthened(x, x.numel() + wide - columns)
    return long.as_strided((x.shape[0] * x.shape[1], wide), (columns, 1)).sum(0)[:columns].view(shape)


def sum_of_states(x: Tensor, out: Tensor) -> None:
    """Write the sum of ``x`` (R,T,N,X) over N into ``out`` (R,T,X)."""
    rows, tokens, states, columns = x.shape
    wide = _wide(columns, x.device)
    if wide == columns:
        torch.sum(x, dim=2, out=out)
    else:
        long = _lengthened(x, x.numel() + wide - columns)
        shape, strides = (rows * tokens, states, wide), (states * columns, columns, 1)
        out.copy_(long.as_strided(shape, strides).sum(1)[:, :columns].view(out.shape))


def _wide(columns: int, device: torch.device) -> int:
    """The least number of columns, from ``columns`` on, of which the last piece of a sum has a vector at least."""
    lone = 0 < columns % _COLUMNS < _COLUMNS // 4 and device.type == "cpu"
    return _round_up(columns, _COLUMNS) if lone else columns


def _even(size: int) -> int:
    """The least length, from ``size`` on, that threads share in whole vectors, or one thread has alone."""
    if size <= _GRAIN:
        return size
    return _round_up(size, min(torch.get_num_threads(), -(-size // _GRAIN)) * _VECTORS)


def _round_up(size: int, step: int) -> int:
    return -(-size // step) * step


def _lengthened(x: Tensor, length: int) -> Tensor:
    """The elements of ``x``, then others that lie behind it, or unspecified ones; a copy where it must be."""
    if x.is_contiguous():
        if x.numel() == length:
            return x.view(-1)
        if (x.storage_offset() + length) * x.element_size() <= x.untyped_storage().nbytes():
            return x.as_strided((length,), (1,))
    copy = x.new_empty(length)
    copy[: x.numel()].view(x.shape).copy_(x)
    return copy
