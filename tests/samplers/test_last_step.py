"""Where trajectories start and end: no noise is left at the data, none is started in that no step can leave."""

import pytest
import torch

from tests.samplers.problems import Network
from zigflow.processes import Flow, Gaussian, StableDiffusion, VariancePreserving
from zigflow.samplers import ChainSampler, DpmSolver, OdeSampler, SamplingError, SdeSampler
from zigflow.samplers.dpm_grids import VARIANTS, plan
from zigflow.samplers.solver import ODE_SOLVERS, TimeRange

PICTURE = 0.3
HALF_GREY_LEVEL = 0.5 / 127.5
PROCESSES = {
    "flow": Flow(),
    "flow gvp": Flow("GVP"),
    "flow vp": Flow("VP"),
    "flow data": Flow(prediction="data"),
    "flow gvp score": Flow("GVP", "score"),
    "flow vp noise": Flow("VP", "noise"),
    "gaussian": Gaussian(),
    "gaussian cosine v": Gaussian("cosine", prediction="v"),
    "sd_discrete data": StableDiffusion(prediction="data"),
    "vp": VariancePreserving(),
    "vp cosine v": VariancePreserving("cosine", prediction="v"),
}
every_process = pytest.mark.parametrize("process", PROCESSES.values(), ids=PROCESSES)


