"""selective_scan: every backend against the formulas, at sizes around the chunk boundaries."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from dis_mamba import available_backends, selective_scan
from tests.assertions import assert_close, assert_relative_rms

from .definitions import scan_arguments, scan_definition, with_gradients

BACKENDS = [name for name, reason in available_backends().items() if reason is None]
OPS_FIXTURE = Path(__file__).parents[1] / "parity/fixtures/zigma/ops/ops.safetensors"

pytestmark = pytest.mark.parametrize("backend", BACKENDS)


def compare(backend, arguments, *, of_max=(1e-5, 1e-4), weight=None, **flags):
    out, grads = with_gradients(selective_scan, arguments, weight, backend=backend, **flags)
    want, want_grads = with_gradients(scan_definition, arguments, weight, **flags)
    assert out.dtype == arguments["u"].dtype
    assert_close("output", out, want, of_max=of_max[0])
    for name, grad in grads.items():
        assert grad.dtype == arguments[name].dtype
        assert_close(f"gradient of {name}", grad, want_grads[name], of_max=of_max[1], floor=1e-6)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("E,N", [(3, 1), (17, 4), (3, 16), (17, 17)])
@pytest.mark.parametrize("L", [1, 2, 31, 32, 33, 65])
def test_matches_the_definition(backend, L, E, N, reverse):
    compare(backend, scan_arguments(3, L, E, N), delta_softplus=True, reverse=reverse)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("softplus", [False, True])
@pytest.mark.parametrize("options", [(), ("D",), ("z",), ("delta_bias",), ("D", "z")])
def test_options(backend, options, softplus, reverse):
    arguments = scan_arguments(2, 37, 5, 4, options=options)
    if not softplus:
        # A negative step would let the state grow without bound.
        steps = {"delta", "delta_bias"} & set(arguments)
        arguments |= {name: arguments[name].detach().abs().requires_grad_() for name in steps}
    compare(backend, arguments, delta_softplus=softplus, reverse=reverse)


@pytest.mark.parametrize("reverse", [False, True])
def test_float64_keeps_a_float64_state(backend, reverse):
    arguments = scan_arguments(2, 40, 5, 4, dtype=torch.float64)
    compare(backend, arguments, of_max=(1e-12, 1e-11), delta_softplus=True, reverse=reverse)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_sequences_keep_a_float32_state(backend, dtype):
    arguments = scan_arguments(2, 65, 17, 16, dtype=dtype)
    out, grads = with_gradients(selective_scan, arguments, backend=backend, delta_softplus=True)
    want, want_grads = with_gradients(scan_definition, arguments, delta_softplus=True)
    assert out.dtype == dtype
    assert_relative_rms("output", out, want, 5e-3)
    for name, grad in grads.items():
        assert_relative_rms(f"gradient of {name}", grad, want_grads[name], 1e-2)


@pytest.mark.parametrize("reverse", [False, True])
def test_non_contiguous_arguments(backend, reverse):
    contiguous = scan_arguments(2, 33, 6, 4)
    strided = {}
    for name, value in contiguous.items():
        value = value.detach()
        if value.ndim == 3:
            twice = torch.cat([value, value], dim=-1)
            value = value.mT.contiguous().mT if name == "B" else twice[..., : value.shape[-1]]
        elif value.ndim == 2:
            value = value.t().contiguous().t()
        else:
            value = torch.stack([value, value], dim=-1)[..., 0]
        assert value.numel() == 1 or not value.is_contiguous()
        strided[name] = value.requires_grad_()
    compare(backend, strided, delta_softplus=True, reverse=reverse)
    weight = torch.randn(33, 2, 6).transpose(0, 1)
    compare(backend, strided, weight=weight, delta_softplus=True, reverse=reverse)


def test_broadcast_arguments(backend):
    arguments = scan_arguments(1, 9, 5, 4)
    wide = {
        k: v.detach().expand(3, -1, -1).requires_grad_() if v.ndim == 3 else v for k, v in arguments.items()
    }
    compare(backend, wide, delta_softplus=True)


@pytest.mark.parametrize("reverse", [False, True])
def test_extreme_steps(backend, reverse):
    """Steps of 0 and of 1e4 after softplus: decays of 1 and of 0, nothing overflows, gradients are right."""
    arguments = scan_arguments(2, 7, 5, 4)
    extreme = torch.tensor([-1e4, -80.0, 80.0, 0.0, 1e4, -30.0, 3e3])
    arguments["delta"] = extreme[None, :, None].expand(2, 7, 5).clone().requires_grad_()
    out, grads = with_gradients(
        selective_scan, arguments, backend=backend, delta_softplus=True, reverse=reverse
    )
    assert all(value.isfinite().all() for value in (out, *grads.values()))
    compare(backend, arguments, delta_softplus=True, reverse=reverse)


def test_empty_batch(backend):
    arguments = scan_arguments(0, 5, 3, 2)
    out, grads = with_gradients(selective_scan, arguments, backend=backend)
    assert out.shape == (0, 5, 3)
    assert grads["A"].eq(0).all()


@pytest.mark.parametrize("reverse", [False, True])
def test_gradcheck(backend, reverse):
    values = list(scan_arguments(2, 4, 2, 3, dtype=torch.float64).values())

    def function(*tensors):
        return selective_scan(*tensors, delta_softplus=True, reverse=reverse, backend=backend)

    assert torch.autograd.gradcheck(function, values)


def test_gradcheck_across_a_chunk_boundary(backend):
    values = list(scan_arguments(1, 34, 1, 1, dtype=torch.float64).values())
    assert torch.autograd.gradcheck(
        lambda *t: selective_scan(*t, delta_softplus=True, backend=backend), values
    )


def test_one_token_by_hand(backend):
    # softplus(0) = log 2, so h = log(2) * B * u and y = (C h + D u) * silu(z) with silu(0) = 0.
    one = torch.ones(1, 1, 1)
    arguments = (3 * one, 0 * one, -torch.ones(1, 1), 2 * one, 5 * one)
    y = selective_scan(*arguments, delta_softplus=True, backend=backend)
    assert y.item() == pytest.approx(30 * 0.6931472, rel=1e-6)
    y = selective_scan(*arguments, D=torch.tensor([7.0]), delta_softplus=True, backend=backend)
    assert y.item() == pytest.approx(30 * 0.6931472 + 21, rel=1e-6)
    assert selective_scan(*arguments, z=0 * one, backend=backend).item() == 0


@pytest.mark.parametrize("reverse", [False, True])
def test_without_decay_it_is_a_cumulative_sum(backend, reverse):
    u = torch.randn(2, 70, 3)
    ones = torch.ones(2, 70, 1)
    y = selective_scan(u, torch.ones_like(u), torch.zeros(3, 1), ones, ones, reverse=reverse, backend=backend)
    assert_close("sum", y, u.flip(1).cumsum(1).flip(1) if reverse else u.cumsum(1))


def test_an_impulse_decays_geometrically(backend):
    u = torch.zeros(1, 40, 1)
    u[0, 0, 0] = 1
    ones = torch.ones(1, 40, 1)
    A = torch.full((1, 1), -0.25)
    y = selective_scan(u, ones, A, ones, ones, backend=backend)
    assert_close("impulse", y[0, :, 0], torch.exp(-0.25 * torch.arange(40.0)))


def test_strong_decay_forgets_and_stays_finite(backend):
    arguments = scan_arguments(1, 40, 3, 2)
    arguments["A"] = torch.full((3, 2), -1e4).requires_grad_()
    compare(backend, arguments, delta_softplus=True)


def test_two_runs_give_the_same_bits(backend):
    arguments = scan_arguments(5, 65, 17, 16)
    runs = [with_gradients(selective_scan, arguments, backend=backend, delta_softplus=True) for _ in range(2)]
    assert torch.equal(runs[0][0], runs[1][0])
    assert all(torch.equal(runs[0][1][name], runs[1][1][name]) for name in arguments)


def test_arguments_are_left_alone(backend):
    arguments = scan_arguments(2, 33, 5, 4, options=("z",))
    before = {name: value.detach().clone() for name, value in arguments.items()}
    with_gradients(selective_scan, arguments, backend=backend, delta_softplus=True)
    with_gradients(selective_scan, arguments, backend=backend)
    assert all(torch.equal(before[name], value) for name, value in arguments.items())


@pytest.mark.parametrize("frozen", ["u", "A", "z"])
def test_frozen_arguments_do_not_stop_the_others(backend, frozen):
    arguments = scan_arguments(2, 8, 5, 4)
    _, want = with_gradients(selective_scan, arguments, backend=backend)
    arguments[frozen].requires_grad_(False)
    live = {name: value for name, value in arguments.items() if name != frozen}
    _, grads = with_gradients(
        lambda **kw: selective_scan(**{frozen: arguments[frozen]}, **kw, backend=backend), live
    )
    assert all(torch.equal(grads[name], want[name]) for name in live)


@pytest.mark.parametrize("case", ["full", "noz", "noD_noz_nobias_nosoftplus"])
def test_stored_tensors_of_the_official_scan(backend, case):
    tensors = load_file(OPS_FIXTURE)
    names = {"full": ("D", "z", "delta_bias"), "noz": ("D", "delta_bias")}.get(case, ())
    arguments = {}
    for name in ("u", "delta", "A", "B", "C", *names):
        value = tensors[f"scan/in/{name}"]
        if name == "delta":
            value = tensors.get(f"scan/{case}/delta_used", value)
        arguments[name] = (value.mT if value.ndim == 3 else value).requires_grad_()
    out, grads = with_gradients(
        selective_scan,
        arguments,
        tensors["scan/in/w"].mT,
        delta_softplus="nosoftplus" not in case,
        backend=backend,
    )
    assert_close("output", out.mT, tensors[f"scan/{case}/out"], of_max=1e-5)
    for name, grad in grads.items():
        stored = tensors[f"scan/{case}/grad_{name}"]
        assert_close(f"gradient of {name}", grad.mT if grad.ndim == 3 else grad, stored, of_max=1e-4)
