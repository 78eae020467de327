"""Diffusion processes: schedules, times that networks are fed, conversions, losses."""

import pytest
import torch

from model_zigma import ZigMa
from zigflow.processes import BETAS, Gaussian, Process, StableDiffusion, VariancePreserving
from zigflow.processes.schedules import Cosine, LinearBeta, Table, spaced_steps

MAKE = {"vp": VariancePreserving, "sd_discrete": StableDiffusion, "gaussian": Gaussian}
SCHEDULES = {"linear": LinearBeta(), "cosine": Cosine(), "table": Table(BETAS.get("linear")(1000))}


def draw(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@pytest.fixture(params=MAKE)
def name(request):
    return request.param


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
def test_a_schedule_its_rate_and_its_inverse_agree(schedule):
    s = torch.linspace(0.00137, 0.99, 300, dtype=torch.float64, requires_grad=True)
    log_alpha = schedule.log_alpha(s)
    assert (log_alpha.diff() < 0).all()
    (slope,) = torch.autograd.grad(log_alpha.sum(), s)
    assert torch.allclose(-slope, schedule.rate(s), rtol=1e-9)
    assert torch.allclose(schedule.time_of_log_alpha(log_alpha), s, rtol=0, atol=1e-9)


def test_a_table_holds_its_steps_and_the_path_has_unit_variance(name):
    process = MAKE[name]()
    t = torch.linspace(0, 0.999, 50, dtype=torch.float64)
    assert torch.allclose(process.path.alpha(t) ** 2 + process.path.sigma(t) ** 2, torch.ones_like(t))
    if name != "vp":
        chain = process.chain()
        assert torch.allclose(process.path.alpha(chain.times) ** 2, chain.alphas_bar, rtol=1e-9)
        assert chain.times[-1] == 0 and len(chain) == 1000


@pytest.mark.parametrize(
    "spacing", ["1", "2", "7", "250", "1000", "ddim50", "3,5", "10,0", "0", "ten", "ddimx", "1001", "600,600"]
)
def test_spacings(spacing):
    wanted = {"ddim50": 50, "3,5": 8}.get(spacing, int(spacing) if spacing.isdecimal() else 0)
    if not 0 < wanted <= 1000:
        with pytest.raises(ValueError, match="spacing"):
            spaced_steps(1000, spacing)
        return
    steps = spaced_steps(1000, spacing)
    assert len(steps) == wanted and steps == sorted(set(steps)) and steps[0] == 0 and steps[-1] < 1000


def test_net_times_are_the_published_ones(name):
    process, model = MAKE[name](), torch.nn.Identity()
    u = torch.linspace(0, 1, 2001)[:-1]
    t = process.sample_time(u)
    assert t.dtype == torch.float32 and (t >= 0).all() and (t <= 1).all()
    fed = []
    process.loss(lambda x, net_time, y: fed.append(net_time) or x, draw(2000, 3), draw(2000, 3), t.double())
    net_time = fed[0]
    if name == "vp":
        assert torch.allclose(net_time, 999 * u.double(), atol=1e-4)
    else:
        first = 1 if name == "sd_discrete" else 0
        assert torch.equal(net_time.unique(), torch.arange(first, first + 1000, dtype=torch.float64))
    between = torch.tensor([0.12345], dtype=torch.float64)
    wanted = {"vp": 999, "sd_discrete": 1000, "gaussian": 1000}[name] * (1 - between) - int(
        name == "gaussian"
    )
    assert torch.allclose(process.time_map(between, model), wanted, rtol=1e-12)
    assert torch.allclose(process.process_time(process.time_map(between, model), model), between, rtol=1e-12)
    # ZigMa multiplies its time by 1000 itself.
    assert torch.allclose(process.time_map(between, ZigMa) * 1000, wanted, rtol=1e-12)
    assert isinstance(process, Process)


@pytest.mark.parametrize("prediction", ["noise", "data", "v"])
def test_conversions_recover_what_the_state_was_made_of(name, prediction):
    process = MAKE[name](prediction=prediction)
    x1, x0, t = draw(6, 4), draw(6, 4, seed=1), torch.linspace(0.05, 0.95, 6, dtype=torch.float64)
    x = process.interpolate(x1, x0, t)
    output = process.target(x1, x0, t)
    assert torch.allclose(process.data(output, x, t), x1)
    assert torch.allclose(process.noise(output, x, t), x0)
    sigma = process.path.sigma(t)[:, None]
    assert torch.allclose(process.score(output, x, t), -x0 / sigma)
    velocity = process.path.d_alpha(t)[:, None] * x1 + process.path.d_sigma(t)[:, None] * x0
    assert torch.allclose(process.velocity(output, x, t), velocity)
    for source in ("noise", "data", "v", "velocity", "score"):
        value = process.convert(output, x, t, source)
        assert torch.allclose(process.convert(value, x, t, prediction, source=source), output, atol=1e-6), (
            source
        )


@pytest.mark.parametrize("prediction", ["noise", "data", "v"])
def test_min_snr_weighs_the_error_of_the_data_alike_for_every_prediction(name, prediction):
    """The same error of the expected data costs the same, min(SNR, gamma) of it, however it is predicted."""
    gamma = 5.0
    x1, x0 = draw(8, 4), draw(8, 4, seed=1)
    process = MAKE[name](prediction=prediction, min_snr_gamma=gamma)
    t = process.step_time(process.sample_time(torch.linspace(0.1, 0.9, 8, dtype=torch.float64)))
    x = process.interpolate(x1, x0, t)
    wrong = process.convert(x1 + 0.1, x, t, prediction, source="data")
    loss = process.loss(lambda x, t, y: wrong, x1, x0, t)
    snr = process.path.log_snr(t).exp()
    assert torch.allclose(loss, 0.01 * snr.clamp_max(gamma), rtol=1e-6)
    plain = MAKE[name](prediction=prediction).loss(lambda x, t, y: wrong, x1, x0, t)
    assert torch.allclose(plain, ((wrong - process.target(x1, x0, t)) ** 2).mean(1))


def test_a_learned_variance_trains_by_the_bound_alone():
    process = Gaussian()
    x1, x0 = draw(4, 3, 4, 4), draw(4, 3, 4, 4, seed=1)
    t = process.sample_time(torch.tensor([0.0, 0.3, 0.6, 0.99], dtype=torch.float64))
    output = draw(4, 6, 4, 4, seed=2).requires_grad_()
    terms = process.loss_terms(lambda x, t, y: output, x1, x0, t)
    (of_error,) = torch.autograd.grad(terms["mse"].sum(), output, retain_graph=True)
    (of_bound,) = torch.autograd.grad(terms["vb"].sum(), output)
    assert (of_error[:, 3:] == 0).all() and (of_error[:, :3] != 0).all()
    assert (of_bound[:, :3] == 0).all() and (of_bound[:, 3:] != 0).any()
    plain = process.loss_terms(lambda x, t, y: output[:, :3], x1, x0, t)
    assert set(plain) == {"loss", "mse"} and torch.equal(plain["loss"], terms["mse"])
    with pytest.raises(ValueError, match="twice the channels"):
        Gaussian(variance="learned_range").loss(lambda x, t, y: x, x1, x0, t)


@pytest.mark.parametrize("make", [VariancePreserving, StableDiffusion])
def test_a_learned_variance_is_dropped_elsewhere(make):
    process, x1, x0 = make(), draw(2, 3, 4, 4), draw(2, 3, 4, 4, seed=1)
    t = process.sample_time(torch.tensor([0.2, 0.7], dtype=torch.float64))
    doubled = process.loss(lambda x, t, y: torch.cat([x, x / 0], 1), x1, x0, t)
    assert torch.equal(doubled, process.loss(lambda x, t, y: x, x1, x0, t))


def test_the_posterior_is_bayes():
    """q(x_{i-1} | x_i, x1) of the tables against the product of the two Gaussians it is made of."""
    chain = Gaussian("cosine").chain(10)
    step = torch.arange(1, 10)
    x1, x = draw(9, 1), draw(9, 1, seed=1)
    before, beta = chain.alphas_bar_prev[step], chain.betas[step]
    precision = 1 / (1 - before) + (1 - beta) / beta
    mean = (before.sqrt() * x1[:, 0] / (1 - before) + (1 - beta).sqrt() * x[:, 0] / beta) / precision
    assert torch.allclose(chain.posterior_mean(x1, x, step)[:, 0], mean)
    assert torch.allclose(chain.posterior_variance[step], 1 / precision)


def test_wrong_arguments_are_named():
    for make, kwargs, word in (
        (Gaussian, {"betas": "lineal"}, "linear"),
        (Gaussian, {"variance": "learned"}, "learned_range"),
        (Gaussian, {"loss": "mae"}, "mse"),
        (Gaussian, {"prediction": "velocity"}, "noise"),
        (Gaussian, {"num_steps": 2}, "num_steps"),
        (Gaussian, {"betas": "jsd"}, "betas"),
        (Gaussian, {"respacing": "ddim300"}, "stride"),
        (VariancePreserving, {"schedule": "cosin"}, "cosine"),
        (VariancePreserving, {"sample_eps": 0.0}, "give a number"),
        (VariancePreserving, {"beta_min": -1.0}, "beta_min is -1.0.*positive"),
        (StableDiffusion, {"min_snr_gamma": 0}, "min_snr_gamma"),
    ):
        with pytest.raises(ValueError, match=word):
            make(**kwargs)
