"""Run by test_triton.py with TRITON_INTERPRET=1: the kernels on CPU tensors against the definitions.

The interpreter takes about a second for a kernel at these sizes; chunks and tiles are made small so that few
tokens make several of each.
"""

import sys

import torch

from dis_causal_conv1d import causal_conv1d
from dis_causal_conv1d.backends import triton_conv
from dis_mamba import selective_scan
from dis_mamba.backends import triton_scan
from tests.assertions import assert_close
from tests.kernels.definitions import (
    conv_arguments,
    conv_definition,
    scan_arguments,
    scan_definition,
    with_gradients,
)

ALL = ("D", "z", "delta_bias")
SCANS = {
    "several_chunks": ((1, 11, 3, 2), ALL, {"delta_softplus": True}),
    "reverse": ((1, 10, 2, 3), ALL, {"delta_softplus": True, "reverse": True}),
    "plain": ((2, 4, 2, 1), (), {}),
    "one_token": ((1, 1, 2, 2), ("z",), {"delta_softplus": True, "reverse": True}),
    "bfloat16": ((1, 9, 2, 2), ALL, {"delta_softplus": True}),
    "two_programs": ((1, 3, 33, 2), ("D",), {"delta_softplus": True}),
    "float16": ((1, 5, 2, 2), ALL, {"delta_softplus": True}),
    "strided": ((1, 5, 3, 2), ALL, {"delta_softplus": True}),
}
CONVS = {
    "silu": ((2, 7, 3, 4), True, {"activation": "silu"}),
    "reverse": ((1, 6, 3, 3), True, {"activation": "silu", "reverse": True}),
    "plain": ((1, 5, 33, 2), False, {}),
    "shorter_than_the_taps": ((1, 2, 3, 4), True, {"reverse": True}),
    "strided": ((1, 5, 3, 3), True, {"activation": "silu"}),
}
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}


def strided(arguments):
    """The same values, every second one of a tensor twice as wide."""
    spread = {
        name: torch.stack([value, value + 1], dim=-1).detach()[..., 0] for name, value in arguments.items()
    }
    return {name: value.requires_grad_() for name, value in spread.items()}


def compare(function, definition, arguments, limits, **flags):
    out, grads = with_gradients(function, arguments, backend="triton", **flags)
    want, want_grads = with_gradients(definition, arguments, **flags)
    assert out.dtype == arguments[next(iter(arguments))].dtype
    assert_close("output", out, want, of_max=limits[0])
    for name, grad in grads.items():
        assert_close(f"gradient of {name}", grad, want_grads[name], of_max=limits[1], floor=1e-6)


def main() -> None:
    triton_scan.CHUNK, triton_scan._TILE, triton_scan._BACKWARD_WARPS = 4, 2, 1
    triton_conv._TILE, triton_conv._WARPS = 4, 1
    for name, (shape, options, flags) in SCANS.items():
        half = name in DTYPES
        arguments = scan_arguments(*shape, options=options, dtype=DTYPES.get(name, torch.float32))
        if not flags.get("delta_softplus"):
            arguments["delta"] = arguments["delta"].detach().abs().requires_grad_()
        if name == "strided":
            arguments = strided(arguments)
        compare(selective_scan, scan_definition, arguments, (1e-2, 2e-2) if half else (1e-5, 1e-4), **flags)
        sys.stdout.write(f"scan {name} agrees\n")
    for name, (shape, bias, flags) in CONVS.items():
        arguments = conv_arguments(*shape, bias=bias)
        arguments = strided(arguments) if name == "strided" else arguments
        compare(causal_conv1d, conv_definition, arguments, (1e-5, 1e-5), **flags)
        sys.stdout.write(f"conv {name} agrees\n")
    extreme = scan_arguments(1, 5, 2, 2)
    extreme["delta"] = torch.tensor([-1e4, -80.0, 80.0, 0.0, 1e4])[None, :, None].expand(1, 5, 2).clone()
    extreme["delta"].requires_grad_()
    out, grads = with_gradients(selective_scan, extreme, backend="triton", delta_softplus=True)
    assert all(value.isfinite().all() for value in (out, *grads.values()))
    sys.stdout.write("scan extreme_steps is finite\n")


if __name__ == "__main__":
    main()
