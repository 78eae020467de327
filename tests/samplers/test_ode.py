"""ODE solvers: order, tolerance, independence of samples, reversal."""

import pytest
import torch

from tests.assertions import assert_close
from tests.samplers.problems import Gaussian, Network, slope
from zigflow.processes import Flow
from zigflow.registry import UnknownNameError
from zigflow.samplers import ODE_SOLVERS, OdeSampler, SamplingError
from zigflow.samplers.solver import SolverSettings

OURS = [n for n in ODE_SOLVERS.names() if not n.startswith("torchdiffeq/")]
FIXED = [n for n in OURS if not ODE_SOLVERS.get(n).adaptive]
ADAPTIVE = [n for n in OURS if ODE_SOLVERS.get(n).adaptive]
THEIRS = [n for n in ODE_SOLVERS.names() if n.startswith("torchdiffeq/")]


def decay(x, t):
    """dx/dt = -2 t x^2, whose solution is 1 / (1/x(0) + t^2): neither linear nor autonomous."""
    return -2 * t[:, None] * x**2


START = torch.tensor([[0.8, 1.0], [1.3, 0.6]], dtype=torch.float64)


def exact(t):
    return 1 / (1 / START + t**2)


@pytest.mark.parametrize("name", FIXED)
def test_fixed_step_order_is_the_declared_one(name):
    solver = ODE_SOLVERS.get(name)
    counts = [16, 32, 64, 128]
    errors = []
    for count in counts:
        times = torch.linspace(0, 1, count + 1, dtype=torch.float64).tolist()
        solution = solver.solve(decay, START, times, SolverSettings())
        errors.append((solution.x - exact(1.0)).abs().max().item())
        assert solution.num_function_evaluations == count * len(solver.b)
    assert abs(slope(counts, errors) - solver.order) < 0.25, errors


@pytest.mark.parametrize("name", OURS)
def test_tableaus_are_consistent(name):
    solver = ODE_SOLVERS.get(name)
    if solver.adaptive:
        assert sum(solver.error) == pytest.approx(0, abs=1e-14)
        assert sum(solver.dense) == pytest.approx(0, abs=1e-12)
        assert sum(solver.a[-1]) == pytest.approx(1)
    else:
        assert sum(solver.b) == pytest.approx(1)


@pytest.mark.parametrize("name", ADAPTIVE)
@pytest.mark.parametrize("direction", [1, -1])
def test_error_follows_the_tolerance(name, direction):
    solver = ODE_SOLVERS.get(name)
    tolerances = [1e-3, 1e-5, 1e-7, 1e-9]
    times = torch.linspace(0, 1, 7, dtype=torch.float64).tolist()[::direction]
    start = exact(times[0])
    truth = torch.stack([exact(t) for t in times])
    errors, evaluations = [], []
    for tolerance in tolerances:
        solution = solver.solve(decay, start, times, SolverSettings(tolerance, tolerance), keep=True)
        # Every kept state, so that the dense output is held to the tolerance too.
        errors.append((solution.trajectory - truth).abs().max().item())
        evaluations.append(solution.num_function_evaluations)
        assert errors[-1] < 20 * tolerance
        assert torch.equal(solution.trajectory[-1], solution.x)
    assert evaluations == sorted(evaluations)
    assert slope([1 / t for t in tolerances], errors) > 0.7


@pytest.mark.parametrize("name", ADAPTIVE)
def test_adaptive_methods_cost_what_their_order_says(name):
    """Evaluations grow as tolerance^(-1/order): a wrong error estimate shows here."""
    solver = ODE_SOLVERS.get(name)
    settings = [SolverSettings(t, t) for t in (10.0 ** -(solver.order + 3), 10.0 ** -(solver.order + 6))]
    counts = [solver.solve(decay, START, [0.0, 1.0], s).accepted.max().item() for s in settings]
    measured = 3 / torch.log10(torch.tensor(counts[1] / counts[0]))
    assert abs(measured - solver.order) < 0.2 * solver.order


@pytest.mark.parametrize("name", OURS)
def test_a_sample_does_not_know_its_neighbors(name):
    """Bit for bit, at an equal batch size and whatever row it lies in."""
    flow, model = Flow("GVP", "noise"), Network()
    x = torch.randn(8, 16)
    other = 3 * torch.randn(8, 16)
    other[5] = x[2]
    sampler = OdeSampler(name, 9)
    y = torch.tensor([0, 1, 2, 3, 4, 0, 1, 2])
    y_other = torch.full((8,), 2)
    first = sampler.sample(flow, model, x, y, return_trajectory=True)
    second = sampler.sample(flow, model, other, y_other, return_trajectory=True)
    assert torch.equal(first[:, 2], second[:, 5])
    assert set(model.calls) == {8}


