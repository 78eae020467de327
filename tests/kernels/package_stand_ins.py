"""What mamba-ssm 2.3 and causal-conv1d 1.7 publish as compiled functions, in plain torch on CPU tensors.

Signatures, argument checks, layouts and returned values are those of the packages' C++ sources; the values come from
this folder's definitions.
"""

from concurrent.futures import ThreadPoolExecutor
from types import ModuleType

import torch

from .definitions import conv_definition, scan_definition

FLOATS = (torch.float32, torch.float16, torch.bfloat16)


def check(condition, what):
    if not condition:
        raise RuntimeError(f"Expected {what} to be true")


def gradients(function, inputs, grad):
    """Autograd, in a thread of its own: an operator's implementation runs where autograd is turned off."""

    def differentiate():
        with torch.enable_grad():
            leaves = [None if t is None else t.detach().clone().requires_grad_() for t in inputs]
            out = function(*leaves)
            found = torch.autograd.grad(
                out, [t for t in leaves if t is not None], grad.double(), allow_unused=True
            )
        found = iter(found)
        return [None if t is None else next(found) for t in leaves]

    with ThreadPoolExecutor(1) as pool:
        return pool.submit(differentiate).result()


def channel_major_scan(u, delta, A, B, C, D, z, delta_bias, softplus):
    u, delta, B, C = (t.transpose(1, 2) for t in (u, delta, B.squeeze(1), C.squeeze(1)))
    z = None if z is None else z.transpose(1, 2)
    return scan_definition(u, delta, A, B, C, D, z, delta_bias, softplus).transpose(1, 2)


def check_scan(u, delta, A, B, C, D, z, delta_bias):
    batch, channels, length = u.shape
    states = A.shape[1]
    check(u.dtype in FLOATS and A.dtype == torch.float32, "input_type and weight_type")
    for t in (delta, B, C, z):
        check(t is None or t.dtype == u.dtype, "scalar_type() == input_type")
    for t in (u, delta, z):
        check(t is None or (t.shape == u.shape and (t.stride(-1) == 1 or length == 1)), "u.stride(-1) == 1")
    for t in (B, C):
        check(
            t.shape == (batch, 1, states, length) and (t.stride(-1) == 1 or length == 1), "B.stride(-1) == 1"
        )
    check(A.shape == (channels, states) and states <= 256, "dstate <= 256")
    for t in (D, delta_bias):
        check(t is None or (t.dtype == torch.float32 and t.shape == (channels,)), "D.scalar_type() == Float")


def states_of(u, A):
    """Stands for the states of the chunks; backward wants the ones of its own forward."""
    chunks = (u.shape[2] + 2047) // 2048
    return u.float().sum(-1)[:, :, None, None].expand(-1, -1, chunks, 2 * A.shape[1]).contiguous()


def scan_fwd(u, delta, A, B, C, D, z, delta_bias, delta_softplus):
    check_scan(u, delta, A, B, C, D, z, delta_bias)
    inputs = (u, delta, A, B, C, D)
    out = torch.empty_like(delta).copy_(channel_major_scan(*inputs, None, delta_bias, delta_softplus))
    result = [out, states_of(u, A)]
    if z is not None:
        gated = channel_major_scan(*inputs, z, delta_bias, delta_softplus)
        result.append(torch.empty_like(z).copy_(gated))
    return result


def scan_bwd(u, delta, A, B, C, D, z, delta_bias, dout, x, out, dz, delta_softplus, recompute_out_z):
    check_scan(u, delta, A, B, C, D, z, delta_bias)
    check(dout.dtype == u.dtype and dout.shape == u.shape, "dout.scalar_type() == input_type")
    check(torch.equal(x, states_of(u, A)) and x.is_contiguous(), "x is forward's")
    if z is not None:
        want = channel_major_scan(u, delta, A, B, C, D, None, delta_bias, delta_softplus)
        check(
            out.dtype == u.dtype and torch.allclose(out, want.to(out.dtype)),
            "out is forward's before the gate",
        )
    inputs = (u, delta, A, B, C, D, z, delta_bias)
    du, ddelta, dA, dB, dC, dD, dz, dbias = gradients(
        lambda *leaves: channel_major_scan(*leaves, delta_softplus), inputs, dout
    )
    return [du, ddelta, dA, dB, dC, dD, dbias, *([] if z is None else [dz])]


def check_conv(x, weight, bias):
    _, channels, _ = x.shape
    check(x.stride(2) == 1 or x.stride(1) == 1, "x.stride(2) == 1 || x.stride(1) == 1")
    if x.stride(1) == 1 and x.stride(2) > 1:
        check(channels % 8 == 0 and x.stride(2) % 8 == 0 and x.stride(0) % 8 == 0, "multiples of 8")
    check(x.dtype in FLOATS and weight.dtype in FLOATS, "input_type and weight_type")
    check(2 <= weight.shape[1] <= 4, "width >= 2 && width <= 4")
    check(bias is None or (bias.dtype == weight.dtype and bias.stride(-1) == 1), "bias.scalar_type()")


def channel_major_conv(x, weight, bias, silu):
    return conv_definition(x.transpose(1, 2), weight, bias, "silu" if silu else None).transpose(1, 2)


def causal_conv1d_fwd_function(
    x, weight, bias, seq_idx, initial_states, final_states_out, silu_activation
):  # fmt: skip
    check_conv(x, weight, bias)
    return torch.empty_like(x).copy_(channel_major_conv(x, weight, bias, silu_activation))


def causal_conv1d_bwd_function(
    x, weight, bias, dout, seq_idx, initial_states, dfinal_states, dx, return_dinitial_states, silu_activation
):
    check_conv(x, weight, bias)
    check_conv(dout, weight, bias)
    found = gradients(lambda *leaves: channel_major_conv(*leaves, silu_activation), (x, weight, bias), dout)
    return torch.empty_like(x).copy_(found[0]), found[1], found[2], None


def modules():
    """The stand-ins by the names under which they are imported."""
    scan = ModuleType("selective_scan_cuda")
    scan.fwd, scan.bwd = scan_fwd, scan_bwd
    conv, functions = ModuleType("causal_conv1d"), ModuleType("causal_conv1d.cpp_functions")
    conv.__path__ = []
    functions.causal_conv1d_fwd_function = causal_conv1d_fwd_function
    functions.causal_conv1d_bwd_function = causal_conv1d_bwd_function
    return {module.__name__: module for module in (scan, conv, functions)}
