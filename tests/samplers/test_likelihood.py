"""Likelihood: closed forms, traces, probes, bits per dimension."""

import math
from itertools import pairwise

import pytest
import torch

from tests.assertions import assert_close
from tests.samplers.problems import Gaussian, Network
from zigflow.keyed import KeyedDraws
from zigflow.processes import Flow
from zigflow.registry import UnknownNameError
from zigflow.samplers import OdeSampler

TIGHT = {"atol": 1e-10, "rtol": 1e-9}


def normal_log_density(x, mean, std):
    return torch.distributions.Normal(mean, std).log_prob(x).flatten(1).sum(1)


@pytest.mark.parametrize("path_type", ["Linear", "GVP"])
@pytest.mark.parametrize("trace", ["exact", "hutchinson"])
def test_gaussian_data_have_their_density(path_type, trace):
    """The Jacobian is a multiple of the identity, so one probe is exact."""
    flow = Flow(path_type)
    x1 = torch.randn(3, 2, 2, 2, dtype=torch.float64)
    result = OdeSampler(**TIGHT).log_likelihood(flow, Gaussian(flow), x1, trace=trace)
    want = normal_log_density(x1, 0.7, 0.5)
    assert_close("log density", result.log_density, want, of_max=1e-7)
    assert_close("bits", result.bits_per_dim, -want / (8 * math.log(2)), of_max=1e-7)
    assert_close("x0", result.x0, (x1 - 0.7) / 0.5, of_max=1e-7)


@pytest.mark.parametrize("prediction", ["velocity", "noise", "score", "data"])
def test_vp_likelihood_is_finite_and_near(prediction):
    flow = Flow("VP", prediction)
    x1 = 0.7 + 0.5 * torch.randn(5, 3, dtype=torch.float64)
    result = OdeSampler(**TIGHT).log_likelihood(flow, Gaussian(flow), x1, trace="exact")
    # The path ends 1e-3 before the data and starts with alpha = 0.007.
    assert_close("log density", result.log_density, normal_log_density(x1, 0.7, 0.5), floor=2e-2)


def test_exact_trace_is_the_trace_of_the_jacobian():
    flow, model = Flow(), Network()
    x1 = torch.randn(2, 16, dtype=torch.float64)
    result = OdeSampler(**TIGHT).log_likelihood(flow, model, x1, trace="exact")

    def encode(x):
        x = x.unsqueeze(0)
        times = torch.linspace(1, 0, 65, dtype=torch.float64).tolist()
        for t, t_next in pairwise(times):
            h = t_next - t
            a = model(x, torch.tensor([t], dtype=x.dtype))
            b = model(x + h / 2 * a, torch.tensor([t + h / 2], dtype=x.dtype))
            c = model(x + h / 2 * b, torch.tensor([t + h / 2], dtype=x.dtype))
            d = model(x + h * c, torch.tensor([t_next], dtype=x.dtype))
            x = x + h / 6 * (a + 2 * b + 2 * c + d)
        return x[0]

    for row in range(2):
        x = x1[row].clone().requires_grad_()
        end = encode(x)
        jacobian = torch.stack([torch.autograd.grad(value, x, retain_graph=True)[0] for value in end])
        prior = normal_log_density(encode(x1[row])[None], 0.0, 1.0)
        want = prior[0] + torch.linalg.slogdet(jacobian).logabsdet
        assert_close("change of variables", result.log_density[row], want, of_max=1e-5)


def test_hutchinson_is_unbiased_and_narrows_with_probes():
    flow, model = Flow(), Network()
    x1 = torch.randn(1, 16, dtype=torch.float64).expand(400, 16)
    draws = KeyedDraws(0, torch.arange(400))
    sampler = OdeSampler("rk4", 6)
    exact = sampler.log_likelihood(flow, model, x1, trace="exact").log_density
    one = sampler.log_likelihood(flow, model, x1, draws=draws).log_density - exact
    many = sampler.log_likelihood(flow, model, x1, draws=draws, num_probes=16).log_density - exact
    assert abs(one.mean()) < 4 * one.std() / 20
    assert 0.15 < many.std() / one.std() < 0.4


def test_probes_are_keyed():
    flow, model = Flow(), Network()
    x1, ids = torch.randn(4, 16), torch.arange(4)
    sampler = OdeSampler("rk4", 6, batch_size=4)
    whole = sampler.log_likelihood(flow, model, x1, draws=KeyedDraws(1, ids)).log_density
    again = sampler.log_likelihood(flow, model, x1, draws=KeyedDraws(1, ids)).log_density
    part = sampler.log_likelihood(flow, model, x1[2:], draws=KeyedDraws(1, ids[2:])).log_density
    other = sampler.log_likelihood(flow, model, x1, draws=KeyedDraws(2, ids)).log_density
    assert torch.equal(whole, again)
    assert torch.equal(part, whole[2:])
    assert not torch.equal(other, whole)


def test_bits_of_quantised_data():
    """Uniform data on [-1, 1] in 256 bins take 8 bits; their density alone would take one."""
    from zigflow.samplers import Likelihood

    density = torch.full((3,), 10 * math.log(0.5), dtype=torch.float64)
    x0 = torch.zeros(3, 10)
    assert_close("density", Likelihood.of(density, x0, 1.0).bits_per_dim, torch.ones(3))
    assert_close("bins", Likelihood.of(density, x0, 2 / 256).bits_per_dim, torch.full((3,), 8.0))
    with pytest.raises(ValueError, match="bin_width"):
        Likelihood.of(density, x0, 0.0)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_works_where_autograd_is_off(mode):
    flow, model = Flow(), Network()
    with mode():
        x1, y = torch.randn(2, 16), torch.tensor([1, 2])
        inside = OdeSampler("rk4", 4).log_likelihood(flow, model, x1, y, trace="exact")
    outside = OdeSampler("rk4", 4).log_likelihood(flow, model, x1.clone(), y.clone(), trace="exact")
    assert torch.equal(inside.log_density, outside.log_density)
    assert not outside.log_density.requires_grad


def test_errors():
    flow = Flow()
    x1 = torch.randn(2, 16)
    with pytest.raises(UnknownNameError, match="'hutchinson'"):
        OdeSampler().log_likelihood(flow, Network(), x1, trace="hutchison")
    with pytest.raises(ValueError, match="num_probes"):
        OdeSampler().log_likelihood(flow, Network(), x1, num_probes=0)
    with pytest.raises(ValueError, match="one backward pass per element"):
        OdeSampler().log_likelihood(flow, Gaussian(flow), torch.zeros(1, 5000), trace="exact")
    with pytest.raises(ValueError, match="probes have shape"):
        OdeSampler().log_likelihood(flow, Network(), x1, probe=torch.ones(2, 16))