@pytest.mark.parametrize("name", OURS)
def test_padding_keeps_the_bits(name):
    flow, model = Flow(), Network()
    x, y = torch.randn(8, 16), torch.arange(8) % 5
    sampler = OdeSampler(name, 6, batch_size=8)
    whole = sampler.sample(flow, model, x, y)
    for rows in (1, 3):
        assert torch.equal(sampler.sample(flow, model, x[:rows], y[:rows]), whole[:rows])
        kept = sampler.sample(flow, model, x[:rows], y[:rows], return_trajectory=True)
        assert kept.shape == (6, rows, 16)
    assert set(model.calls) == {8}
    with pytest.raises(ValueError, match="batch of 9 samples.*batch_size 8"):
        sampler.sample(flow, model, torch.randn(9, 16))


@pytest.mark.parametrize("name", OURS)
@pytest.mark.parametrize("run", ["sample", "encode"])
def test_the_model_is_never_asked_beyond_the_interval(name, run):
    flow, model = Flow("VP", "score"), Network()
    getattr(OdeSampler(name, 5), run)(flow, model, torch.randn(3, 16))
    times = torch.cat(model.times)
    low, high = torch.tensor(flow.interval("ode"))
    assert times.min() >= low
    assert times.max() <= high


def test_torchdiffeq_asks_beyond_the_interval():
    """Why the solvers above exist; should this fail, torchdiffeq has learnt to stop."""
    model = Network()
    OdeSampler("torchdiffeq/dopri5", 5).sample(Flow(), model, torch.randn(3, 16))
    assert torch.cat(model.times).max() > 1


@pytest.mark.parametrize("name", ADAPTIVE)
def test_finished_samples_wait_unchanged(name):
    def drift(x, t):
        return torch.where(
            torch.arange(2)[:, None] == 0, torch.zeros_like(x), torch.sin(200 * t[:, None]) * x
        )

    solution = ODE_SOLVERS.get(name).solve(drift, START.clone(), [0.0, 1.0], SolverSettings())
    assert torch.equal(solution.x[0], START[0])
    assert solution.accepted[1] > 3 * solution.accepted[0]


@pytest.mark.parametrize("name", ADAPTIVE)
def test_steps_are_refused_where_the_drift_turns_sharp(name):
    def drift(x, t):
        return torch.exp(-(((t[:, None] - 0.5) / 0.04) ** 2)) / (0.04 * torch.pi**0.5) + 0 * x

    solution = ODE_SOLVERS.get(name).solve(
        drift, torch.zeros(2, 1, dtype=torch.float64), [0.0, 1.0], SolverSettings(1e-6, 1e-4)
    )
    assert (solution.rejected > 0).all()
    assert_close("integral of the bump", solution.x, torch.ones(2, 1), of_max=1e-2)


@pytest.mark.parametrize("name", ODE_SOLVERS.names())
@pytest.mark.parametrize("path_type", ["Linear", "GVP"])
def test_every_sampler_maps_a_gaussian_to_the_data(name, path_type):
    flow = Flow(path_type)
    model = Gaussian(flow)
    sampler = OdeSampler(name, 65, rtol=1e-4)
    x0 = torch.randn(5, 3, dtype=torch.float64)
    x1 = sampler.sample(flow, model, x0)
    assert_close(
        name, x1, model.mean + model.std * x0, of_max=5e-3 if name in OURS and name != "euler" else 5e-2
    )
    assert sampler.num_function_evaluations > 0


