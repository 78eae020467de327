"""The work on single tokens around a mixer written out from its formulas in float64, and random arguments for it."""

import torch

READ_NAMES = ("hidden", "residual", "weight", "shift", "scale")
WRITE_NAMES = ("base", "y", "gate")


def read_definition(
    hidden=None,
    residual=None,
    weight=None,
    shift=None,
    scale=None,
    order=None,
    inverse=None,
    *,
    eps,
    centered,
    **_,
):
    """x, normed and stream, joined along the width."""
    stream = residual.double() if hidden is None else residual.double() + hidden.double()
    centre = stream.mean(-1, keepdim=True) if centered else 0.0
    normed = (stream - centre) / ((stream - centre).square().mean(-1, keepdim=True) + eps).sqrt()
    normed = normed if weight is None else normed * weight.double()
    x = normed
    if scale is not None:
        x = torch.einsum("bld,bd->bld", normed, 1 + scale.double()) + shift.double()[:, None]
    return torch.cat([x if order is None else x[:, order], normed, stream], -1)


def write_definition(base, y, gate, order=None, inverse=None):
    y = y.double() if order is None else y.double()[:, order]
    return base.double() + torch.einsum("bld,bd->bld", y, gate.double())


def a_walk(L, seed=0):
    """An order of L tokens and its inverse."""
    order = torch.randperm(L, generator=torch.Generator().manual_seed(seed))
    return {"order": order, "inverse": order.argsort()}


def read_arguments(B, L, D, stream, dtype, options=READ_NAMES, seed=0):
    """Leaf tensors: ``residual`` in ``stream``, ``weight`` in its state's dtype, others in ``dtype``."""
    g = torch.Generator().manual_seed(seed)
    state = torch.float64 if stream == torch.float64 else torch.float32
    kinds = {"hidden": ((B, L, D), dtype), "residual": ((B, L, D), stream), "weight": ((D,), state)}
    kinds |= dict.fromkeys(("shift", "scale"), ((B, D), dtype))
    values = {n: torch.randn(s, generator=g, dtype=torch.float64).to(d) for n, (s, d) in kinds.items()}
    return {n: v.requires_grad_() for n, v in values.items() if n == "residual" or n in options}


def write_arguments(B, L, D, stream, dtype, seed=0):
    g = torch.Generator().manual_seed(seed)
    kinds = {"base": ((B, L, D), stream), "y": ((B, L, D), dtype), "gate": ((B, D), dtype)}
    return {
        n: torch.randn(s, generator=g, dtype=torch.float64).to(d).requires_grad_()
        for n, (s, d) in kinds.items()
    }
