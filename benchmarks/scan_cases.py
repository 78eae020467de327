"""What scans are timed on, and the check that comes first: arguments, the published loop, the definition in float64."""

from collections.abc import Callable
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from dis_mamba import selective_scan

# Of the largest value, output and gradients.
LIMITS = {torch.float32: (1e-4, 1e-3), torch.bfloat16: (2e-2, 4e-2), torch.float16: (4e-3, 8e-3)}


class Wrong(SystemExit):
    """A contender computes something else than the definition."""


class Contender(Protocol):
    """A way to compute the scan: ``run(**arguments)`` with softplus on the step. ``gradients``: it has a backward."""

    @property
    def name(self) -> str: ...

    @property
    def device(self) -> str: ...

    @property
    def gradients(self) -> bool: ...

    @property
    def run(self) -> Callable[..., Tensor]: ...


def published_loop(u, delta, A, B, C, D, z, delta_bias):
    """The loop over tokens in the arrangement of mamba-ssm's published reference: channels before tokens, the decays
    and the driving terms of all tokens made first. Its autograd backward is quadratic in L; it is timed forward.
    """
    dtype, step = u.dtype, F.softplus(delta.float() + delta_bias)
    u, dt, B, C, z = (t.float().transpose(1, 2) for t in (u, step, B, C, z))
    decay = torch.exp(torch.einsum("bdl,dn->bdln", dt, A))
    drive = torch.einsum("bdl,bnl,bdl->bdln", dt, B, u)
    state = u.new_zeros(u.shape[0], *A.shape)
    outputs = []
    for token in range(u.shape[2]):
        state = decay[:, :, token] * state + drive[:, :, token]
        outputs.append(torch.einsum("bdn,bn->bd", state, C[:, :, token]))
    y = (torch.stack(outputs, dim=2) + u * D[:, None]) * F.silu(z)
    return y.transpose(1, 2).to(dtype)


def arguments(shape, dtype=torch.float32, device="cpu") -> dict[str, Any]:
    """Leaf tensors as a mixer at its initialization makes them: steps of 1e-3 to 1e-1, A = -1..-N."""
    batch, length, channels, states = shape
    generator = torch.Generator().manual_seed(0)

    def normal(*size):
        return torch.randn(size, generator=generator).to(device, dtype)

    wide = torch.float64 if dtype == torch.float64 else torch.float32
    step = torch.exp(torch.empty(channels).uniform_(-6.9, -2.3, generator=generator))
    values = {
        "u": normal(batch, length, channels),
        "delta": normal(batch, length, channels) * 0.3,
        "A": -torch.arange(1, states + 1, device=device, dtype=wide).repeat(channels, 1),
        "B": normal(batch, length, states),
        "C": normal(batch, length, states),
        "D": torch.ones(channels, device=device, dtype=wide),
        "z": normal(batch, length, channels),
        "delta_bias": torch.log(torch.expm1(step)).to(device, wide),
    }
    return {name: value.requires_grad_() for name, value in values.items()}


def check(contender: Contender, shape, dtype=torch.float32) -> float:
    """The largest error against the definition in float64, as a part of what is allowed.

    The output is checked at the shape itself, gradients at up to 96 tokens and 192 channels of it.

    Raises:
        Wrong: the contender is wrong; a wrong kernel is not timed.
    """
    batch, length, channels, states = shape
    worst = 0.0
    of_output, of_gradient = LIMITS[dtype]
    for size, with_gradients in (
        (shape, False),
        ((batch, min(length, 96), min(channels, 192), states), contender.gradients),
    ):
        got_inputs = arguments(size, dtype, contender.device)
        want_inputs: dict[str, Any] = {
            k: v.detach().double().requires_grad_(with_gradients) for k, v in got_inputs.items()
        }
        with torch.set_grad_enabled(with_gradients):
            got = contender.run(**got_inputs)
            want = selective_scan(**want_inputs, delta_softplus=True, backend="reference")
        pairs = {"output": (got, want, of_output)}
        if with_gradients:
            grads = torch.autograd.grad(got.double().square().sum(), list(got_inputs.values()))
            wanted = torch.autograd.grad(want.square().sum(), list(want_inputs.values()))
            for name, one, other in zip(got_inputs, grads, wanted, strict=True):
                pairs[f"gradient of {name}"] = (one, other, of_gradient)
        for name, (one, other, limit) in pairs.items():
            error = ((one.double() - other).abs().max() / other.abs().max()).item()
            if not error <= limit:
                raise Wrong(f"{contender.name} at {size}: {name} is off by {error:.1e}, not timed")
            worst = max(worst, error / limit)
    return worst
