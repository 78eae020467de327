"""Checks for triton_interpreter.py: what runs on single tokens around a mixer against the formulas."""

import functools
from unittest import mock

import hypothesis
import hypothesis.strategies as st
import pytest
import torch

from dis_kernels import use_backend
from dis_kernels.tokenwise import add_norm_modulate, gated_add, triton_tokenwise
from tests.assertions import assert_close
from tests.kernels.definitions import with_gradients

from .definitions import (
    READ_NAMES,
    a_walk,
    read_arguments,
    read_definition,
    write_arguments,
    write_definition,
)
from .test_tokenwise import agree, block, read

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
# Stream and mixer; of the largest value, output and gradients.
LIMITS = {
    (F32, F32): (1e-6, 1e-5),
    (F32, BF16): (1e-2, 1e-2),
    (BF16, BF16): (1e-2, 1e-2),
    (F32, F16): (2e-3, 2e-3),
    (F16, F16): (2e-3, 2e-3),
}
CHECKS = {}

reading = functools.partial(read, backend="triton")
writing = functools.partial(gated_add, backend="triton")


def check(function):
    CHECKS[function.__name__] = function
    return function


def compare(B, L, D, dtypes, options=READ_NAMES, walks=True, centered=False, seed=0):
    walk = a_walk(L, seed) if walks else {}
    flags = {"eps": 0.5 if centered else 1e-3, "centered": centered, "dtype": dtypes[1], **walk}
    agree(reading, read_definition, read_arguments(B, L, D, *dtypes, options, seed), LIMITS[dtypes], **flags)
    agree(writing, write_definition, write_arguments(B, L, D, *dtypes, seed), LIMITS[dtypes], **walk)


@hypothesis.settings(max_examples=12, derandomize=True, deadline=None, database=None)
@hypothesis.given(
    shape=st.tuples(st.integers(1, 2), st.integers(1, 9), st.sampled_from([2, 5, 32, 130])),
    dtypes=st.sampled_from(list(LIMITS)),
    options=st.sets(st.sampled_from(["hidden", "weight", "modulation"])),
    walks=st.booleans(),
    centered=st.booleans(),
    seed=st.integers(0, 100),
)
def random_tokens(shape, dtypes, options, walks, centered, seed):
    names = options | ({"shift", "scale"} if "modulation" in options else set())
    compare(*shape, dtypes, names, walks, centered, seed)


@check
def tokens_of_any_shape():
    random_tokens()


@check
def tokens_of_every_dtype():
    """Three runs of a row of the batch, the last one short."""
    assert triton_tokenwise.runs_of(2, 9) == (3, 4)
    for dtypes in LIMITS:
        for centered in (False, True):
            compare(2, 9, 7, dtypes, centered=centered)


@check
def a_width_of_one():
    assert triton_tokenwise.tile(1) == {"BLOCK": 1, "num_warps": 1}
    compare(1, 2, 1, (F32, F32))


@check
def gradients_of_some_results():
    arguments = read_arguments(2, 5, 6, F32, F32)
    walk = a_walk(5)
    for wanted in range(3):

        def one(wanted=wanted, **given):
            return add_norm_modulate(**given, keep_normed=True, backend="triton")[wanted]

        def same(wanted=wanted, **given):
            joined = read_definition(**given, eps=1e-5, centered=False)[..., 6 * wanted : 6 * wanted + 6]
            return joined + 0 * sum(t.double().sum() for n, t in given.items() if n in READ_NAMES)

        weight = torch.arange(60.0).reshape(2, 5, 6) / 50
        got = torch.autograd.grad(
            (one(**arguments, **walk) * weight).sum(), list(arguments.values()), allow_unused=True
        )
        _, want = with_gradients(same, arguments, weight, **walk)
        for grad, (name, wish) in zip(got, want.items(), strict=True):
            grad = torch.zeros_like(wish) if grad is None else grad
            assert_close(f"gradient of {name}", grad, wish, of_max=1e-5, floor=1e-5)


