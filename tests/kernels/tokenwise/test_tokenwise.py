"""Add, norm, modulate, and gate, add: every backend against the formulas, and what a registered operator owes."""

import functools

import hypothesis
import hypothesis.strategies as st
import pytest
import torch

import dis_kernels.tokenwise.cpu as cpu
from dis_kernels import use_backend
from dis_kernels.native import NativeError, NativeLibrary
from dis_kernels.tokenwise import add_norm_modulate, gated_add, tokenwise_backends
from tests.assertions import assert_close
from tests.kernels.definitions import with_gradients
from tests.kernels.operators import needs_compiler, saved_bytes

from .definitions import (
    READ_NAMES,
    a_walk,
    read_arguments,
    read_definition,
    write_arguments,
    write_definition,
)

F32, BF16, F64 = torch.float32, torch.bfloat16, torch.float64
# Stream and mixer; of the largest value, output and gradients: bfloat16 is rounded a few times, each by 2^-9.
LIMITS = {
    (F32, F32): (1e-5, 1e-4),
    (F64, F64): (1e-12, 1e-11),
    (F32, BF16): (3e-2, 3e-2),
    (BF16, BF16): (3e-2, 3e-2),
}
backends = pytest.mark.parametrize("backend", [pytest.param("cpu", marks=needs_compiler), "torch"])


def read(backend="auto", **arguments):
    """x, normed and stream, joined along the width."""
    x, normed, stream = add_norm_modulate(
        arguments.pop("hidden", None), **arguments, keep_normed=True, backend=backend
    )
    return torch.cat([x.to(stream.dtype), normed.to(stream.dtype), stream], -1)


def agree(function, definition, arguments, limits, **flags):
    out, grads = with_gradients(function, arguments, **flags)
    want, want_grads = with_gradients(
        definition, arguments, **{k: v for k, v in flags.items() if k != "dtype"}
    )
    assert_close("output", out, want, of_max=limits[0], floor=1e-6)
    for name, grad in grads.items():
        assert grad.dtype == arguments[name].dtype
        assert_close(f"gradient of {name}", grad, want_grads[name], of_max=limits[1], floor=1e-6)


@backends
@hypothesis.settings(max_examples=40)
@hypothesis.given(
    data=st.data(), dtypes=st.sampled_from(list(LIMITS)), centered=st.booleans(), walks=st.booleans()
)
def test_reading_any_shape(backend, data, dtypes, centered, walks):
    B, L, D = data.draw(st.tuples(st.integers(1, 5), st.integers(1, 140), st.integers(2, 70)), "B, L, D")
    options = data.draw(st.sets(st.sampled_from(["hidden", "weight", "modulation"])), "options")
    names = options | ({"shift", "scale"} if "modulation" in options else set())
    arguments = read_arguments(B, L, D, *dtypes, options=names, seed=B * L * D)
    walk = a_walk(L) if walks else {}
    # A width of two tokens leaves a centered norm a sign alone, whose slope hangs on eps.
    flags = {"eps": 0.5 if centered else 1e-3, "centered": centered, "dtype": dtypes[1], **walk}
    agree(functools.partial(read, backend=backend), read_definition, arguments, LIMITS[dtypes], **flags)


@backends
@hypothesis.settings(max_examples=25)
@hypothesis.given(data=st.data(), dtypes=st.sampled_from(list(LIMITS)), walks=st.booleans())
def test_writing_any_shape(backend, data, dtypes, walks):
    B, L, D = data.draw(st.tuples(st.integers(1, 5), st.integers(1, 140), st.integers(1, 70)), "B, L, D")
    walk = a_walk(L) if walks else {}
    arguments = write_arguments(B, L, D, *dtypes, seed=B * L * D)
    agree(functools.partial(gated_add, backend=backend), write_definition, arguments, LIMITS[dtypes], **walk)


def block(backend, walk=None, seed=0, sizes=(3, 70, 37), dtypes=(F32, F32), centered=False):
    """A block's edges around a mixer that squares: results and all gradients."""
    arguments = read_arguments(*sizes, *dtypes, seed=seed)
    B, _, D = sizes
    arguments["gate"] = torch.linspace(-1, 1, B * D).reshape(B, D).to(dtypes[1]).requires_grad_()
    order, inverse = (None, None) if walk is None else walk.values()

    def function(hidden, residual, weight, shift, scale, gate):
        x, normed, stream = add_norm_modulate(
            hidden, residual, weight, shift, scale, order, inverse, keep_normed=True, centered=centered,
            backend=backend,
        )  # fmt: skip
        out = gated_add(normed, x.square(), gate, inverse, order, backend=backend)
        return torch.cat([out.to(stream.dtype), stream], -1)

    out, grads = with_gradients(function, arguments)
    return [out, *grads.values()]


