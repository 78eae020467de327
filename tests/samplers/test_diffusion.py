"""Samplers of diffusion processes on a Gaussian target, whose network and whose flow have closed forms."""

import pytest
import torch

from tests.samplers.problems import Network, slope
from zigflow.keyed import KeyedDraws
from zigflow.processes import Flow, Gaussian, StableDiffusion, VariancePreserving
from zigflow.samplers import (
    ChainSampler,
    DpmSolver,
    Guided,
    OdeSampler,
    SamplingError,
    SdeSampler,
    variational_bound,
)

MEAN, STD = 0.7, 0.5


class Target:
    """The exact network for data N(MEAN, STD^2 I) and the exact flow of its states."""

    def __init__(self, process):
        self.process, self.path = process, process.path

    def __call__(self, x, net_time, y=None):
        t = self.process.process_time(net_time.to(torch.float64), self)
        alpha, sigma = (c.reshape(-1, *(1,) * (x.ndim - 1)) for c in (self.path.alpha(t), self.path.sigma(t)))
        noise = sigma * (x - alpha * MEAN) / ((alpha * STD) ** 2 + sigma**2)
        return self.process.convert(noise, x.double(), t, self.process.prediction, source="noise").to(x)

    def moments(self, t):
        t = torch.tensor(t, dtype=torch.float64)
        alpha, sigma = self.path.alpha(t), self.path.sigma(t)
        return alpha * MEAN, ((alpha * STD) ** 2 + sigma**2).sqrt()

    def flow(self, x, low, high):
        (mean0, std0), (mean1, std1) = self.moments(low), self.moments(high)
        return mean1 + std1 * (x - mean0) / std0


def noise(rows=6, dims=5, seed=0, dtype=torch.float64):
    return torch.randn(rows, dims, generator=torch.Generator().manual_seed(seed), dtype=dtype)


PROCESSES = {
    "vp": lambda **kw: VariancePreserving(**kw),
    "vp cosine": lambda **kw: VariancePreserving("cosine", **kw),
    "sd": lambda **kw: StableDiffusion(**kw),
    "gaussian": lambda **kw: Gaussian(**kw),
}


# Multistep starts with lower orders: one step of order 1, then 2, whose errors fall as h^2 and h^3 only.
ORDERS = [
    (method, variant, order, order if variant == "singlestep" else min(order, 2))
    for method in ("dpm_solver", "dpm_solver++")
    for variant in ("singlestep", "multistep")
    for order in (1, 2, 3)
]


@pytest.mark.parametrize("correction", ["dpm_solver", "taylor"])
@pytest.mark.parametrize("method, variant, order, declared", ORDERS)
def test_convergence_order(method, variant, order, declared, correction):
    process = VariancePreserving(sample_eps=1e-2)
    target, x0 = Target(process), noise()
    want = target.flow(x0, *process.interval("ode"))
    counts, errors = [24, 48, 96, 192], []
    for count in counts:
        sampler = DpmSolver(
            method, variant, count * (order if variant == "singlestep" else 1), order, "logSNR", correction,
            lower_order_final=False, last_step=False,
        )  # fmt: skip
        errors.append((sampler.sample(process, target, x0) - want).abs().max().item())
    assert declared - 0.25 < slope(counts, errors) < order + 0.5, errors


@pytest.mark.parametrize("grid", ["logSNR", "time_uniform", "time_quadratic"])
@pytest.mark.parametrize("prediction", ["noise", "data", "v"])
@pytest.mark.parametrize("name", PROCESSES)
def test_dpm_solver_reaches_the_flow_of_every_process(name, prediction, grid):
    process = PROCESSES[name](prediction=prediction)
    target, x0 = Target(process), noise()
    want = target.flow(x0, *process.interval("ode"))
    for method in ("dpm_solver", "dpm_solver++"):
        sampler = DpmSolver(method, "fast", 60, 3, grid, last_step=False)
        # Steps even in time are long in lambda beside the data.
        assert (sampler.sample(process, target, x0) - want).abs().max() < (2e-3 if grid == "logSNR" else 0.1)
        assert sampler.num_function_evaluations == 60


@pytest.mark.parametrize("order", [2, 3])
def test_adaptive_steps_meet_their_tolerance_per_sample(order):
    process = VariancePreserving()
    target = Target(process)
    # Samples of very different scales need very different steps.
    x0 = noise() * torch.tensor([1.0, 20.0, 1.0, 1.0, 0.1, 1.0], dtype=torch.float64)[:, None]
    want = target.flow(x0, *process.interval("ode"))
    errors, calls = [], []
    for tolerance in (1e-2, 1e-4):
        sampler = DpmSolver(variant="adaptive", order=order, atol=tolerance, rtol=tolerance, last_step=False)
        got = sampler.sample(process, target, x0)
        errors.append((got - want).abs().max().item())
        calls.append(sampler.num_function_evaluations)
        alone = torch.cat([sampler.sample(process, target, row[None]) for row in x0])
        assert (alone - got).abs().max() < 1e-9, "a sample's steps depend on its neighbours"
    assert errors[1] < 0.1 * errors[0] and calls[0] < calls[1]
    with pytest.raises(SamplingError, match="max_steps=3"):
        DpmSolver(variant="adaptive", max_steps=3).sample(process, target, x0)


