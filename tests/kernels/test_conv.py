"""causal_conv1d: every backend against torch's own convolution in float64."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from dis_causal_conv1d import available_backends, causal_conv1d
from tests.assertions import assert_close, assert_relative_rms

from .definitions import conv_arguments, conv_definition, with_gradients

BACKENDS = [name for name, reason in available_backends().items() if reason is None]
OPS_FIXTURE = Path(__file__).parents[1] / "parity/fixtures/zigma/ops/ops.safetensors"

pytestmark = pytest.mark.parametrize("backend", BACKENDS)


def compare(backend, arguments, *, of_max=(1e-5, 1e-5), **flags):
    out, grads = with_gradients(causal_conv1d, arguments, backend=backend, **flags)
    want, want_grads = with_gradients(conv_definition, arguments, **flags)
    assert out.dtype == arguments["x"].dtype
    assert_close("output", out, want, of_max=of_max[0])
    for name, grad in grads.items():
        assert grad.dtype == arguments[name].dtype
        assert_close(f"gradient of {name}", grad, want_grads[name], of_max=of_max[1])


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("activation", [None, "silu"])
@pytest.mark.parametrize("W", [1, 2, 3, 4])
@pytest.mark.parametrize("L,E", [(1, 3), (2, 17), (33, 17)])
def test_matches_the_definition(backend, L, E, W, activation, reverse):
    compare(backend, conv_arguments(3, L, E, W, bias=W != 3), activation=activation, reverse=reverse)


def test_more_taps_than_tokens_and_the_other_name_of_silu(backend):
    compare(backend, conv_arguments(2, 5, 3, 7), activation="swish")


@pytest.mark.parametrize("activation", [None, "silu"])
def test_empty_batch(backend, activation):
    arguments = conv_arguments(0, 5, 3, 4)
    out, grads = with_gradients(causal_conv1d, arguments, backend=backend, activation=activation)
    assert out.shape == (0, 5, 3) and grads["x"].shape == (0, 5, 3)
    assert grads["weight"].eq(0).all() and grads["bias"].eq(0).all()


def test_float64(backend):
    arguments = conv_arguments(2, 9, 5, 4, dtype=torch.float64)
    compare(backend, arguments, of_max=(1e-13, 1e-13), activation="silu")


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_accumulates_in_float32(backend, dtype, reverse):
    arguments = conv_arguments(2, 33, 17, 4, dtype=dtype)
    out, grads = with_gradients(causal_conv1d, arguments, backend=backend, activation="silu", reverse=reverse)
    want, want_grads = with_gradients(conv_definition, arguments, activation="silu", reverse=reverse)
    assert out.dtype == dtype
    assert_relative_rms("output", out, want, 3e-3)
    for name, grad in grads.items():
        assert grad.dtype == dtype
        assert_relative_rms(f"gradient of {name}", grad, want_grads[name], 5e-3)


def test_float32_parameters_with_half_precision_tokens(backend):
    arguments = conv_arguments(2, 9, 5, 4)
    arguments["x"] = arguments["x"].detach().bfloat16().requires_grad_()
    out, grads = with_gradients(causal_conv1d, arguments, backend=backend)
    assert out.dtype == torch.bfloat16
    assert grads["weight"].dtype == torch.float32
    assert_relative_rms("output", out, conv_definition(**arguments), 3e-3)


def test_non_contiguous_arguments(backend):
    arguments = conv_arguments(3, 8, 5, 4)
    x = torch.cat([arguments["x"], arguments["x"]], -1).detach()[..., :5]
    weight = arguments["weight"].detach().t().contiguous().t()
    arguments = {"x": x.requires_grad_(), "weight": weight.requires_grad_(), "bias": arguments["bias"]}
    weight = torch.randn(8, 3, 5).transpose(0, 1)
    out, grads = with_gradients(causal_conv1d, arguments, weight, backend=backend, activation="silu")
    want, want_grads = with_gradients(conv_definition, arguments, weight, activation="silu")
    assert_close("output", out, want, of_max=1e-5)
    for name in arguments:
        assert_close(name, grads[name], want_grads[name], of_max=1e-5)


@pytest.mark.parametrize("reverse", [False, True])
def test_gradcheck(backend, reverse):
    values = list(conv_arguments(2, 5, 2, 3, dtype=torch.float64).values())
    assert torch.autograd.gradcheck(lambda *t: causal_conv1d(*t, "silu", reverse, backend), values)


@pytest.mark.parametrize("reverse", [False, True])
def test_an_impulse_shows_the_taps(backend, reverse):
    x = torch.zeros(1, 9, 1)
    x[0, 4, 0] = 1
    taps = torch.tensor([[1.0, 2.0, 3.0, 4.0]])
    y = causal_conv1d(x, taps, reverse=reverse, backend=backend)[0, :, 0]
    want = torch.zeros(9)
    want[slice(1, 5) if reverse else slice(4, 8)] = taps[0] if reverse else taps[0].flip(0)
    assert torch.equal(y, want)


def test_no_token_sees_the_ones_after_it(backend):
    x = torch.randn(1, 12, 3, requires_grad=True)
    causal_conv1d(x, torch.randn(3, 4), activation="silu", backend=backend)[0, 5].sum().backward()
    assert x.grad is not None
    assert x.grad[0].abs().sum(-1).ne(0).nonzero().flatten().tolist() == [2, 3, 4, 5]


def test_two_runs_give_the_same_bits(backend):
    arguments = conv_arguments(5, 33, 17, 4)
    runs = [with_gradients(causal_conv1d, arguments, backend=backend, activation="silu") for _ in range(2)]
    assert torch.equal(runs[0][0], runs[1][0])
    assert all(torch.equal(runs[0][1][name], runs[1][1][name]) for name in arguments)


@pytest.mark.parametrize("activation", [None, "silu"])
def test_stored_tensors_of_the_official_convolution(backend, activation):
    tensors = load_file(OPS_FIXTURE)
    x, weight = tensors["conv/x"].mT, tensors["conv/weight"].squeeze(1)
    out = causal_conv1d(x, weight, tensors["conv/bias"], activation, backend=backend)
    assert_close("output", out.mT, tensors["conv/out_silu" if activation else "conv/out_noact"], of_max=1e-5)