@check
def tokens_in_memory_that_was_not_written():
    """Every new tensor is NaN first, arguments are strided, and two runs give the same bits."""
    torch.use_deterministic_algorithms(True)
    assert torch.empty(1).isnan().all() and torch.ones(1).new_empty(1).isnan().all()
    runs = [block("triton", a_walk(9), sizes=(2, 9, 5), centered=True) for _ in range(2)]
    for got, again in zip(*runs, strict=True):
        assert got.isfinite().all() and torch.equal(got, again)
    found = []
    wide, chunks = torch.randn(2, 7, 10), torch.randn(2, 15).chunk(3, dim=1)
    hidden, residual = wide[..., ::2], wide.transpose(0, 1)[:7, :2, :5].transpose(0, 1)
    arguments = (hidden, residual, torch.randn(10)[::2], chunks[0], chunks[1][:1].expand(2, 5))
    for name, function in (
        ("x", lambda backend: add_norm_modulate(*arguments, backend=backend)[0]),
        ("sum", lambda backend: gated_add(hidden, residual, chunks[2], backend=backend)),
    ):
        assert_close(name, function("triton"), function("torch"), of_max=1e-6)
    by_column = torch.randn(5, 2).t()
    for backend in ("triton", "torch"):
        x = add_norm_modulate(hidden, residual, None, by_column, by_column, backend=backend)[0]
        found.append((x, gated_add(hidden, residual, by_column, backend=backend)))
    for got, want in zip(*found, strict=True):
        assert_close("rows in pieces", got, want, of_max=1e-6)
    torch.use_deterministic_algorithms(False)


@check
def the_norm_is_that_of_the_rounded_stream():
    hidden, residual = torch.randn(2, 2, 9, 33).to(BF16)
    x, _, stream = add_norm_modulate(hidden, residual, backend="triton")
    assert torch.equal(x, add_norm_modulate(None, stream, backend="triton")[0])


@check
def an_order_out_of_range_writes_nowhere_else():
    memory = torch.full((3, 2, 3, 4), 7.0)
    rows = torch.tensor([-1, 1, 3])
    x, normed, ones = torch.randn(2, 3, 4), torch.empty(0), torch.ones(2, 4)
    results = (memory[1], normed, normed)
    with mock.patch.object(triton_tokenwise, "read_results", return_value=results):
        triton_tokenwise.triton_add_norm_modulate._init_fn(
            None, x, None, None, None, rows, 1e-5, False, False, F32
        )
    assert memory[[0, 2]].eq(7).all() and memory[1, :, [0, 2]].eq(7).all()
    assert_close("x", memory[1, :, 1], add_norm_modulate(None, x, backend="torch")[0][:, 1], of_max=1e-6)
    memory.fill_(7)
    with mock.patch.object(triton_tokenwise, "write_gradients", return_value=(memory[1], torch.empty(2, 4))):
        triton_tokenwise.triton_gated_add_backward._init_fn(x, x, ones, rows)
    assert memory[[0, 2]].eq(7).all() and memory[1, :, [0, 2]].eq(7).all()
    assert torch.equal(memory[1, :, 1], x[:, 1])
    # What has no place is read as zeros.
    out = triton_tokenwise.triton_gated_add(x, x, ones, rows)
    assert torch.equal(out[:, [0, 2]], x[:, [0, 2]]) and torch.equal(out[:, 1], 2 * x[:, 1])


