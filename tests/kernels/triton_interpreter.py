"""Run by test_triton.py with TRITON_INTERPRET=1: the kernels on CPU tensors against the definitions.

The interpreter takes tens of microseconds for an operation of a program, so that few tokens and channels must do. Most
checks make chunks, tiles and blocks of states small, to have several of each; some keep the sizes of a GPU.
"""

import contextlib
import functools
import sys
import warnings

import hypothesis
import hypothesis.strategies as st
import pytest
import torch

from dis_causal_conv1d import causal_conv1d
from dis_causal_conv1d.backends import triton_conv
from dis_mamba import MambaMixer, selective_scan
from dis_mamba.backends import triton_scan
from tests.assertions import assert_close, assert_relative_rms
from tests.kernels.definitions import (
    SCAN_NAMES,
    conv_arguments,
    conv_definition,
    scan_arguments,
    scan_definition,
    with_gradients,
)
from tests.kernels.operators import CountOperators
from tests.kernels.tokenwise.triton_checks import CHECKS as TOKENWISE
from zigflow.nn.checkpointing import checkpointed

ALL = ("D", "z", "delta_bias")
SMALL = {
    triton_scan: {"CHUNK": 4, "_STATES": 2, "_GROUP": 2, "_TILE": 2, "_VECTORS": 1},
    triton_conv: {"_TILE": 4, "_WARPS": 1},
}
HALVES = (torch.bfloat16, torch.float16)
CHECKS = {}

scan = functools.partial(selective_scan, backend="triton", delta_softplus=True)
conv = functools.partial(causal_conv1d, backend="triton", activation="silu")
define_scan = functools.partial(scan_definition, delta_softplus=True)
define_conv = functools.partial(conv_definition, activation="silu")


def check(function):
    CHECKS[function.__name__] = function
    return function


@contextlib.contextmanager
def sizes(changes):
    before = {module: {name: getattr(module, name) for name in new} for module, new in changes.items()}
    for now in (changes, before):
        for module, values in now.items():
            for name, value in values.items():
                setattr(module, name, value)
        if now is changes:
            yield


def strided(arguments):
    """The same values, every second one of a tensor twice as wide."""
    spread = {
        name: torch.stack([value, value + 1], dim=-1).detach()[..., 0] for name, value in arguments.items()
    }
    return {name: value.requires_grad_() for name, value in spread.items()}


def compare(function, definition, arguments, limits=(1e-5, 1e-4), **flags):
    out, grads = with_gradients(function, arguments, **flags)
    want, want_grads = with_gradients(definition, arguments, **flags)
    first = next(iter(arguments.values()))
    assert out.dtype == first.dtype
    close = functools.partial(assert_close, of_max=limits[0])
    if first.dtype in HALVES:
        close = functools.partial(assert_relative_rms, ratio=5e-3)
    close("output", out, want)
    for name, grad in grads.items():
        assert grad.dtype == arguments[name].dtype and grad.shape == arguments[name].shape
        if first.dtype in HALVES:
            assert_relative_rms(f"gradient of {name}", grad, want_grads[name], 1e-2)
        else:
            assert_close(f"gradient of {name}", grad, want_grads[name], of_max=limits[1], floor=1e-6)


@check
def scans_of_every_kind():
    for shape, options, flags in (
        ((1, 11, 3, 2), ALL, {}),
        ((1, 10, 2, 3), ALL, {"reverse": True}),
        ((1, 1, 2, 2), ("z",), {"reverse": True}),
        ((1, 3, 33, 2), ("D",), {}),
        ((2, 5, 2, 5), ("delta_bias",), {}),
    ):
        compare(scan, define_scan, scan_arguments(*shape, options=options), **flags)
    plain = scan_arguments(2, 4, 2, 1, options=())
    plain["delta"] = plain["delta"].detach().abs().requires_grad_()
    compare(functools.partial(selective_scan, backend="triton"), scan_definition, plain)


@check
def sequences_that_are_not_cut():
    with sizes({triton_scan: {"_PROGRAMS": 0}}):
        compare(scan, define_scan, scan_arguments(1, 11, 3, 3))
        compare(scan, define_scan, scan_arguments(2, 9, 2, 2), reverse=True)


@check
def half_precision():
    for dtype in HALVES:
        compare(scan, define_scan, scan_arguments(1, 9, 3, 3, dtype=dtype), reverse=dtype == torch.float16)
        compare(conv, define_conv, conv_arguments(1, 6, 3, 4, dtype=dtype), reverse=dtype == torch.float16)


