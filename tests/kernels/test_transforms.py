"""torch.func, forward-mode AD and torch.compile around the operations and the mixers."""

import pytest
import torch
from torch.autograd import forward_ad

from dis_causal_conv1d import causal_conv1d
from dis_mamba import (
    BiMambaMixer,
    MambaMixer,
    ParallelMambaMixer,
    available_backends,
    permute,
    selective_scan,
    use_backend,
)
from tests.assertions import assert_close

from .definitions import conv_arguments, scan_arguments

L, D = 9, 6
REGISTERED = [n for n, reason in available_backends().items() if reason is None and n != "reference"]


def mixers():
    orders = torch.stack([torch.arange(L), torch.arange(L).flip(0), torch.randperm(L)])
    return {
        "plain": MambaMixer(D, d_state=3, dtype=torch.float64),
        "two directions": BiMambaMixer(D, d_state=3, dtype=torch.float64),
        "parallel": ParallelMambaMixer(D, orders, d_state=3, dtype=torch.float64),
    }


@pytest.fixture(params=list(mixers()))
def mixer(request):
    return mixers()[request.param]


def slope(function, x, direction, step=1e-5):
    with torch.no_grad():
        return (function(x + step * direction) - function(x - step * direction)) / (2 * step)


def test_jvp_of_a_module_with_parameters_when_only_the_input_has_a_tangent(mixer):
    x, direction = torch.randn(2, 2, L, D, dtype=torch.float64)
    want = slope(mixer, x, direction)
    _, tangent = torch.func.jvp(mixer, (x,), (direction,))
    assert_close("torch.func.jvp", tangent, want, of_max=1e-7)
    with forward_ad.dual_level():
        dual = forward_ad.unpack_dual(mixer(forward_ad.make_dual(x, direction))).tangent
    assert_close("forward_ad", dual, want, of_max=1e-7)


def test_forward_mode_over_the_parameters(mixer):
    x = torch.randn(1, L, D, dtype=torch.float64)
    parameters = {name: p.detach() for name, p in mixer.named_parameters()}
    tangents = {name: torch.randn_like(p) for name, p in parameters.items()}
    _, got = torch.func.jvp(lambda p: torch.func.functional_call(mixer, p, (x,)), (parameters,), (tangents,))
    ahead, behind = ({n: p + s * 1e-5 * tangents[n] for n, p in parameters.items()} for s in (1, -1))
    with torch.no_grad():
        want = torch.func.functional_call(mixer, ahead, (x,)) - torch.func.functional_call(
            mixer, behind, (x,)
        )
    assert_close("tangent", got, want / 2e-5, of_max=1e-7)


def test_vjp_vmap_and_grad_agree_with_autograd(mixer):
    x, weight = torch.randn(2, 3, L, D, dtype=torch.float64)
    x.requires_grad_()
    out = mixer(x)
    (want,) = torch.autograd.grad((out * weight).sum(), x)
    assert_close("vjp", torch.func.vjp(mixer, x.detach())[1](weight)[0], want, of_max=1e-12)
    assert_close("grad", torch.func.grad(lambda v: (mixer(v) * weight).sum())(x.detach()), want, of_max=1e-12)
    single = torch.func.vmap(lambda row: mixer(row[None])[0])(x.detach())
    assert_close("vmap", single, out, of_max=1e-12)


def test_divergence_by_forward_over_reverse():
    mixer = MambaMixer(2, d_state=2, dtype=torch.float64)
    x = torch.randn(1, 3, 2, dtype=torch.float64)
    forward = torch.func.jacfwd(mixer)(x).reshape(6, 6)
    backward = torch.autograd.functional.jacobian(mixer, x).reshape(6, 6)
    assert_close("jacobian", forward, backward, of_max=1e-12)


@pytest.mark.parametrize("backend", REGISTERED)
def test_a_named_backend_with_registered_operators_refuses_transforms(backend):
    scan, conv = scan_arguments(1, 4, 2, 2), conv_arguments(1, 4, 2, 2)
    with pytest.raises(ValueError, match=rf"'{backend}' does not take this call: .*torch.func.*'reference'"):
        torch.func.jvp(
            lambda u: selective_scan(**(scan | {"u": u}), backend=backend), (scan["u"],), (scan["u"],)
        )
    with pytest.raises(ValueError, match=r"torch.func.*'reference'"):
        torch.func.vmap(lambda x: causal_conv1d(**(conv | {"x": x}), backend=backend))(conv["x"][None])
    for name in scan:
        with forward_ad.dual_level(), pytest.raises(ValueError, match=r"forward-mode tangent.*'reference'"):
            dual = forward_ad.make_dual(scan[name].detach(), torch.ones_like(scan[name]))
            selective_scan(**(scan | {name: dual}), backend=backend)


