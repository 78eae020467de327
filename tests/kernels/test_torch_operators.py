"""The registered operators of the `torch` backends: contracts with torch, memory, blocking."""

import functools

import pytest
import torch
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

import dis_causal_conv1d.backends.torch_shift as torch_shift
import dis_mamba.backends.torch_chunked as torch_chunked
from dis_causal_conv1d import causal_conv1d
from dis_mamba import MambaMixer, permute, selective_scan
from tests.assertions import assert_close
from zigflow.nn.checkpointing import checkpointed

from .definitions import (
    SCAN_NAMES,
    conv_arguments,
    conv_definition,
    scan_arguments,
    scan_definition,
    with_gradients,
)
from .operators import CountOperators

scan = functools.partial(selective_scan, backend="torch", delta_softplus=True)
conv = functools.partial(causal_conv1d, backend="torch", activation="silu")


@pytest.mark.parametrize("options", [("D", "z", "delta_bias"), ()])
def test_opcheck_of_the_scan(options):
    arguments = scan_arguments(1, 33, 2, 1, options=options)
    tensors = [arguments.get(name) for name in SCAN_NAMES]
    torch.library.opcheck(torch_chunked.chunked_scan, (*tensors, True, False))
    frozen = [None if t is None else t.detach() for t in tensors]
    out, states = torch_chunked.chunked_scan(*frozen, True, True)
    torch.library.opcheck(torch_chunked.chunked_scan_backward, (out, *frozen, states, True, True))


@pytest.mark.parametrize("bias", [True, False])
def test_opcheck_of_the_convolution(bias):
    arguments = conv_arguments(2, 6, 3, 4, bias=bias)
    tensors = [arguments.get(name) for name in ("x", "weight", "bias")]
    torch.library.opcheck(torch_shift.shifted_conv, (*tensors, True, False))
    frozen = [None if t is None else t.detach() for t in tensors]
    torch.library.opcheck(torch_shift.shifted_conv_backward, (torch.ones(2, 6, 3), *frozen, True, True))


@pytest.mark.parametrize("keep", [True, False])
def test_selective_checkpointing_can_keep_the_scan(keep):
    op = torch.ops.zigflow.chunked_scan.default
    arguments = scan_arguments(2, 40, 3, 2)

    def policy(ctx, func, *args, **kwargs):
        return CheckpointPolicy.MUST_SAVE if func is op else CheckpointPolicy.PREFER_RECOMPUTE

    def block(*tensors):
        return scan(*tensors).sin()

    contexts = functools.partial(create_selective_checkpoint_contexts, policy)
    with CountOperators() as counter:
        extra = {"context_fn": contexts} if keep else {}
        out = checkpoint(block, *arguments.values(), use_reentrant=False, **extra)
        grads = torch.autograd.grad(out.sum(), list(arguments.values()))
    assert counter.calls[op.name()] == (1 if keep else 2)
    want = torch.autograd.grad(block(*arguments.values()).sum(), list(arguments.values()))
    assert all(torch.equal(a, b) for a, b in zip(grads, want, strict=True))


def test_the_selective_policy_runs_scan_and_convolution_once():
    mixer = MambaMixer(6, d_state=3, backend="torch")
    x = torch.randn(2, 40, 6, requires_grad=True)
    names = ("zigflow::chunked_scan", "zigflow::shifted_conv")
    grads = []
    for policy, times in (("selective", 1), ("block", 2)):
        with CountOperators() as counter:
            grads += torch.autograd.grad(checkpointed(policy, mixer, x).sum(), [x])
        assert [counter.calls[name] for name in names] == [times, times]
        assert [counter.calls[name + "_backward"] for name in names] == [1, 1]
    assert torch.equal(*grads)


@pytest.mark.parametrize("reverse", [False, True])
def test_scan_cut_into_many_blocks(monkeypatch, reverse):
    # 128 elements per buffer: one row and 64 channels at a time, 130 channels make three cuts.
    monkeypatch.setattr(torch_chunked, "_BLOCK_ELEMENTS_CPU", 128)
    arguments = scan_arguments(3, 70, 130, 3)
    out, grads = with_gradients(scan, arguments, reverse=reverse)
    want, want_grads = with_gradients(scan_definition, arguments, delta_softplus=True, reverse=reverse)
    assert_close("output", out, want, of_max=1e-5)
    for name in arguments:
        assert_close(name, grads[name], want_grads[name], of_max=1e-4)


