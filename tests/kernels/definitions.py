"""The operations written out from their formulas, token by token in float64, and random arguments for them."""

import torch
import torch.nn.functional as F

SCAN_NAMES = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias")


def scan_definition(u, delta, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False, reverse=False):
    """Selective scan of one sequence of tokens; ``reverse`` by flipping, which is what the argument stands for."""
    u, delta, A, B, C = (t.double() for t in (u, delta, A, B, C))
    if reverse:
        u, delta, B, C = (t.flip(1) for t in (u, delta, B, C))
    dt = delta if delta_bias is None else delta + delta_bias.double()
    dt = F.softplus(dt) if delta_softplus else dt
    h = u.new_zeros(u.shape[0], u.shape[2], A.shape[1])
    ys = []
    for dt_l, u_l, B_l, C_l in zip(dt.unbind(1), u.unbind(1), B.unbind(1), C.unbind(1), strict=True):
        h = torch.exp(dt_l[..., None] * A) * h + (dt_l * u_l)[..., None] * B_l[:, None]
        ys.append(torch.einsum("ben,bn->be", h, C_l))
    y = torch.stack(ys, 1)
    if D is not None:
        y = y + D.double() * u
    if reverse:
        y = y.flip(1)
    return y if z is None else y * F.silu(z.double())


def conv_definition(x, weight, bias=None, activation=None, reverse=False):
    """Causal depthwise convolution through torch's own channel-major one."""
    x, weight = x.double(), weight.double()
    if reverse:
        x = x.flip(1)
    width = weight.shape[1]
    y = F.conv1d(F.pad(x.transpose(1, 2), (width - 1, 0)), weight[:, None], groups=weight.shape[0]).transpose(
        1, 2
    )
    y = y if bias is None else y + bias.double()
    y = y if activation is None else F.silu(y)
    return y.flip(1) if reverse else y


def scan_arguments(B, L, E, N, dtype=torch.float32, options=("D", "z", "delta_bias"), seed=0):
    """A dict of leaf tensors; sequences in ``dtype``, A, D and delta_bias in float32 at least."""
    g = torch.Generator().manual_seed(seed)
    state = torch.float64 if dtype == torch.float64 else torch.float32

    def randn(*shape):
        return torch.randn(shape, generator=g, dtype=torch.float64)

    values = {
        "u": randn(B, L, E).to(dtype),
        "delta": (0.5 * randn(B, L, E) - 1).to(dtype),
        "A": -torch.exp(randn(E, N)).to(state),
        "B": randn(B, L, N).to(dtype),
        "C": randn(B, L, N).to(dtype),
        "D": randn(E).to(state),
        "z": randn(B, L, E).to(dtype),
        "delta_bias": (0.3 * randn(E)).to(state),
    }
    absent = {"D", "z", "delta_bias"} - set(options)
    return {k: v.requires_grad_() for k, v in values.items() if k not in absent}


def conv_arguments(B, L, E, W, dtype=torch.float32, bias=True, seed=0):
    g = torch.Generator().manual_seed(seed)
    values = {"x": torch.randn(B, L, E, generator=g), "weight": torch.randn(E, W, generator=g)}
    if bias:
        values["bias"] = torch.randn(E, generator=g)
    return {k: v.to(dtype).requires_grad_() for k, v in values.items()}


def with_gradients(function, arguments, weight=None, **flags):
    """Output of ``function(**arguments, **flags)`` and the gradients of sum(output * weight) by argument."""
    out = function(**arguments, **flags)
    if weight is None:
        weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    grads = torch.autograd.grad((out.double() * weight).sum(), list(arguments.values()))
    return out, dict(zip(arguments, grads, strict=True))