@check
def opcheck_of_tokens():
    tensors = list(read_arguments(2, 3, 4, F32, F32).values())
    rows = torch.tensor([2, 0, 1])
    for given in (tensors, [None, tensors[1], None, None, None]):
        arguments = (*given, rows, 1e-5, True, True, F32)
        torch.library.opcheck(triton_tokenwise.triton_add_norm_modulate, arguments)
    _, residual, weight, _, scale = (t.detach() for t in tensors)
    ones = torch.ones_like(residual)
    arguments = (ones, None, ones, residual, weight, scale, rows, 1e-5, False, F32)
    torch.library.opcheck(triton_tokenwise.triton_add_norm_modulate_backward, arguments)
    values = list(write_arguments(2, 3, 4, F32, BF16).values())
    torch.library.opcheck(triton_tokenwise.triton_gated_add, (*values, rows))
    _, y, gate = (t.detach() for t in values)
    torch.library.opcheck(triton_tokenwise.triton_gated_add_backward, (ones, y, gate, rows))


@check
def no_tokens():
    """A GPU takes no grid without programs."""
    with mock.patch.object(triton_tokenwise, "_launch", side_effect=AssertionError):
        out, *grads = block("triton", a_walk(5), sizes=(0, 5, 4))
    assert out.shape == (0, 5, 8)
    assert all(grad.eq(0).all() for grad in grads)


@check
def compiled_code_leaves_tokens_to_the_compiler():
    graphs, walk = [], a_walk(5)
    values = [t.detach() for t in read_arguments(2, 5, 6, F32, F32).values()]

    def keep(graph, inputs):
        graphs.append([str(node.target) for node in graph.graph.nodes if node.op == "call_function"])
        return graph

    def function(*given):
        x, normed, stream = add_norm_modulate(*given, *walk.values(), keep_normed=True)
        return gated_add(normed, x, given[3], *reversed(walk.values())) + stream

    compiled = torch.compile(function, fullgraph=True, backend=keep)
    want = function(*values)
    for name in ("auto", "triton"):
        with use_backend("torch" if name == "auto" else name):
            torch._dynamo.reset()
            assert_close(name, compiled(*values), want, of_max=1e-6)
    compiled(*values)
    assert len(graphs) == 3
    assert not any("triton" in target for graph in graphs for target in graph)
    assert not any("zigflow" in target for graph in graphs[:2] for target in graph)
    with (
        mock.patch("torch.compiler.is_compiling", return_value=True),
        pytest.raises(ValueError, match="does not take this call: torch.compile makes one kernel"),
    ):
        gated_add(values[0], values[1], values[3], backend="triton")


@check
def tokens_beside_conditions_of_another_dtype():
    x, y = torch.randn(1, 2, 3), torch.randn(1, 2, 3).half()
    for values in ((x, y, x[:, 0]), (x, x, y[:, 0]), (y, x, x[:, 0]), (y, y.bfloat16(), y[:, 0])):
        got, want = (gated_add(*values, backend=backend) for backend in ("triton", "torch"))
        assert got.dtype == want.dtype == F32
        assert_close("sum", got, want, of_max=1e-6)


@check
def refusals_of_tokens():
    x = torch.randn(1, 2, 3, requires_grad=True)
    for y in (
        add_norm_modulate(None, x, backend="triton")[0],
        gated_add(x, x, x[:, 0], backend="triton"),
    ):
        (grad,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        with pytest.raises(RuntimeError, match=r"'triton' has no second derivative: use use_backend\('t"):
            grad.sum().backward()
    wide = torch.ones(1, 1, 4097)
    for arguments, message in (
        ((x.double(), x.double(), x[:, 0].double()), "float64: use backend='torch'"),
        ((wide, wide, wide[:, 0]), "more than 4096 channels does not fit into registers, got 4097"),
    ):
        with pytest.raises(
            ValueError, match=f"gated_add: backend 'triton' does not take this call: .*{message}"
        ):
            gated_add(*arguments, backend="triton")
    with pytest.raises(ValueError, match="hidden is torch.float16, the tokens to read are torch.float32"):
        add_norm_modulate(x.half(), x, dtype=F32, backend="triton")
    many = torch.ones(1, 1, 1).expand(2**16, 2**15, 1)
    with pytest.raises(ValueError, match="at most 2147483647 programs .* needs 2147483648"):
        gated_add(many, many, many[:, 0], backend="triton")
