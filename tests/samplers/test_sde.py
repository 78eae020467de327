"""SDE solvers: strong and weak order, all forms, last steps, keyed noise."""

import pytest
import torch

from tests.assertions import assert_close
from tests.samplers.problems import Gaussian, Network, slope
from zigflow.keyed import KeyedDraws
from zigflow.processes import DIFFUSION_FORMS, INTERPOLANTS, Flow
from zigflow.registry import UnknownNameError
from zigflow.samplers import SDE_STEPS, OdeSampler, SamplingError, SdeSampler
from zigflow.samplers.sde import LAST_STEPS

METHODS = SDE_STEPS.names()
FORMS = [name for name in DIFFUSION_FORMS.names() if name != "inccreasing-decreasing"]
INTERVAL = (0.1, 0.9)


def moments(method, flow, model, count, **kwargs):
    """Exact mean and variance of the solver's last state: for an affine drift they follow from unit responses.

    Row 0 starts at the mean without noise, row 1 one unit above it, row 2 + k receives a unit of noise in step k.
    """
    sampler = SdeSampler(method, count + 1, interval=INTERVAL, last_step=None, **kwargs)
    start, variance = model.moments(INTERVAL[0])
    x = torch.full((count + 2, 1), start, dtype=torch.float64)
    x[1] += 1

    def noise(step, x):
        return (torch.arange(count + 2) == step + 2)[:, None].to(x)

    end = sampler.sample(flow, model, x, noise=noise).flatten()
    response = end[1:] - end[0]
    return end[0].item(), (response[0] ** 2 * variance + (response[1:] ** 2).sum()).item()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("path_type", INTERPOLANTS.names())
def test_weak_order_on_a_gaussian_is_the_declared_one(method, form, path_type):
    flow = Flow(path_type, "score")
    model = Gaussian(flow)
    mean, variance = model.moments(INTERVAL[1])
    kwargs = {"diffusion_form": form, "diffusion_norm": 0.5}
    coarse, fine = (moments(method, flow, model, count, **kwargs) for count in (64, 128))
    solver = SDE_STEPS.get(method)
    check_order(coarse[1] - variance, fine[1] - variance, solver.weak_order)
    # The mean obeys the drift alone, where Heun has order 2.
    check_order(coarse[0] - mean, fine[0] - mean, 2 if method == "Heun" else 1)
    assert abs(fine[1] - variance) < 0.02 * variance


def check_order(coarse, fine, order):
    """Extrapolation for just this order, from steps h and h/2, removes most of the error.

    (2^p fine - coarse) / (2^p - 1) has the part of order p removed; with an order of 0 all of the error would
    stay, with a higher one it would grow.
    """
    if abs(fine) < 1e-13:
        return
    left = (2**order * fine - coarse) / (2**order - 1)
    assert abs(left) < 0.6 * abs(fine), (coarse, fine)


def test_heun_has_no_more_than_weak_order_one():
    """The noise of a step is added at its start, which costs the second order of the drift."""
    flow = Flow("GVP", "score")
    model = Gaussian(flow)
    _, variance = model.moments(INTERVAL[1])
    counts = [32, 64, 128, 256]
    errors = [abs(moments("Heun", flow, model, n, diffusion_form="constant")[1] - variance) for n in counts]
    assert abs(slope(counts, errors) - 1) < 0.2