def test_convolution_cut_into_many_blocks(monkeypatch):
    monkeypatch.setattr(torch_shift, "_BLOCK_ELEMENTS_CPU", 1)
    arguments = conv_arguments(3, 9, 5, 4)
    out, grads = with_gradients(conv, arguments)
    want, want_grads = with_gradients(conv_definition, arguments, activation="silu")
    assert_close("output", out, want, of_max=1e-5)
    for name in arguments:
        assert_close(name, grads[name], want_grads[name], of_max=1e-5)


def by_threads(function, arguments, threads, **flags):
    """Output and gradients with each number of threads."""
    before = torch.get_num_threads()
    try:
        for number in threads:
            torch.set_num_threads(number)
            out, grads = with_gradients(function, arguments, **flags)
            yield [out, *grads.values()]
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_the_number_of_threads_changes_no_bit(dtype, reverse):
    # Odd sizes, above what torch gives one thread; one token is left for the last chunk.
    arguments = scan_arguments(2, 65, 1027, 7, dtype=dtype)
    for name in ("B", "C", "z"):
        values = arguments[name].detach().transpose(1, 2).contiguous().transpose(1, 2)
        arguments[name] = values.requires_grad_()
    cases = [
        (scan, arguments),
        (scan, scan_arguments(1, 33, 130, 16, dtype=dtype)),
        (conv, conv_arguments(2, 101, 389, 4, dtype=dtype)),
        (conv, conv_arguments(3, 40, 640, 3, dtype=dtype, bias=False)),
        (conv, conv_arguments(1, 40000, 1, 2, dtype=dtype)),
    ]
    for function, values in cases:
        first, *others = by_threads(function, values, (1, 1, 2, 3, 7), reverse=reverse)
        for other in others:
            assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("L", [1, 32, 70])
def test_no_uninitialized_memory_is_read(L, reverse):
    assert torch.empty(1).isnan().all()
    arguments = scan_arguments(3, L, 5, 4)
    arguments_conv = conv_arguments(3, L, 5, 4)
    for function, values in ((scan, arguments), (conv, arguments_conv)):
        out, grads = with_gradients(function, values, reverse=reverse)
        for value in (out, *grads.values()):
            assert value.isfinite().all()


@pytest.mark.parametrize(
    "function,arguments", [(scan, scan_arguments(1, 4, 2, 2)), (conv, conv_arguments(1, 4, 2, 3))]
)
def test_a_second_derivative_is_refused(function, arguments):
    (grad,) = torch.autograd.grad(
        function(**arguments).sum(), [next(iter(arguments.values()))], create_graph=True
    )
    with pytest.raises(RuntimeError, match="no second derivative: use backend='reference'"):
        grad.sum().backward()


def test_reference_has_second_derivatives():
    values = list(scan_arguments(1, 3, 2, 2, dtype=torch.float64).values())
    assert torch.autograd.gradgradcheck(lambda *t: selective_scan(*t, backend="reference"), values)
    values = list(conv_arguments(1, 3, 2, 2, dtype=torch.float64).values())
    assert torch.autograd.gradgradcheck(lambda *t: causal_conv1d(*t, "silu", backend="reference"), values)


def test_the_backward_of_permute_gathers():
    order = torch.randperm(7)
    x = torch.randn(2, 7, 3, requires_grad=True)
    with CountOperators() as counter:
        permute(x, order, order.argsort()).sum().backward()
    assert counter.calls["aten::index_select"] == 2
    assert not any("index_put" in name or "index_add" in name or "scatter" in name for name in counter.calls)


def test_autocast_around_forward_and_backward_changes_nothing():
    arguments = scan_arguments(2, 33, 5, 4)
    want, want_grads = with_gradients(scan, arguments)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out, grads = with_gradients(scan, arguments)
    assert torch.equal(out, want)
    assert all(torch.equal(grads[name], want_grads[name]) for name in arguments)