@pytest.mark.parametrize("name", OURS)
def test_moments_of_a_gaussian_converge(name):
    flow = Flow("GVP")
    model = Gaussian(flow)
    probes = torch.tensor([[0.0], [1.0]], dtype=torch.float64)
    counts, errors = [8, 16, 32, 64], []
    for count in counts:
        sampler = OdeSampler(name, count + 1, 10.0 ** -(count // 6), 10.0 ** -(count // 6))
        zero, one = sampler.sample(flow, model, probes).flatten().tolist()
        mean, variance = model.moments(1.0)
        errors.append(abs(zero - mean) + abs((one - zero) ** 2 - variance))
    if ODE_SOLVERS.get(name).adaptive:
        assert errors[-1] < 1e-7
    else:
        assert slope(counts, errors) > ODE_SOLVERS.get(name).order - 0.3


@pytest.mark.parametrize("path_type, prediction", [("Linear", "velocity"), ("GVP", "data"), ("VP", "noise")])
@pytest.mark.parametrize("name", ["dopri5", "bosh3", "rk4"])
def test_encode_undoes_sample(name, path_type, prediction):
    flow = Flow(path_type, prediction, sample_eps=0.02)
    model = Gaussian(flow)
    sampler = OdeSampler(name, 257, 1e-8, 1e-6, last_step=False)
    x0 = torch.randn(4, 3, dtype=torch.float64)
    x1 = sampler.sample(flow, model, x0)
    assert_close("there and back", sampler.encode(flow, model, x1), x0, of_max=1e-4)


@pytest.mark.parametrize("prediction", ["velocity", "score", "noise", "data"])
def test_vp_is_sampled_to_its_end(prediction):
    flow = Flow("VP", prediction)
    model = Gaussian(flow)
    x0 = torch.randn(16, 3)
    x1 = OdeSampler("dopri5").sample(flow, model, x0)
    assert_close("samples", x1, model.mean + model.std * x0.double(), of_max=3e-2)


@pytest.mark.parametrize("name", [*OURS, "torchdiffeq/rk4"])
def test_a_non_finite_model_stops_the_run_and_is_named(name):
    def model(x, t, y):
        poison = torch.where((t > 0.5) & (torch.arange(len(t)) == 2), torch.nan, 0.0)
        return x + poison[:, None]

    with pytest.raises(SamplingError, match=r"1 of 4 samples \(rows 2\)"):
        OdeSampler(name, 11).sample(Flow(), model, torch.ones(4, 2))


def test_a_vanishing_step_of_torchdiffeq_is_an_error_of_ours():
    with pytest.raises(SamplingError, match=r"torchdiffeq/dopri5.*outside the interval"):
        OdeSampler("torchdiffeq/dopri5").sample(
            Flow(), lambda x, t, y: (0.5 - t[:, None]).sqrt() * x, torch.ones(2, 2)
        )


def test_a_non_finite_start_is_named():
    with pytest.raises(SamplingError, match=r"at the start.*2 of 2 samples"):
        OdeSampler().sample(Flow(), lambda x, t, y: x / 0, torch.ones(2, 2))


def test_too_many_steps_name_sample_and_tolerance():
    def model(x, t, y):
        return torch.where(torch.arange(3)[:, None] == 1, torch.sin(1000 * t[:, None]), 0 * x)

    with pytest.raises(SamplingError, match=r"20 steps.*1 of 3 samples \(rows 1\).*rtol 0.001"):
        OdeSampler(max_steps=20).sample(Flow(), model, torch.ones(3, 2))


def test_errors_of_the_model_are_not_swallowed():
    def model(x, t, y):
        raise RuntimeError("out of memory")

    for name in ("euler", "dopri5", "torchdiffeq/dopri5"):
        with pytest.raises(RuntimeError, match="out of memory"):
            OdeSampler(name).sample(Flow(), model, torch.ones(1, 2))


@pytest.mark.parametrize("name", ["rk4", "dopri5", "torchdiffeq/rk4"])
def test_callback_sees_every_step(name):
    seen = []
    x1 = OdeSampler(name, 6).sample(
        Flow(), Network(), torch.randn(3, 16), callback=lambda step, t, x: seen.append((step, t, x))
    )
    assert [s for s, _, _ in seen] == list(range(1, len(seen) + 1))
    assert torch.equal(seen[-1][2], x1)
    assert torch.equal(seen[-1][1], torch.ones(3))


def test_names_and_numbers_are_checked():
    with pytest.raises(UnknownNameError, match="'dopri5'"):
        OdeSampler("dopri")
    with pytest.raises(UnknownNameError, match="'euler'"):
        OdeSampler("Euler")
    with pytest.raises(UnknownNameError, match=r"'torchdiffeq/dopri8'.*Known: bosh3, .*torchdiffeq/NAME$"):
        OdeSampler("torchdiffeq/dopri9")
    with pytest.raises(UnknownNameError, match="ODE method"):
        OdeSampler("sde/Euler")
    with pytest.raises(ValueError, match="grid points"):
        OdeSampler(num_steps=1)
    with pytest.raises(ValueError, match="rtol"):
        OdeSampler(rtol=-1)
    assert OdeSampler("rk4", 250).num_intervals == 249


def test_every_method_of_torchdiffeq_is_there():
    from torchdiffeq._impl.odeint import SOLVERS

    assert {n.removeprefix("torchdiffeq/") for n in THEIRS} == set(SOLVERS)