def test_reference_passes_forward_mode_gradcheck():
    values = list(scan_arguments(1, 4, 2, 2, dtype=torch.float64).values())
    function = lambda *t: selective_scan(*t, delta_softplus=True, reverse=True, backend="reference")  # noqa: E731
    assert torch.autograd.gradcheck(function, values, check_forward_ad=True, check_batched_grad=True)
    values = list(conv_arguments(1, 4, 2, 3, dtype=torch.float64).values())
    function = lambda *t: causal_conv1d(*t, "silu", True, "reference")  # noqa: E731
    assert torch.autograd.gradcheck(function, values, check_forward_ad=True, check_batched_grad=True)


def test_compiles_into_one_graph(mixer):
    torch._dynamo.reset()
    x = torch.randn(2, L, D, dtype=torch.float64, requires_grad=True)
    inputs = [x, *mixer.parameters()]
    out = mixer(x)
    got = torch.compile(mixer, fullgraph=True, backend="aot_eager")(x)
    assert_close("output", got, out, of_max=1e-12)
    for ours, theirs in zip(
        torch.autograd.grad(got.sin().sum(), inputs),
        torch.autograd.grad(out.sin().sum(), inputs),
        strict=True,
    ):
        assert_close("gradient", ours, theirs, of_max=1e-12)


def test_compiles_with_dynamic_length():
    torch._dynamo.reset()
    graphs = []

    def keep(graph, inputs):
        graphs.append(graph)
        return graph

    mixer = MambaMixer(D, d_state=3)
    compiled = torch.compile(mixer, fullgraph=True, backend=keep, dynamic=True)
    for length in (3, 33, 70):
        x = torch.randn(2, length, D, requires_grad=True)
        assert_close("output", compiled(x), mixer(x), of_max=1e-6)
    assert len(graphs) == 1


def test_a_transform_inside_a_compiled_function_takes_reference():
    torch._dynamo.reset()
    mixer = MambaMixer(D, d_state=3, dtype=torch.float64)
    x, direction = torch.randn(2, 1, L, D, dtype=torch.float64)
    compiled = torch.compile(
        lambda x, t: torch.func.jvp(mixer, (x,), (t,))[1], fullgraph=True, backend="eager"
    )
    assert_close("tangent", compiled(x, direction), slope(mixer, x, direction), of_max=1e-7)


def test_a_compiled_function_follows_use_backend():
    torch._dynamo.reset()
    arguments = {name: value.detach() for name, value in scan_arguments(1, 5, 2, 2).items()}
    graphs = []

    def keep(graph, inputs):
        graphs.append(graph)
        return graph

    compiled = torch.compile(lambda: selective_scan(**arguments), fullgraph=True, backend=keep)
    chosen = compiled()
    with use_backend("reference"):
        assert_close("reference", compiled(), chosen, of_max=1e-5)
    custom = ["zigflow" in str(graph.graph) for graph in graphs]
    assert custom == [True, False]


def test_permute_under_every_transform():
    order = torch.randperm(L)
    inverse = order.argsort()
    x, t = torch.randn(2, 3, L, D, dtype=torch.float64)
    assert torch.equal(torch.func.jvp(lambda v: permute(v, order, inverse), (x,), (t,))[1], t[:, order])
    assert torch.equal(torch.func.vmap(lambda v: permute(v[None], order, inverse)[0])(x), x[:, order])
    with forward_ad.dual_level():
        dual = permute(forward_ad.make_dual(x, t), order, inverse)
        assert torch.equal(forward_ad.unpack_dual(dual).tangent, t[:, order])
    x.requires_grad_()
    assert torch.autograd.gradcheck(lambda v: permute(v, order, inverse), x, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(lambda v: permute(v, order, inverse).sin(), x)
    torch._dynamo.reset()
    compiled = torch.compile(lambda v: permute(v, order, inverse), fullgraph=True, backend="aot_eager")
    (grad,) = torch.autograd.grad((compiled(x) * t).sum(), x)
    assert torch.equal(grad, t[:, inverse])


@pytest.mark.parametrize("way", ["closure", "argument", "two arguments"])
def test_permute_compiles_with_an_order_that_is_its_own_inverse(way):
    order = torch.arange(L).flip(0)
    x, t = torch.randn(2, 3, L, D, dtype=torch.float64)
    x.requires_grad_()
    torch._dynamo.reset()
    function, arguments = {
        "closure": (lambda v: permute(v, order, order), (x,)),
        "argument": (lambda v, o: permute(v, o, o), (x, order)),
        "two arguments": (permute, (x, order, order)),
    }[way]
    out = torch.compile(function, fullgraph=True, backend="aot_eager")(*arguments)
    assert torch.equal(out, x[:, order])
    (grad,) = torch.autograd.grad((out * t).sum(), x)
    assert torch.equal(grad, t[:, order])