@pytest.mark.parametrize("name", PROCESSES)
def test_ddim_converges_to_the_flow_and_back(name):
    process = PROCESSES[name]()
    target, x0 = Target(process), noise()
    trips, errors = [], []
    for count in (50, 200):
        sampler = ChainSampler("ddim", count)
        x1 = sampler.sample(process, target, x0)
        # The clean end lies data_end beyond the last time of the chain.
        want = target.flow(
            x0, process.interval("ode")[0], 1.0 if name.startswith("vp") else process.interval("ode")[1]
        )
        errors.append((x1 - want).abs().max().item())
        trips.append((sampler.encode(process, target, x1) - x0).abs().max().item())
    assert errors[1] < 0.6 * errors[0] and errors[1] < 0.1
    assert trips[1] < 0.6 * trips[0] and trips[1] < 0.3


CHAINS = {
    "ddim": ("ddim", 0.0), "ddim eta 0.5": ("ddim", 0.5), "ddim eta 1": ("ddim", 1.0), "ddpm": ("ddpm", 0.0),
}  # fmt: skip


@pytest.mark.parametrize("kind", CHAINS)
def test_chains_converge_with_order_one(kind):
    """Mean and variance of the states beside the data, without any sampling: the network is affine in x.

    Row 0 starts from the mean, row 1 a standard deviation beside it, and row 2 + k gets noise 1 at step k alone; what
    each adds to row 0 is a gain, and the squares of the gains sum to the variance.
    """
    process = VariancePreserving(sample_eps=1e-2)
    target, (method, eta) = Target(process), CHAINS[kind]
    counts, errors = [100, 200, 400], []
    for count in counts:
        mean, std = target.moments(0.0)
        x0 = mean.expand(count + 2, 1).clone()
        x0[1] += std
        unit = torch.eye(count + 2, dtype=torch.float64)[:, 2:]
        states = ChainSampler(method, count, eta).sample(
            process,
            target,
            x0,
            noise=lambda step, x, unit=unit: unit[:, step : step + 1],
            return_trajectory=True,
        )
        # The last step goes from data_end to the data itself, however many steps came before.
        beside = states[-2].flatten()
        mean, std = target.moments(1 - process.data_end)
        gains = beside[1:] - beside[0]
        # A step's mean is affine in the data's own, so that every step has the right one.
        assert (beside[0] - mean).abs() < 1e-10
        errors.append(((gains**2).sum() - std**2).abs().item())
    assert 0.85 < slope(counts, errors) < 1.15, errors


@pytest.mark.parametrize(
    "sampler",
    [
        ChainSampler("ddpm", 100),
        ChainSampler("ddim", 50, eta=0.5),
        ChainSampler("ddim", 100, eta=1.0),
        DpmSolver("dpm_solver++", "multistep", 20, 2, "logSNR"),
        OdeSampler("heun", 60),
        SdeSampler("Euler", 250, "SBDM", last_step_size=1e-3),
    ],
    ids=lambda s: f"{type(s).__name__}-{s.method}-{getattr(s, 'eta', '')}",
)
@pytest.mark.parametrize("name", ["vp", "sd", "gaussian"])
def test_mean_and_covariance_of_a_gaussian_target(name, sampler):
    process = PROCESSES[name]()
    x0 = noise(4000, 2, seed=1)
    x1 = sampler.sample(process, Target(process), x0, draws=KeyedDraws(0, torch.arange(4000)))
    # Of 4000 samples, 5 standard errors, and the discretization.
    assert (x1.mean(0) - MEAN).abs().max() < 5 * STD / 4000**0.5 + 0.02
    assert (torch.cov(x1.T) - STD**2 * torch.eye(2)).abs().max() < 5 * STD**2 * (2 / 4000) ** 0.5 + 0.02


def test_noise_is_keyed_and_padding_changes_no_bit():
    process, model = Gaussian(), Network()
    ids = torch.tensor([4, 9, 2])
    x0 = noise(3, 16, dtype=torch.float32)
    for make in (
        lambda size: ChainSampler("ddpm", 4, batch_size=size),
        lambda size: DpmSolver(num_steps=6, batch_size=size),
    ):
        three = make(5).sample(process, model, x0, draws=KeyedDraws(1, ids))
        one = make(5).sample(process, model, x0[1:2], draws=KeyedDraws(1, ids[1:2]))
        assert torch.equal(three[1:2], one)
    sampler = ChainSampler("ddpm", 4)
    other = sampler.sample(process, model, x0, draws=KeyedDraws(2, ids))
    assert not torch.equal(sampler.sample(process, model, x0, draws=KeyedDraws(1, ids)), other)