@needs_compiler
@pytest.mark.parametrize("dtypes", list(LIMITS))
def test_the_number_of_threads_changes_no_bit(dtypes):
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(block("cpu", a_walk(200), sizes=(5, 200, 131), dtypes=dtypes))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@needs_compiler
@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("L,D", [(1, 1), (64, 16), (65, 33), (130, 7)])
@pytest.mark.parametrize("centered", [False, True])
def test_no_uninitialized_memory_is_read(L, D, centered):
    assert torch.empty(1).isnan().all()
    for value in block("cpu", a_walk(L), sizes=(2, L, D), centered=centered):
        assert value.isfinite().all()


@needs_compiler
def test_opcheck():
    arguments = read_arguments(2, 3, 4, F32, F32)
    rows = torch.tensor([2, 0, 1])
    tensors = [arguments[name] for name in READ_NAMES]
    for given in (tensors, [None, tensors[1], None, None, None]):
        torch.library.opcheck(cpu.cpu_add_norm_modulate, (*given, rows, 1e-5, True, True, F32))
    _, residual, weight, _, scale = (t.detach() for t in tensors)
    ones = torch.ones_like(residual)
    backward = (ones, None, ones, residual, weight, scale, rows, 1e-5, False, F32)
    torch.library.opcheck(cpu.cpu_add_norm_modulate_backward, backward)
    values = list(write_arguments(2, 3, 4, F32, BF16).values())
    torch.library.opcheck(cpu.cpu_gated_add, (*values, rows))
    _, y, gate = (t.detach() for t in values)
    torch.library.opcheck(cpu.cpu_gated_add_backward, (ones, y, gate, rows))


@backends
def test_an_empty_batch(backend):
    out, *grads = block(backend, a_walk(5), sizes=(0, 5, 4))
    assert out.shape == (0, 5, 8)
    assert all(grad.eq(0).all() for grad in grads)


@backends
def test_gradients_of_some_results_alone(backend):
    arguments = read_arguments(2, 9, 6, F32, F32)
    walk = a_walk(9)
    for wanted in range(3):
        found = []
        for function in (functools.partial(add_norm_modulate, backend=backend), None):
            if function is None:
                joined = read_definition(**arguments, **walk, eps=1e-5, centered=False)
                result = joined[..., 6 * wanted : 6 * wanted + 6]
            else:
                result = function(**arguments, **walk, keep_normed=True)[wanted]
            weight = torch.arange(result.numel()).reshape(result.shape) / 50
            grads = torch.autograd.grad((result * weight).sum(), list(arguments.values()), allow_unused=True)
            given = zip(grads, arguments.values(), strict=True)
            found.append([torch.zeros_like(t) if g is None else g for g, t in given])
        for got, want in zip(*found, strict=True):
            torch.testing.assert_close(got, want.float(), rtol=1e-4, atol=1e-4)


@needs_compiler
def test_strided_arguments():
    B, L, D = 2, 7, 5
    wide = torch.randn(B, L, 2 * D)
    chunks = torch.randn(B, 3 * D).chunk(3, dim=1)
    hidden, residual = wide[..., ::2], wide.transpose(0, 1)[:L, :B, :D].transpose(0, 1)
    weight = torch.randn(2 * D)[::2]
    arguments = (hidden, residual, weight, chunks[0], chunks[1].expand(B, D))
    whole = [t.contiguous() for t in arguments]
    for got, want in zip(
        add_norm_modulate(*arguments, backend="cpu")[::2],
        add_norm_modulate(*whole, backend="torch")[::2],
        strict=True,
    ):
        assert_close("strided", got, want, of_max=1e-6)
    got, want = (gated_add(hidden, residual, chunks[2], backend=name) for name in ("cpu", "torch"))
    assert_close("strided", got, want, of_max=1e-6)