@pytest.mark.parametrize("method", METHODS)
def test_strong_order_is_the_declared_one(method):
    """Against a fine solution driven by the same Brownian path."""
    flow = Flow("GVP", "score")
    model = Gaussian(flow)
    finest, paths = 1024, 400
    increments = torch.randn(finest, paths, 1, dtype=torch.float64)
    x0 = torch.randn(paths, 1, dtype=torch.float64)

    def end(name, count):
        pooled = increments.reshape(count, finest // count, paths, 1).sum(1) / (finest // count) ** 0.5
        sampler = SdeSampler(name, count + 1, "increasing-decreasing", last_step=None, interval=INTERVAL)
        return sampler.sample(flow, model, x0, noise=lambda step, x: pooled[step])

    reference = end("Euler", finest)
    counts = [8, 16, 32, 64]
    errors = [(end(method, n) - reference).pow(2).mean().sqrt().item() for n in counts]
    assert abs(slope(counts, errors) - SDE_STEPS.get(method).strong_order) < 0.25, errors


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("last_step", LAST_STEPS)
@pytest.mark.parametrize(
    "path_type, form", [*(("GVP", form) for form in FORMS), ("Linear", "sigma"), ("VP", "sigma")]
)
def test_every_combination_samples_the_data(method, last_step, path_type, form):
    flow = Flow(path_type)
    model = Gaussian(flow)
    sampler = SdeSampler(method, 40, form, last_step=last_step)
    draws = KeyedDraws(0, torch.arange(1500))
    x1 = sampler.sample(flow, model, draws.normal("start", (1,)), draws=draws)
    assert abs(x1.mean().item() - model.mean) < 0.06
    # A last step is made without noise: with D = 1 to the end it leaves the spread short.
    assert abs(x1.std().item() - model.std) < (0.12 if form == "constant" else 0.08)


@pytest.mark.parametrize("method", METHODS)
def test_without_diffusion_it_is_the_ode_solver(method):
    flow, model = Flow(), Network()
    x0 = torch.randn(4, 16, dtype=torch.float64)
    sde = SdeSampler(method, 20, "constant", 0.0, last_step=None, interval=INTERVAL)
    ode = OdeSampler(method.lower(), 20, interval=INTERVAL, last_step=False)
    assert_close(method, sde.sample(flow, model, x0), ode.sample(flow, model, x0), of_max=1e-12)


def test_last_steps_are_what_they_say():
    flow, model = Flow("GVP"), Network()
    x0 = torch.randn(4, 16, dtype=torch.float64)

    def run(last_step, size=0.04):
        sampler = SdeSampler("Euler", 5, last_step=last_step, last_step_size=size, interval=(0.0, 0.96))
        return sampler.sample(flow, model, x0, noise=lambda k, x: torch.zeros_like(x))

    before = run(None)
    t = torch.full((4,), 0.96, dtype=torch.float64)
    output = model(before, t)
    velocity, score = flow.velocity(output, before, t), flow.score(output, before, t)
    drift = velocity + flow.diffusion(before, t, "sigma") * score
    assert_close("Euler", run("Euler"), before + 0.04 * velocity, of_max=1e-12)
    assert_close("Mean", run("Mean"), before + 0.04 * drift, of_max=1e-12)
    assert_close("Tweedie", run("Tweedie"), flow.data(output, before, t), of_max=1e-12)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("last_step", LAST_STEPS)
def test_evaluations_are_counted(method, last_step):
    model = Network()
    sampler = SdeSampler(method, 7, last_step=last_step)
    trajectory = sampler.sample(Flow(), model, torch.randn(2, 16), return_trajectory=True)
    assert trajectory.shape == (7, 2, 16)
    assert sampler.num_intervals == 6
    assert sampler.num_function_evaluations == len(model.calls)
    assert len(model.calls) == 6 * SDE_STEPS.get(method).evaluations + (last_step is not None)


class TestNoise:
    flow = Flow("GVP", "noise")

    def run(self, ids, x0, seed=1, batch_size=8, y=None):
        sampler = SdeSampler("Heun", 6, batch_size=batch_size)
        return sampler.sample(self.flow, Network(), x0, y, draws=KeyedDraws(seed, ids))

    def test_a_sample_is_the_same_however_it_is_batched(self):
        ids, x0 = torch.arange(8), torch.randn(8, 16)
        whole = self.run(ids, x0)
        order = torch.tensor([5, 0, 7, 2, 1, 3, 6, 4])
        assert torch.equal(self.run(ids[order], x0[order]), whole[order])
        parts = [self.run(ids[i:j], x0[i:j]) for i, j in ((0, 3), (3, 4), (4, 8))]
        assert torch.equal(torch.cat(parts), whole)

    def test_ids_and_seed_decide(self):
        x0 = torch.randn(4, 16)
        first = self.run(torch.arange(4), x0)
        assert not torch.equal(self.run(torch.arange(4), x0, seed=2), first)
        assert not torch.equal(self.run(torch.arange(4) + 4, x0), first)

    def test_noise_of_step_k_is_the_documented_draw(self):
        draws, x0 = KeyedDraws(3, torch.arange(4)), torch.randn(4, 16)
        sampler = SdeSampler("Euler", 5)
        got = sampler.sample(self.flow, Network(), x0, draws=draws)
        want = sampler.sample(
            self.flow, Network(), x0, noise=lambda k, x: draws.normal("sample.sde", (16,), step=k)
        )
        assert torch.equal(got, want)

    def test_ambient_draws_are_used(self):
        draws, x0 = KeyedDraws(3, torch.arange(4)), torch.randn(4, 16)
        sampler = SdeSampler("Euler", 5)
        with draws.active():
            got = sampler.sample(self.flow, Network(), x0)
        assert torch.equal(got, sampler.sample(self.flow, Network(), x0, draws=draws))


def test_default_flow_is_finite_with_every_form_and_last_step_size_zero():
    """SBDM at alpha = 0 and a last step at sigma = 0 are NaN in the published code."""
    for form in FORMS:
        for last_step in LAST_STEPS:
            for method in METHODS:
                sampler = SdeSampler(method, 9, form, last_step=last_step, last_step_size=0.0)
                flow = Flow()
                assert torch.isfinite(sampler.sample(flow, Gaussian(flow), torch.randn(3, 2))).all()


def test_a_non_finite_model_is_named():
    def model(x, t, y):
        return torch.where((t > 0.5)[:, None] & (torch.arange(3) == 1)[:, None], torch.inf, x)

    with pytest.raises(SamplingError, match=r"at step 7 in 1 of 3 samples \(rows 1\)"):
        SdeSampler("Euler", 11, interval=(0.0, 1.0), last_step=None).sample(
            Flow("VP"), model, torch.ones(3, 2)
        )


def test_names_and_numbers_are_checked():
    with pytest.raises(UnknownNameError, match="'Euler'"):
        SdeSampler("euler")
    with pytest.raises(UnknownNameError, match="'Tweedie'"):
        SdeSampler(last_step="tweedie")
    with pytest.raises(UnknownNameError, match="'sigma'"):
        SdeSampler(diffusion_form="sigmoid")
    for wrong in ({"num_steps": 1}, {"diffusion_norm": -1.0}, {"last_step_size": 1.0}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            SdeSampler(**wrong)

    class Other:
        prediction = "noise"

    with pytest.raises(TypeError, match="Other"):
        SdeSampler().sample(Other(), Network(), torch.ones(1, 16))
