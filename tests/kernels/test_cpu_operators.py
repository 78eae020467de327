"""The registered operators of the `cpu` backends: contracts with torch, accuracy, threads, memory."""

import functools
import math

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import dis_causal_conv1d.backends.cpu as cpu_conv
import dis_mamba.backends.cpu as cpu_scan
from dis_causal_conv1d import causal_conv1d
from dis_kernels.native import NativeLibrary
from dis_mamba import MambaMixer, selective_scan
from tests.assertions import assert_close, assert_relative_rms
from zigflow.nn.checkpointing import checkpointed

from .definitions import (
    SCAN_NAMES,
    conv_arguments,
    conv_definition,
    scan_arguments,
    scan_definition,
    with_gradients,
)
from .operators import CountOperators, compare, needs_compiler

# Without a compiler there is nothing here to test; with one, a backend that refuses is a failure.
pytestmark = needs_compiler

scan = functools.partial(selective_scan, backend="cpu", delta_softplus=True)
conv = functools.partial(causal_conv1d, backend="cpu", activation="silu")


define_scan = functools.partial(scan_definition, delta_softplus=True)
define_conv = functools.partial(conv_definition, activation="silu")


@pytest.mark.parametrize("options", [("D", "z", "delta_bias"), ()])
def test_opcheck_of_the_scan(options):
    arguments = scan_arguments(1, 33, 2, 1, options=options)
    tensors = [arguments.get(name) for name in SCAN_NAMES]
    torch.library.opcheck(cpu_scan.cpu_scan, (*tensors, True, False))
    frozen = [None if t is None else t.detach() for t in tensors]
    out, states = cpu_scan.cpu_scan(*frozen, True, True)
    torch.library.opcheck(cpu_scan.cpu_scan_backward, (out, *frozen, states, True, True))


@pytest.mark.parametrize("bias", [True, False])
def test_opcheck_of_the_convolution(bias):
    arguments = conv_arguments(2, 6, 3, 4, bias=bias)
    tensors = [arguments.get(name) for name in ("x", "weight", "bias")]
    torch.library.opcheck(cpu_conv.cpu_conv, (*tensors, True, False))
    frozen = [None if t is None else t.detach() for t in tensors]
    torch.library.opcheck(cpu_conv.cpu_conv_backward, (torch.ones(2, 6, 3), *frozen, True, True))


@pytest.mark.parametrize("E,N", [(300, 16), (2, 256), (5, 255)])
def test_many_channels_and_many_states(E, N):
    compare(scan, define_scan, scan_arguments(2, 37, E, N), (1e-5, 1e-4))
    compare(conv, define_conv, conv_arguments(2, 37, E, 4), (1e-5, 1e-4))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_mixed_dtypes(dtype):
    arguments = scan_arguments(2, 33, 17, 4)
    for name in ("u", "B"):
        arguments[name] = arguments[name].detach().to(dtype).requires_grad_()
    out, grads = with_gradients(scan, arguments)
    want, want_grads = with_gradients(define_scan, arguments)
    assert out.dtype == dtype
    assert_relative_rms("output", out, want, 5e-3)
    for name, grad in grads.items():
        assert grad.dtype == arguments[name].dtype
        assert_relative_rms(f"gradient of {name}", grad, want_grads[name], 1e-2)


def test_bfloat16_rounds_to_nearest_even_and_keeps_special_values():
    x = torch.cat(
        [
            torch.randn(4000) * 10.0 ** torch.randint(-30, 30, (4000,)),
            torch.tensor([math.nan, math.inf, -0.0]),
        ]
    )
    x = x.bfloat16()[None, None]
    weight = torch.full((x.shape[2], 1), 1.00390625 + 2**-12)
    got = causal_conv1d(x, weight, backend="cpu")
    want = (x.float() * weight[:, 0]).bfloat16()
    assert torch.equal(got.view(torch.int16)[..., :-3], want.view(torch.int16)[..., :-3])
    assert got[0, 0, -3].isnan()
    assert got[0, 0, -2].isinf()
    assert got[0, 0, -1] == 0