@pytest.mark.parametrize(
    "sampler", [ChainSampler("ddim", 7), DpmSolver(num_steps=7), DpmSolver(variant="multistep", num_steps=7)]
)
def test_callbacks_see_every_step_and_the_end(sampler):
    process, seen = Gaussian(), []
    x = sampler.sample(
        process, Target(process), noise(), callback=lambda step, t, x: seen.append((step, t[0].item(), x))
    )
    assert [step for step, _, _ in seen] == list(range(1, len(seen) + 1))
    times = [t for _, t, _ in seen]
    assert times == sorted(times) and times[-1] == 1
    assert torch.equal(seen[-1][2], x)
    assert sampler.num_function_evaluations == 7 + isinstance(sampler, DpmSolver)


def test_guidance_of_one_changes_nothing_and_its_interval_is_of_process_times():
    process, model, x0 = Gaussian(), Network(), noise(3, 16, dtype=torch.float32)
    y = torch.tensor([0, 1, 2])
    sampler = ChainSampler("ddim", 10)
    plain = sampler.sample(process, model, x0, y)
    assert torch.equal(sampler.sample(process, Guided(model, 1.0, process=process), x0, y), plain)
    model.calls.clear()
    guided = sampler.sample(process, Guided(model, 2.0, (0.5, 1.0), process=process), x0, y)
    assert model.calls == [3] * 5 + [6] * 5, "guided in the second half, beside the data"
    assert not torch.equal(guided, plain)


def test_guidance_leaves_a_learned_variance_conditional():
    class Learned(Network):
        def __call__(self, x, t, y=None):
            value = super().__call__(x.flatten(1), t, y).reshape(x.shape)
            return torch.cat([value, 2 * value], 1)

    model, x, t, y = (
        Learned(),
        noise(2, 16, dtype=torch.float32).reshape(2, 4, 2, 2),
        torch.ones(2),
        torch.tensor([0, 1]),
    )
    cond, guided = model(x, t, y), Guided(model, 3.0)(x, t, y)
    # A doubled batch may change the last bits.
    assert (guided[:, 4:] - cond[:, 4:]).abs().max() < 1e-5
    assert (guided[:, :4] - cond[:, :4]).abs().max() > 1e-2


def test_what_cannot_run_says_so():
    x0 = noise()
    with pytest.raises(TypeError, match="gaussian, vp or sd_discrete"):
        ChainSampler("ddim", 5).sample(Flow(), lambda x, t, y: x, x0)
    with pytest.raises(ValueError, match="infinite at an end"):
        DpmSolver().sample(Flow(), lambda x, t, y: x, x0)
    with pytest.raises(ValueError, match="no steps to choose from"):
        ChainSampler("ddim", "ddim50").sample(VariancePreserving(), lambda x, t, y: x, x0)
    with pytest.raises(ValueError, match="no inverse"):
        ChainSampler("ddpm", 5).encode(Gaussian(), lambda x, t, y: x, x0)
    with pytest.raises(TypeError, match="no variational bound"):
        variational_bound(VariancePreserving(), lambda x, t, y: x, x0)
    with pytest.raises(SamplingError, match="step 1"):
        ChainSampler("ddim", 5).sample(Gaussian(), lambda x, t, y: x / 0, x0)
    for kwargs, word in (
        ({"method": "dpm"}, "dpm_solver"),
        ({"order": 4}, "order"),
        ({"num_steps": 2}, "at least the order"),
        ({"lambda_floor": 5.1}, "negative"),
    ):
        with pytest.raises(ValueError, match=word):
            DpmSolver(**kwargs)


def test_dpm_solver_runs_on_a_flow_inside_its_ends():
    from tests.samplers.problems import Gaussian as FlowTarget

    flow = Flow("Linear", "velocity")
    target, x0 = FlowTarget(flow), noise()
    got = DpmSolver("dpm_solver", "fast", 60, 3, "logSNR", interval=(0.01, 0.99), last_step=False).sample(
        flow, target, x0
    )
    (mean0, var0), (mean1, var1) = target.moments(0.01), target.moments(0.99)
    assert (got - (mean1 + (var1 / var0) ** 0.5 * (x0 - mean0))).abs().max() < 1e-3


def test_the_bound_of_a_perfect_model_is_the_entropy():
    """Data of one bin width: the bound of 8-bit Gaussian data is near their entropy, and never below."""
    process = Gaussian("linear")
    std = 0.25

    class Narrow(Target):
        def __call__(self, x, net_time, y=None):
            t = process.process_time(net_time.double(), self)
            alpha, sigma = (c.reshape(-1, 1) for c in (self.path.alpha(t), self.path.sigma(t)))
            return (sigma * x / ((alpha * std) ** 2 + sigma**2)).to(x)

    x1 = ((noise(64, 32, seed=3) * std).clamp(-1, 1) * 127.5).round() / 127.5
    bound = variational_bound(process, Narrow(process), x1, draws=KeyedDraws(0, torch.arange(64)))
    entropy = 0.5 * torch.log2(torch.tensor(2 * torch.pi * torch.e * (std * 127.5) ** 2)).item()
    assert entropy - 0.1 < bound.total.mean().item() < entropy + 0.3