@needs_compiler
@pytest.mark.parametrize("rows", [[0, 0, 1], [0, 1, 3], [-1, 1, 2]])
def test_an_order_that_is_no_permutation_is_refused(rows):
    rows, x = torch.tensor(rows), torch.randn(2, 3, 4)
    with pytest.raises(IndexError, match="add_norm_modulate: the order is no permutation of 3 tokens"):
        add_norm_modulate(None, x, order=rows, inverse=rows, backend="cpu")
    with pytest.raises(IndexError, match="gated_add: the order is no permutation of 3 tokens"):
        gated_add(x, x, x[:, 0], rows, rows, backend="cpu")


@pytest.mark.parametrize(
    "change,error,message",
    [
        (
            {"hidden": torch.ones(2, 3, 5)},
            ValueError,
            r"hidden has shape \(2, 3, 5\), expected \(B,L,D\) = \(2, 3, 4\)",
        ),
        ({"weight": torch.ones(3)}, ValueError, r"weight has shape \(3,\), expected \(D\) = \(4,\)"),
        ({"scale": None}, ValueError, "give both shift and scale, or neither"),
        ({"shift": torch.ones(2, 4).long()}, TypeError, "shift has dtype torch.int64"),
        ({"dtype": torch.int32}, TypeError, "dtype is torch.int32, expected one of float32, bfloat16"),
        ({"order": torch.arange(3)}, TypeError, "inverse must be an int64 tensor"),
        ({"order": torch.arange(2), "inverse": torch.arange(2)}, ValueError, r"expected \(L,\) = \(3,\)"),
        ({"residual": torch.ones(2, 4)}, ValueError, r"residual has shape \(2, 4\), expected \(B,L,D\)"),
        ({"residual": torch.ones(2, 3, 4, device="meta")}, ValueError, "hidden is on cpu"),
        ({"backend": "cqu"}, ValueError, "unknown backend 'cqu'. Did you mean 'cpu'"),
    ],
)
def test_reading_refuses(change, error, message):
    arguments = {k: v.detach() for k, v in read_arguments(2, 3, 4, F32, F32).items()}
    with pytest.raises(error, match=f"add_norm_modulate: .*{message}"):
        add_norm_modulate(**(arguments | change))


def test_writing_refuses():
    x = torch.ones(2, 3, 4)
    with pytest.raises(
        ValueError, match=r"gated_add: y has shape \(2, 2, 4\), expected \(B,L,D\) = \(2, 3, 4\)"
    ):
        gated_add(x, x[:, :2], x[:, 0])
    with pytest.raises(
        ValueError, match=r"gated_add: gate has shape \(2, 3, 4\), expected \(B,D\) = \(2, 4\)"
    ):
        gated_add(x, x, x)


@needs_compiler
def test_what_the_kernels_do_not_take_runs_on_torch():
    x, y = torch.randn(2, 3, 4), torch.randn(2, 3, 4, dtype=torch.float16)
    assert add_norm_modulate(y, x)[0].dtype == torch.float16
    with pytest.raises(
        ValueError, match="the stream is torch.float32 beside torch.float16: use backend='torch'"
    ):
        add_norm_modulate(y, x, backend="cpu")
    with pytest.raises(ValueError, match="the stream is torch.float32 beside torch.float16"):
        gated_add(x, y, y[:, 0], backend="cpu")
    assert gated_add(y, x, y[:, 0]).dtype == F32
    # A stream that is narrower than what is added to it widens, as a sum of tensors does.
    assert add_norm_modulate(x, y)[2].dtype == F32
    (tangent,) = torch.func.jvp(lambda v: gated_add(v, v, v[:, 0]), (x,), (x,))[1:]
    assert_close("tangent", tangent, x + 2 * x * x[:, :1], of_max=1e-6)


@backends
@pytest.mark.parametrize("dtypes", [(BF16, F32), (F32, BF16), (F64, F32)])
def test_a_condition_in_another_dtype(backend, dtypes):
    condition, dtype = dtypes
    arguments = read_arguments(2, 9, 6, F32, dtype)
    for name in ("shift", "scale"):
        arguments[name] = arguments[name].detach().to(condition).requires_grad_()
    limits = LIMITS[F32, dtype] if condition == F64 else LIMITS[F32, BF16]
    agree(
        functools.partial(read, backend=backend), read_definition, arguments, limits, eps=1e-3, centered=False
    )
    assert add_norm_modulate(**arguments, backend=backend)[0].dtype == dtype