def one_step(delta, A=None, **flags):
    """softplus(delta) by channel (A is None), or exp(delta * A): what one or two tokens of a scan show."""
    E = delta.numel()
    one = torch.ones(1, 2, 1, dtype=delta.dtype)
    u = torch.stack([torch.ones(E), torch.zeros(E)]).to(delta.dtype)[None]
    steps = torch.stack([delta if A is None else torch.ones(E, dtype=delta.dtype), delta])[None]
    A = torch.zeros(E, 1, dtype=delta.dtype) if A is None else A[:, None]
    return selective_scan(u, steps, A, one, one, backend="cpu", **flags)[0, -1]


def relative_error(got, want):
    return ((got.double() - want) / want).abs().max().item()


@pytest.mark.parametrize("dtype,limit", [(torch.float32, 2.5e-7), (torch.float64, 1e-15)])
def test_the_elementary_functions_are_accurate(dtype, limit):
    x = torch.linspace(-80, 80, 20001, dtype=torch.float64).to(dtype)
    wide = x.double()
    want = wide.clamp_min(0) + torch.log1p(torch.exp(-wide.abs()))
    assert relative_error(one_step(x, delta_softplus=True), want) < limit
    # dt A is rounded in the type of the state: the error of the exponential grows with the exponent.
    f = torch.linspace(0, 1, 20001, dtype=torch.float64).to(dtype)
    decay = one_step(f, -torch.ones_like(f))
    assert relative_error(decay, torch.exp(-f.double())) < limit
    assert one_step(torch.zeros(1, dtype=dtype), torch.ones(1, dtype=dtype)).item() == 1
    silu = causal_conv1d(x[None, None], torch.ones(x.numel(), 1, dtype=dtype), None, "silu", backend="cpu")[
        0, 0
    ]
    keep = wide.abs() > 1e-6
    assert relative_error(silu[keep], (wide * torch.sigmoid(wide))[keep]) < 2 * limit


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_exponentials_out_of_range(dtype):
    def decay(step, rate=1.0):
        one = torch.ones(1, dtype=dtype)
        return one_step(step * one, rate * one).item()

    huge = torch.finfo(dtype).max
    assert decay(-1e3) == decay(-1e30) == decay(huge, -huge) == 0
    assert decay(1e3) == decay(1e30) == math.inf
    assert math.isnan(decay(math.nan))
    assert 0 < decay(-86.0) == pytest.approx(math.exp(-86), rel=1e-4)
    assert decay(88.0) == pytest.approx(math.exp(88), rel=1e-4)
    x = torch.tensor([-1e30, -200.0, 200.0, 1e30], dtype=dtype)
    want = [0, 0, 200, x[3].item()]
    assert one_step(x, delta_softplus=True).tolist() == pytest.approx(want, rel=1e-12, abs=1e-30)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("size", [1e2, 1e4, 1e30])
def test_extreme_steps_stay_finite(size, dtype):
    arguments = scan_arguments(2, 40, 5, 4, dtype=dtype)
    # Steps that are huge take u B with them: the sign of the step is what varies, and u is small where it is large.
    arguments["delta"] = (size * torch.randn(2, 40, 5).sign()).to(dtype).requires_grad_()
    arguments["u"] = (arguments["u"].detach() / size).requires_grad_()
    out, grads = with_gradients(scan, arguments)
    want, want_grads = with_gradients(define_scan, arguments)
    tolerance = 2e-2 if dtype == torch.bfloat16 else 1e-4
    assert_close("output", out, want, of_max=tolerance)
    for name, grad in grads.items():
        assert_close(name, grad, want_grads[name], of_max=tolerance, floor=1e-6)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_the_number_of_threads_changes_no_bit(dtype, reverse):
    values = scan_arguments(19, 70, 150, 5, dtype=dtype), conv_arguments(19, 70, 300, 4, dtype=dtype)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            for function, arguments in zip((scan, conv), values, strict=True):
                out, grads = with_gradients(function, arguments, reverse=reverse)
                results.append([out, *grads.values()])
    finally:
        torch.set_num_threads(before)
    for i in (2, 4):
        for op in (0, 1):
            assert all(torch.equal(a, b) for a, b in zip(results[op], results[i + op], strict=True))


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("L", [1, 3, 32, 70])
def test_no_uninitialized_memory_is_read(L, reverse):
    assert torch.empty(1).isnan().all()
    for sizes in ((3, L, 5, 4), (17, L, 40, 3)):
        for function, values in ((scan, scan_arguments(*sizes)), (conv, conv_arguments(*sizes))):
            out, grads = with_gradients(function, values, reverse=reverse)
            for value in (out, *grads.values()):
                assert value.isfinite().all()