@hypothesis.settings(max_examples=8, derandomize=True, deadline=None, database=None)
@hypothesis.given(
    shape=st.tuples(st.integers(1, 2), st.integers(1, 9), st.sampled_from([1, 2, 5, 33]), st.integers(1, 4)),
    dtype=st.sampled_from([torch.float32, *HALVES]),
    options=st.sets(st.sampled_from(ALL)),
    programs=st.sampled_from([0, 1024]),
    reverse=st.booleans(),
    softplus=st.booleans(),
    strides=st.booleans(),
    seed=st.integers(0, 100),
)
def random_scans(shape, dtype, options, programs, reverse, softplus, strides, seed):
    arguments = scan_arguments(*shape, dtype=dtype, options=tuple(options), seed=seed)
    if not softplus:
        # A negative step would let the state grow without bound.
        steps = {"delta", "delta_bias"} & set(arguments)
        arguments |= {name: arguments[name].detach().abs().requires_grad_() for name in steps}
    arguments = strided(arguments) if strides else arguments
    function = functools.partial(selective_scan, backend="triton")
    with sizes({triton_scan: {"_PROGRAMS": programs}}):
        compare(function, scan_definition, arguments, delta_softplus=softplus, reverse=reverse)


@check
def scans_of_any_shape():
    random_scans()


@check
def convolutions():
    for shape, bias, flags in (
        ((2, 7, 3, 4), True, {"activation": "silu"}),
        ((1, 6, 3, 3), True, {"activation": "silu", "reverse": True}),
        ((1, 5, 33, 2), False, {}),
        ((1, 2, 3, 4), True, {"reverse": True}),
    ):
        function = functools.partial(causal_conv1d, backend="triton")
        compare(function, conv_definition, conv_arguments(*shape, bias=bias), (1e-5, 1e-5), **flags)
    compare(conv, define_conv, strided(conv_arguments(1, 5, 3, 3)), (1e-5, 1e-5))


@check
def more_channels_than_a_grid_takes():
    with sizes({triton_scan: {"_MAX_CHANNELS": 2}}):
        compare(scan, define_scan, scan_arguments(2, 5, 5, 2))
        compare(scan, define_scan, scan_arguments(1, 3, 3, 2, options=()), reverse=True)


@check
def the_sizes_of_a_gpu():
    """Two chunks, the second one short, as two segments and as one; two vectors of channels; two blocks of states."""
    production = {module: {name: SIZES[module][name] for name in SMALL[module]} for module in SMALL}
    with sizes(production):
        assert (triton_scan.CHUNK, triton_scan._TILE, triton_scan._VECTORS) == (64, 8, 2)
        compare(scan, define_scan, scan_arguments(1, 66, 2, 4))
        compare(scan, define_scan, scan_arguments(1, 9, 33, 4))
        compare(scan, define_scan, scan_arguments(1, 2, 2, 17))
        with sizes({triton_scan: {"_PROGRAMS": 0}}):
            compare(scan, define_scan, scan_arguments(1, 66, 2, 1), reverse=True)
        compare(conv, define_conv, conv_arguments(1, 18, 130, 4), (1e-5, 1e-5))


@check
def extreme_steps():
    """Steps of 0 and of 1e4 after softplus: decays of 1 and of 0, nothing overflows, gradients are right."""
    arguments = scan_arguments(2, 7, 3, 2)
    extreme = torch.tensor([-1e4, -80.0, 80.0, 0.0, 1e4, -30.0, 3e3])
    arguments["delta"] = extreme[None, :, None].expand(2, 7, 3).clone().requires_grad_()
    for reverse in (False, True):
        compare(scan, define_scan, arguments, reverse=reverse)


@check
def large_steps_that_decay_little():
    """What is left of a small state beside a large input: h - dt B u has no digits of it."""
    arguments = scan_arguments(1, 2, 2, 2, options=())
    arguments["A"] = (arguments["A"].detach() * 1e-5).requires_grad_()
    arguments["delta"] = torch.tensor([1e-3, 1e4])[None, :, None].expand(1, 2, 2).clone().requires_grad_()
    compare(functools.partial(selective_scan, backend="triton"), scan_definition, arguments)