@backends
@pytest.mark.parametrize("dtypes", [(F32, F32, BF16), (BF16, BF16, F32), (F32, BF16, F32), (BF16, F32, F32)])
def test_a_gate_or_a_product_wider_than_its_fellows(backend, dtypes):
    values = write_arguments(2, 9, 6, F32, F32)
    arguments = {
        name: t.detach().to(dtype).requires_grad_()
        for (name, t), dtype in zip(values.items(), dtypes, strict=True)
    }
    function = functools.partial(gated_add, backend=backend)
    agree(function, write_definition, arguments, (1e-6, LIMITS[F32, BF16][1]))
    assert function(**arguments).dtype == F32


def test_without_a_compiler_torch_runs(monkeypatch):
    library = NativeLibrary(cpu.LIBRARY.source)
    monkeypatch.setattr(library, "_obtain", lambda: (_ for _ in ()).throw(NativeError("no compiler")))
    monkeypatch.setattr(cpu, "LIBRARY", library)
    assert tokenwise_backends()["cpu"] == "no compiler"
    out, *_ = block("auto")
    assert torch.equal(out, block("torch")[0])


@needs_compiler
def test_a_preferred_backend_of_other_operations_stands_for_torch(monkeypatch):
    called = []
    monkeypatch.setattr(cpu, "cpu_gated_add", lambda *a: called.append(a))
    x = torch.randn(1, 2, 3)
    for name in ("reference", "torch", "cuda_package"):
        with use_backend(name):
            assert torch.equal(gated_add(x, x, x[:, 0]), x + x[:, :1] * x)
        monkeypatch.setenv("ZIGFLOW_BACKEND", name)
        gated_add(x, x, x[:, 0])
        monkeypatch.delenv("ZIGFLOW_BACKEND")
    assert not called
    with pytest.raises(ValueError, match="gated_add: unknown backend 'reference'"):
        gated_add(x, x, x[:, 0], backend="reference")


@needs_compiler
def test_a_block_keeps_its_stream_and_no_more():
    arguments = read_arguments(2, 40, 16, F32, F32)
    kept = saved_bytes(lambda **a: add_norm_modulate(**a, backend="cpu")[0], arguments)
    assert kept == 2 * 40 * 16 * 4


@needs_compiler
@pytest.mark.parametrize("op", ["read", "write"])
def test_a_second_derivative_is_refused(op):
    x = torch.randn(1, 2, 3, requires_grad=True)
    y = (
        add_norm_modulate(None, x, backend="cpu")[0]
        if op == "read"
        else gated_add(x, x, x[:, 0], backend="cpu")
    )
    (grad,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match=r"'cpu' has no second derivative: use use_backend\('torch'\)"):
        grad.sum().backward()


@needs_compiler
def test_compiles_into_one_graph():
    walk = a_walk(9)

    def function(hidden, residual, weight, shift, scale):
        x, normed, stream = add_norm_modulate(
            hidden, residual, weight, shift, scale, *walk.values(), keep_normed=True, backend="cpu"
        )
        return gated_add(normed, x, shift, walk["inverse"], walk["order"], backend="cpu") + stream

    arguments = read_arguments(2, 9, 6, F32, F32)
    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    (got, got_grads), (want, want_grads) = (with_gradients(f, arguments) for f in (compiled, function))
    assert torch.equal(got, want)
    for name in READ_NAMES:
        assert_close(name, got_grads[name], want_grads[name], of_max=1e-6)


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("width", [16, 32])
def test_narrower_vectors_of_other_processors(width, monkeypatch):
    monkeypatch.setenv(
        "ZIGFLOW_CXXFLAGS", f"-DZIGFLOW_VECTOR_BYTES={width} -DZIGFLOW_NO_INTRINSICS -fno-tree-vectorize"
    )
    monkeypatch.setattr(cpu, "LIBRARY", NativeLibrary(cpu.LIBRARY.source))
    for dtypes, limits in LIMITS.items():
        for centered in (False, True):
            flags = {"eps": 1e-3, "centered": centered, "dtype": dtypes[1], **a_walk(70)}
            function = functools.partial(read, backend="cpu")
            agree(function, read_definition, read_arguments(2, 70, 37, *dtypes), limits, **flags)