def test_selective_checkpointing_runs_every_kernel_once():
    mixer = MambaMixer(6, d_state=3, backend="cpu")
    x = torch.randn(2, 40, 6, requires_grad=True)
    names = ("zigflow::cpu_scan", "zigflow::cpu_conv")
    with CountOperators() as counter:
        checkpointed("selective", mixer, x).sum().backward()
    assert [counter.calls[name] for name in names] == [1, 1]
    assert [counter.calls[name + "_backward"] for name in names] == [1, 1]
    kept, x.grad = x.grad, None
    with CountOperators() as counter:
        checkpoint(mixer, x, use_reentrant=False).sum().backward()
    assert [counter.calls[name] for name in names] == [2, 2]
    assert torch.equal(kept, x.grad)


@pytest.mark.parametrize(
    "function,arguments", [(scan, scan_arguments(1, 4, 2, 2)), (conv, conv_arguments(1, 4, 2, 3))]
)
def test_a_second_derivative_is_refused(function, arguments):
    (grad,) = torch.autograd.grad(
        function(**arguments).sum(), [next(iter(arguments.values()))], create_graph=True
    )
    with pytest.raises(RuntimeError, match="'cpu' has no second derivative: use backend='reference'"):
        grad.sum().backward()


def test_a_workspace_of_more_than_two_gigabytes_is_counted_whole():
    batch, length, states = 64, 4096, 256
    sizes = (batch, length, 1536, states, True, False, 2, 0)
    needed = 4 * cpu_scan._workspace_size(cpu_scan.LIBRARY, sizes, True)
    # Sums of the gradients of B and C, in two parts at least.
    assert needed > 2 * 2 * 4 * batch * length * states


def test_what_it_does_not_take_falls_to_torch_or_is_refused_by_name():
    arguments = {name: value.detach() for name, value in conv_arguments(1, 4, 2, 17).items()}
    with pytest.raises(ValueError, match="'cpu' does not take this call: weight has 17 taps, at most 16"):
        causal_conv1d(**arguments, backend="cpu")
    assert_close("output", causal_conv1d(**arguments), conv_definition(**arguments))
    meta = {name: value.detach().to("meta") for name, value in scan_arguments(1, 4, 2, 2).items()}
    with pytest.raises(ValueError, match="'cpu' does not take this call: the tensors are on meta"):
        selective_scan(**meta, backend="cpu")


@pytest.mark.slow
@pytest.mark.parametrize("width", [16, 32])
def test_narrower_vectors_of_other_processors(width, monkeypatch):
    monkeypatch.setenv(
        "ZIGFLOW_CXXFLAGS", f"-DZIGFLOW_VECTOR_BYTES={width} -DZIGFLOW_NO_INTRINSICS -fno-tree-vectorize"
    )
    for module in (cpu_scan, cpu_conv):
        monkeypatch.setattr(module, "LIBRARY", NativeLibrary(module.LIBRARY.source, module.LIBRARY.defines))
    for sizes in ((2, 33, 17, 17), (3, 5, 40, 4), (1, 70, 300, 2)):
        for reverse in (False, True):
            compare(scan, define_scan, scan_arguments(*sizes), (1e-5, 1e-4), reverse=reverse)
            compare(conv, define_conv, conv_arguments(*sizes[:3], 4), (1e-5, 1e-4), reverse=reverse)
    test_the_elementary_functions_are_accurate(torch.float32, 2.5e-7)
    test_exponentials_out_of_range(torch.float32)
    test_exponentials_out_of_range(torch.float64)
    test_bfloat16_rounds_to_nearest_even_and_keeps_special_values()
