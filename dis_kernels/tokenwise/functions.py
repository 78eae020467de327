"""The work on single tokens around a mixer, as one pass over the stream before it and one after.

Shapes: B batch, L tokens, D width.
"""

import torch
from torch import Tensor

from dis_kernels.checks import check_sequence, check_tensor
from dis_kernels.dispatch import Backend
from dis_kernels.dtypes import FLOAT_DTYPES, state_dtype

from .backends import READ, WRITE
from .call import Read, ReadCall, WriteCall
from .permutation import check_order


def add_norm_modulate(
    hidden: Tensor | None,
    residual: Tensor,
    weight: Tensor | None = None,
    shift: Tensor | None = None,
    scale: Tensor | None = None,
    order: Tensor | None = None,
    inverse: Tensor | None = None,
    *,
    eps: float = 1e-5,
    centered: bool = False,
    keep_normed: bool = False,
    dtype: torch.dtype | None = None,
    backend: str = "auto",
) -> Read:
    """What a mixer reads: ``modulate(norm(residual + hidden))[:, order]``, and the sum.

    The norm is RMSNorm (Zhang and Sennrich 2019), or LayerNorm without a bias where ``centered``, in float32 (float64
    stays); ``x * (1 + scale) + shift`` is the modulation of Peebles and Xie (arXiv 2212.09748).

    Args:
        hidden: (B,L,D), what the block before adds to the stream; None for nothing.
        residual: (B,L,D), the stream.
        weight: (D,), the norm's, or None for ones.
        shift, scale: (B,D), both or neither; are rounded to ``dtype``.
        order: (L,) int64, the index of the k-th visited token; None for the raster.
        inverse: (L,) int64 with ``inverse[order] = arange(L)``, see ``permute``.
        eps: is added to the mean square.
        centered: take the mean away first.
        keep_normed: return the norm before the modulation, too.
        dtype: of what is read; that of ``hidden``, or of the stream, by default.
        backend: "auto", or a name of ``tokenwise_backends()``.

    Returns:
        What the mixer reads (B,L,D) in ``dtype``, in visiting order; the norm (B,L,D) in ``dtype``, in raster order,
        or None; the stream ``residual + hidden``, ``residual`` itself without ``hidden``.

    Raises:
        TypeError, ValueError: an argument that does not fit, named with what was expected.
        IndexError: the order is no permutation; found by backend "cpu".
        RuntimeError: the named backend cannot run on this machine.
    """
    op = "add_norm_modulate"
    check_sequence(op, "residual", residual, "BLD")
    sizes, device = dict(zip("BLD", residual.shape, strict=True)), residual.device
    if hidden is not None:
        check_tensor(op, "hidden", hidden, "BLD", sizes, device)
    if weight is not None:
        check_tensor(op, "weight", weight, "D", sizes, device)
    if (shift is None) != (scale is None):
        raise ValueError(f"{op}: give both shift and scale, or neither")
    if shift is not None and scale is not None:
        check_tensor(op, "shift", shift, "BD", sizes, device)
        check_tensor(op, "scale", scale, "BD", sizes, device)
    if order is not None or inverse is not None:
        check_order(op, residual, order, inverse)
    if hidden is not None and torch.promote_types(hidden.dtype, residual.dtype) != residual.dtype:
        residual = residual.to(torch.promote_types(hidden.dtype, residual.dtype))
    dtype = dtype or (residual if hidden is None else hidden).dtype
    if dtype not in FLOAT_DTYPES:
        allowed = ", ".join(str(each).removeprefix("torch.") for each in FLOAT_DTYPES)
        raise TypeError(f"{op}: dtype is {dtype}, expected one of {allowed}")
    # Under autocast a stream may be wider than what linear layers make of the condition.
    shift, scale = (None if each is None else each.to(dtype) for each in (shift, scale))
    weight = None if weight is None else weight.to(state_dtype(residual.dtype))
    call = ReadCall(
        hidden, residual, weight, shift, scale, order, inverse, float(eps), bool(centered), keep_normed, dtype
    )
    return READ.run(call, backend)


def gated_add(
    base: Tensor,
    y: Tensor,
    gate: Tensor,
    order: Tensor | None = None,
    inverse: Tensor | None = None,
    *,
    backend: str = "auto",
) -> Tensor:
    """What a block adds: ``base + gate * y[:, order]``.

    Args:
        base: (B,L,D).
        y: (B,L,D), what the mixer made, in its order.
        gate: (B,D).
        order: (L,) int64: token l of the base takes ``y[:, order[l]]``; of a walk that is its inverse. None: as it is.
        inverse: (L,) int64, the inverse of ``order``, see ``permute``.
        backend: "auto", or a name of ``tokenwise_backends()``.

    Returns:
        (B,L,D) in the dtype that ``base``, ``y`` and ``gate`` promote to.

    Raises:
        TypeError, ValueError, IndexError, RuntimeError: as ``add_norm_modulate``.
    """
    op = "gated_add"
    check_sequence(op, "base", base, "BLD")
    sizes = dict(zip("BLD", base.shape, strict=True))
    check_tensor(op, "y", y, "BLD", sizes, base.device)
    check_tensor(op, "gate", gate, "BD", sizes, base.device)
    if order is not None or inverse is not None:
        check_order(op, base, order, inverse)
    # The promotions that the formula would make; kernels know one dtype of the product and a base that holds it.
    dtype = torch.promote_types(y.dtype, gate.dtype)
    base, y, gate = base.to(torch.promote_types(base.dtype, dtype)), y.to(dtype), gate.to(dtype)
    return WRITE.run(WriteCall(base, y, gate, order, inverse), backend)


def register_backend(
    read: Backend[ReadCall, Read], write: Backend[WriteCall, Tensor], before: str | None = None
) -> None:
    """Add a backend of both operations, ``add_norm_modulate`` (``read``) and ``gated_add`` (``write``), of one name.

    Args:
        before: the backend that "auto" tries after it; None: it runs where it is named.

    Raises:
        TypeError: one of them is no backend.
        ValueError: their names differ or are taken, or there is no backend ``before``.
    """
    names = [getattr(each, "name", None) for each in (read, write)]
    if names[0] != names[1]:
        raise ValueError(
            f"the two halves of a token-wise backend have one name, not {names[0]!r} and {names[1]!r}"
        )
    READ.register(read, before)
    WRITE.register(write, before)


def tokenwise_backends() -> dict[str, str | None]:
    """The backends of both functions as "auto" tries them: name -> None, or why this machine cannot run it."""
    return READ.available()