@check
def empty_batches():
    out, grads = with_gradients(scan, scan_arguments(0, 5, 3, 2))
    assert out.shape == (0, 5, 3) and grads["u"].shape == (0, 5, 3)
    assert all(grads[name].eq(0).all() for name in ("A", "D", "delta_bias"))
    out, grads = with_gradients(conv, conv_arguments(0, 5, 3, 4))
    assert out.shape == (0, 5, 3) and grads["weight"].eq(0).all() and grads["bias"].eq(0).all()


@check
def memory_that_was_not_written():
    """Every new tensor is NaN first, and two runs give the same bits."""
    torch.use_deterministic_algorithms(True)
    assert torch.empty(1).isnan().all() and torch.ones(1).new_empty(1).isnan().all()
    for programs in (0, 1024):
        with sizes({triton_scan: {"_PROGRAMS": programs}}):
            arguments = scan_arguments(1, 9, 3, 3)
            compare(scan, define_scan, arguments)
            runs = [with_gradients(scan, arguments) for _ in range(2)]
            assert torch.equal(runs[0][0], runs[1][0])
            assert all(torch.equal(runs[0][1][name], runs[1][1][name]) for name in arguments)
    compare(conv, define_conv, conv_arguments(2, 6, 3, 4), (1e-5, 1e-5), reverse=True)
    torch.use_deterministic_algorithms(False)


@check
def opcheck():
    # The results without data know one size of a chunk.
    triton_scan.CHUNK = SIZES[triton_scan]["CHUNK"]
    for options in (ALL, ()):
        arguments = scan_arguments(1, 3, 2, 1, options=options)
        tensors = [arguments.get(name) for name in SCAN_NAMES]
        torch.library.opcheck(triton_scan.triton_scan, (*tensors, True, False))
        frozen = [None if t is None else t.detach() for t in tensors]
        out, states = triton_scan.triton_scan(*frozen, True, True)
        torch.library.opcheck(triton_scan.triton_scan_backward, (out, *frozen, states, True, True))
    two_chunks = [scan_arguments(1, 65, 2, 1).get(name).detach() for name in SCAN_NAMES]
    torch.library.opcheck(triton_scan.triton_scan, (*two_chunks, True, False), test_utils="test_faketensor")
    for bias in (True, False):
        arguments = conv_arguments(1, 5, 2, 3, bias=bias)
        tensors = [arguments.get(name) for name in ("x", "weight", "bias")]
        torch.library.opcheck(triton_conv.triton_conv, (*tensors, True, False))
        frozen = [None if t is None else t.detach() for t in tensors]
        torch.library.opcheck(triton_conv.triton_conv_backward, (torch.ones(1, 5, 2), *frozen, True, True))


@check
def selective_checkpointing_runs_every_kernel_once():
    mixer = MambaMixer(4, d_state=2, backend="triton")
    x = torch.randn(1, 6, 4, requires_grad=True)
    names = ("zigflow::triton_scan", "zigflow::triton_conv")
    with CountOperators() as counter:
        checkpointed("selective", mixer, x).sum().backward()
    assert [counter.calls[name] for name in names] == [1, 1]
    assert [counter.calls[name + "_backward"] for name in names] == [1, 1]


@check
def refusals():
    for function, arguments in ((scan, scan_arguments(1, 3, 2, 2)), (conv, conv_arguments(1, 3, 2, 3))):
        first = next(iter(arguments.values()))
        (grad,) = torch.autograd.grad(function(**arguments).sum(), [first], create_graph=True)
        with pytest.raises(RuntimeError, match="'triton' has no second derivative: use backend='reference'"):
            grad.sum().backward()
    with pytest.raises(ValueError, match="float64: use backend='torch'"):
        scan(**scan_arguments(1, 3, 2, 2, dtype=torch.float64))
    with pytest.raises(ValueError, match="at most 256 states, got 257"):
        scan(**scan_arguments(1, 1, 1, 257))
    with pytest.raises(ValueError, match="at most 16 taps, got 17"):
        conv(**conv_arguments(1, 3, 2, 17))


SIZES = {module: {name: getattr(module, name) for name in SMALL[module]} for module in SMALL}


def main() -> None:
    warnings.filterwarnings("ignore", message="overflow encountered in exp2")
    checks = CHECKS | TOKENWISE
    for name in sys.argv[1:] or checks:
        with sizes(SMALL):
            checks[name]()
        sys.stdout.write(f"{name}: passed\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