def noise(rows=32):
    return torch.randn(rows, 1, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def sure(process):
    """A network that expects the same picture whatever it sees."""

    def model(x, net_time, y=None):
        t = process.process_time(net_time.double(), model)
        if process.interval("ode")[1] == 1:
            # A velocity that is asked for at the data themselves, where the noise is zero over zero.
            alpha, sigma = (c.reshape(-1, 1, 1, 1) for c in (process.path.alpha(t), process.path.sigma(t)))
            noise = (x - alpha * PICTURE) / sigma.clamp_min(1e-9)
            rates = (c.reshape(-1, 1, 1, 1) for c in (process.path.d_alpha(t), process.path.d_sigma(t)))
            return next(rates) * PICTURE + next(rates) * noise
        return process.convert(torch.full_like(x, PICTURE), x, t, process.prediction, source="data")

    return model


def left(sampler, process):
    return float(sampler.sample(process, sure(process), noise()).std())


def fits(sampler, process):
    """Chains are of diffusions; DPM-Solver needs a finite lambda at both ends."""
    diffusion = not isinstance(process, Flow)
    if isinstance(sampler, ChainSampler):
        return diffusion
    return not isinstance(sampler, DpmSolver) or process.interval("ode")[1] < 1


SAMPLERS = [
    OdeSampler(), OdeSampler("bosh3"), OdeSampler("euler", 50), OdeSampler("heun", 30),
    OdeSampler("torchdiffeq/midpoint", 30), OdeSampler("torchdiffeq/dopri5", 2), SdeSampler(num_steps=40),
    SdeSampler("Heun", 20), SdeSampler("Euler", 20, "linear"), ChainSampler("ddim", 20), ChainSampler("ddpm", 20),
    *(DpmSolver(method, variant, 20) for method in ("dpm_solver", "dpm_solver++") for variant in VARIANTS),
]  # fmt: skip


def pairs():
    """Samplers and processes that go together."""
    for name, process in PROCESSES.items():
        for sampler in SAMPLERS:
            label = f"{name}-{type(sampler).__name__}-{sampler.method}-{getattr(sampler, 'variant', '')}"
            # Heun's second stage asks at the end of the interval, torchdiffeq's dopri5 beyond it.
            singular = (sampler.method == "heun" and process.interval("ode")[1] == 1) or (
                sampler.method == "torchdiffeq/dopri5" and name not in ("flow data", "flow gvp score")
            )
            if fits(sampler, process) and not singular:
                yield pytest.param(sampler, process, id=label)


@pytest.mark.parametrize("sampler, process", list(pairs()))
def test_no_noise_is_left_of_a_picture_that_the_network_is_sure_of(sampler, process):
    assert left(sampler, process) < HALF_GREY_LEVEL


@pytest.mark.parametrize("name", ["sd_discrete data", "gaussian"])
def test_without_a_last_step_the_noise_of_the_last_time_stays(name):
    process = PROCESSES[name]
    sigma = float(process.path.sigma(torch.tensor(process.interval("ode")[1], dtype=torch.float64)))
    for sampler in (OdeSampler(last_step=False), DpmSolver(grid="logSNR", last_step=False)):
        assert left(sampler, process) == pytest.approx(sigma, rel=0.15)
    assert sigma > HALF_GREY_LEVEL


def test_the_published_last_step_of_the_sde_overshoots():
    assert left(SdeSampler(last_step="Mean"), Flow()) == pytest.approx(0.04, rel=0.15)


@every_process
def test_the_last_step_is_one_more_call_at_the_last_time(process):
    calls = []

    def model(x, net_time, y=None):
        calls.append(float(process.process_time(net_time.double(), model)[0]))
        return 0.1 * x

    high = process.interval("ode")[1]
    for make in (
        lambda on: OdeSampler("euler", 9, last_step=on),
        lambda on: DpmSolver(num_steps=9, last_step=on),
    ):
        counts = []
        for on in (True, False):
            sampler = make(on)
            if not fits(sampler, process):
                continue
            calls.clear()
            seen = []
            x = sampler.sample(process, model, noise(2), callback=lambda *now, seen=seen: seen.append(now))
            counts.append(sampler.num_function_evaluations)
            assert len(calls) == counts[-1] and torch.equal(seen[-1][2], x)
            assert [now[0] for now in seen] == list(range(1, len(seen) + 1))
            assert float(seen[-1][1][0]) == pytest.approx(1.0 if on else high)
            if on and high < 1:
                assert calls[-1] == pytest.approx(high, abs=1e-6)
        assert not counts or counts[0] - counts[1] == (high < 1)


@pytest.mark.parametrize("name", ODE_SOLVERS.names())
def test_a_velocity_that_reaches_the_data_has_no_last_step(name):
    on, off = OdeSampler(name, 5), OdeSampler(name, 5, last_step=False)
    x0 = torch.randn(3, 16)
    assert torch.equal(on.sample(Flow(), Network(), x0), off.sample(Flow(), Network(), x0))
    assert on.num_function_evaluations == off.num_function_evaluations
    assert on.time_range(Flow()) == TimeRange(0.0, 1.0)


@pytest.mark.parametrize("name", ["euler", "dopri5", "torchdiffeq/rk4"])
def test_a_trajectory_ends_with_the_result(name):
    process, x0 = Flow("VP", "noise"), torch.randn(3, 16)
    states = OdeSampler(name, 5, batch_size=4).sample(process, Network(), x0, return_trajectory=True)
    assert states.shape == (6, 3, 16)
    assert torch.equal(states[-1], OdeSampler(name, 5, batch_size=4).sample(process, Network(), x0))
    before = OdeSampler(name, 5, batch_size=4, last_step=False).sample(process, Network(), x0)
    assert torch.equal(states[-2], before) and not torch.equal(states[-1], before)


@pytest.mark.parametrize("name", ["heun", "dopri5", "torchdiffeq/rk4"])
def test_encoding_and_likelihood_take_no_last_step(name):
    process, x1 = Flow("VP", "noise"), torch.randn(3, 16)
    on, off = OdeSampler(name, 5), OdeSampler(name, 5, last_step=False)
    assert torch.equal(on.encode(process, Network(), x1), off.encode(process, Network(), x1))
    exact = [s.log_likelihood(process, Network(), x1, trace="exact").log_density for s in (on, off)]
    assert torch.equal(*exact)
    low, high = process.interval("ode")
    assert on.time_range(process, backwards=True) == TimeRange(high, low)
    assert on.time_range(process) == TimeRange(low, high, "data")


def test_a_result_that_is_not_finite_is_named_at_the_last_step():
    process = VariancePreserving()
    end = process.time_map(torch.tensor([process.interval("ode")[1]]), None)

    def model(x, t, y=None):
        return torch.where((t <= end * 1.001)[:, None], torch.nan, 0.1 * x)

    for sampler in (OdeSampler("euler", 5), DpmSolver(num_steps=4)):
        with pytest.raises(SamplingError, match=r"at step 5 in 2 of 2|at step 3 in 2 of 2"):
            sampler.sample(process, model, torch.ones(2, 2))


def test_dpm_solver_starts_at_the_floor_of_lambda_and_no_later():
    def start(process, **kwargs):
        t = torch.tensor(DpmSolver(**kwargs).time_range(process).start, dtype=torch.float64)
        return float(process.path.log_snr(t)) / 2

    for process in (
        Gaussian("cosine"),
        StableDiffusion("cosine"),
        Gaussian("const"),
        Flow(prediction="noise"),
    ):
        assert start(process) == pytest.approx(-5.1, abs=1e-6)
        assert (
            start(process, lambda_floor=-7.0 if process.path.log_snr(torch.tensor(1e-3)) < -13 else -6.0)
            < -5.9
        )
        assert start(process, lambda_floor=None) < -6
    for process in (Gaussian(), StableDiffusion(), VariancePreserving(), VariancePreserving("cosine")):
        assert DpmSolver().time_range(process).start == process.interval("ode")[0]
    named = DpmSolver(interval=(1e-6, 0.999)).time_range(Gaussian("cosine"))
    assert named == TimeRange(1e-6, 0.999, "data")


def test_a_floor_turns_noise_into_samples_on_the_cosine_schedule():
    """Data N(0.3, 0.3^2), whose flow is known: -10 to -6 in one step is too long for any order."""
    process, mean, std = Gaussian("cosine"), 0.3, 0.3
    path = process.path

    def model(x, net_time, y=None):
        t = process.process_time(net_time.double(), model)
        alpha, sigma = (c.reshape(-1, 1, 1, 1) for c in (path.alpha(t), path.sigma(t)))
        return sigma * (x - alpha * mean) / ((alpha * std) ** 2 + sigma**2)

    x0 = noise()
    exact = mean + std * x0
    errors = {}
    for floor in (-5.1, None):
        sampler = DpmSolver("dpm_solver", "fast", 49, lambda_floor=floor)
        errors[floor] = float((sampler.sample(process, model, x0) - exact).abs().mean())
    ddim = float((ChainSampler("ddim", 50).sample(process, model, x0) - exact).abs().mean())
    assert errors[-5.1] < 1.5 * ddim < 0.1 * errors[None]


def test_the_two_fast_plans_are_the_two_published_ones():
    path = StableDiffusion().path

    def lambdas(variant, steps):
        spans = plan(variant, "logSNR", steps, 3, path, 0.0, 0.999)
        ends = torch.tensor([span.times[-1] for span in spans], dtype=torch.float64)
        return [len(span.times) - 1 for span in spans], (path.log_snr(ends) / 2).tolist()

    # A step of order 3 covers three intervals of four, or one of two.
    assert lambdas("fast", 4) == ([3, 1], pytest.approx([1.981, 3.535], abs=1e-3))
    assert lambdas("fast_equal_spans", 4) == ([3, 1], pytest.approx([0.426, 3.535], abs=2e-3))
    for steps in (9, 10, 11, 50):
        for variant in ("fast", "fast_equal_spans"):
            orders, ends = lambdas(variant, steps)
            assert sum(orders) == steps and ends == sorted(ends)
        widths = torch.tensor(ends).diff()
        assert widths.max() - widths.min() < 1e-5
