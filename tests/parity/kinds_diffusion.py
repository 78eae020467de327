"""DiT's Gaussian diffusion, U-ViT's schedules and losses, and all samplers of both, on networks with closed forms."""

import pytest
import torch

from tests.assertions import GRADIENT_RTOL_OF_MAX, assert_close
from tests.parity.harness import parity_kind
from zigflow.processes import BETAS, Gaussian, StableDiffusion, VariancePreserving
from zigflow.processes.chain import Chain, discretized_log_likelihood, gaussian_kl
from zigflow.processes.schedules import Cosine, LinearBeta, Table, spaced_steps
from zigflow.samplers import ChainSampler, DpmSolver, SdeSampler, variational_bound

FLOAT32_EPS = torch.finfo(torch.float32).eps
TABLES = {
    "betas": "betas",
    "alphas_cumprod": "alphas_bar",
    "posterior_variance": "posterior_variance",
    "posterior_log_variance_clipped": "posterior_log_variance",
    "posterior_mean_coef1": "data_coefficient",
    "posterior_mean_coef2": "state_coefficient",
}


def toy_noise(x, alpha, sigma, mu, sd):
    alpha, sigma = (c.to(x.dtype).reshape(-1, 1, 1, 1) for c in (alpha, sigma))
    mu = mu.to(x.dtype)
    bend = 0.05 * sigma * torch.sin(2 * x)
    return sigma * (x - alpha * mu) / (alpha**2 * sd**2 + sigma**2) + bend


class Toy:
    """The stored networks: net time -> (alpha, sigma) by ``coefficients``; variance logits if ``learned``."""

    def __init__(self, coefficients, mu, sd, learned=False):
        self.coefficients, self.mu, self.sd, self.learned = coefficients, mu, sd, learned
        self.times, self.states = [], []

    def __call__(self, x, t, y=None):
        self.times.append(t.clone())
        self.states.append(x.clone())
        noise = toy_noise(x, *self.coefficients(t.double()), self.mu, self.sd)
        return torch.cat([noise, 0.5 * torch.tanh(x) - 0.2], 1) if self.learned else noise


def gaussian_toy(fixture, learned=True):
    alphas_bar = torch.cumprod(1 - BETAS.get(fixture.meta.get("schedule", "linear"))(1000), 0)

    def coefficients(t):
        step = t.long()
        assert torch.equal(step.double(), t), f"net times {t.tolist()} are no steps"
        return alphas_bar[step].sqrt(), (1 - alphas_bar[step]).sqrt()

    return Toy(coefficients, fixture.tensors["toy.mu"], fixture.meta["sd"], learned)


def continuous_toy(fixture, scale=999.0):
    path = VariancePreserving().path
    return Toy(
        lambda t: (path.alpha(1 - t / scale), path.sigma(1 - t / scale)),
        fixture.tensors["toy.mu"],
        fixture.meta["sd"],
    )


def discrete_toy(fixture):
    path = StableDiffusion().path
    return Toy(
        lambda t: (path.alpha(1 - t / 1000), path.sigma(1 - t / 1000)),
        fixture.tensors["toy.mu"],
        fixture.meta["sd"],
    )


@parity_kind("dit.diffusion_tables")
def check_tables(fixture, case):
    stored = dict(fixture.tensors)
    for name in ("linear", "squaredcos_cap_v2"):
        chain = Gaussian(name).chain()
        for key, attribute in TABLES.items():
            want = stored.pop(f"{name}1000.{key}")
            assert_close(f"{name} {key}", getattr(chain, attribute), want, of_max=1e-9)
    for name in ("quad", "warmup10", "jsd", "const"):
        assert_close(name, BETAS.get(name)(40), stored.pop(f"get_beta.{name}"), of_max=1e-9)
    process = Gaussian("linear")
    for spacing, steps in fixture.meta["space_timesteps"].items():
        assert spaced_steps(1000, spacing) == steps, spacing
        chain = process.chain(spacing)
        assert ((1 - chain.times) * 1000 - 1).round().long().tolist() == steps
        for key in ("betas", "alphas_cumprod"):
            if f"spaced.{spacing}.{key}" in stored:
                want = stored.pop(f"spaced.{spacing}.{key}")
                assert_close(f"{spacing} {key}", getattr(chain, TABLES[key]), want, of_max=1e-9)
    for spacing in fixture.meta["errors"]:
        with pytest.raises(ValueError, match="spacing"):
            spaced_steps(1000, spacing)
    assert not stored, f"not compared: {sorted(stored)}"


@parity_kind("dit.diffusion_core")
def check_core(fixture, case):
    stored = fixture.tensors
    x1, x0, step = stored["x0"], stored["noise"], stored["t"]
    schedule = fixture.meta["schedule"]
    process = Gaussian(schedule)
    chain = process.chain()
    t = chain.times[step].float()
    x_t = process.interpolate(x1, x0, process.step_time(t))
    assert_close("q_sample", x_t, stored["q_sample"])
    assert_close("q_sample by the chain", chain.noised(x1, x0, step), stored["q_sample"])
    assert_close("q_post.mean", chain.posterior_mean(x1, x_t, step), stored["q_post.mean"])
    small = chain.log_variance("fixed_small", None, x_t, step).expand_as(x_t)
    assert_close("q_post.logvar", small, stored["q_post.logvar"])
    exact = chain.at(chain.posterior_variance, step, x_t).expand_as(x_t)
    assert_close("q_post.var", exact, stored["q_post.var"])
    alphas_bar = chain.at(chain.alphas_bar, step, x1.double())
    assert_close("q.mean", alphas_bar.sqrt() * x1, stored["q.mean"])
    assert_close("q.var", (1 - alphas_bar).expand_as(x1), stored["q.var"])
    assert_close("q.logvar", (1 - alphas_bar).log().expand_as(x1), stored["q.logvar"])
    check_core_losses(stored, schedule, x1, x0, t)
    check_core_steps(stored, schedule, chain, gaussian_toy(fixture)(x_t, step.float()), x_t, step)
    spaced = Gaussian(schedule, respacing=8)
    place = stored["spaced8.t"]
    times = spaced.chain(8).times[place].float()
    toy = gaussian_toy(fixture)
    terms = spaced.loss_terms(toy, x1, x0, times)
    assert torch.equal(toy.times[0].long(), stored["spaced8.model_t"])
    for key in ("vb", "mse", "loss"):
        assert_close(f"spaced8 {key}", terms[key], stored[f"spaced8.loss.{key}"])
    means, scales = 0.3 * stored["q_sample"], 0.1 * x0 - 2
    decoded = discretized_log_likelihood(x1, means, scales)
    assert_close("discretized_loglik", decoded, stored["vb_t0.discretized_loglik"])
    kl = gaussian_kl(x1, 0.1 * x0, stored["q_sample"], 0.2 * x0 - 1)
    assert_close("normal_kl", kl, stored["normal_kl"])


CORE_LOSSES = {
    "mse_learned_range": {"variance": "learned_range"},
    "rescaled_mse": {"variance": "learned_range", "loss": "rescaled_mse"},
    "rescaled_kl": {"variance": "learned_range", "loss": "rescaled_kl"},
    "fixed_large_mse": {"variance": "fixed_large"},
    "xstart_mse": {"variance": "fixed_large", "prediction": "data"},
    "fixed_small_kl": {"variance": "fixed_small", "loss": "rescaled_kl"},
}


def check_core_losses(stored, schedule, x1, x0, t):
    names = {key.split(".")[1] for key in stored if key.startswith("loss.")}
    assert names == set(CORE_LOSSES)
    for name, kwargs in CORE_LOSSES.items():
        gradient = stored[f"loss.{name}.grad_mean_loss_wrt_model_output"]
        output = stored["raw_model_output"][:, : gradient.shape[1]].clone().requires_grad_()
        terms = Gaussian(schedule, **kwargs).loss_terms(lambda x, t, y, o=output: o, x1, x0, t)
        for key in ("loss", "mse", "vb"):
            if f"loss.{name}.{key}" in stored:
                assert_close(f"{name} {key}", terms[key], stored[f"loss.{name}.{key}"])
        (got,) = torch.autograd.grad(terms["loss"].mean(), output)
        assert_close(f"{name} gradient", got, gradient, of_max=GRADIENT_RTOL_OF_MAX)


def check_core_steps(stored, schedule, chain, raw, x_t, step):
    for name in ("learned.clip0", "learned.clip1", "fixed_large", "fixed_small"):
        learned = name.startswith("learned")
        process = Gaussian(schedule, variance="learned_range" if learned else name)
        output, logits = raw.chunk(2, 1)
        clip = name.endswith("clip1")
        mean, log_variance, data = process.backward_step(
            chain, output, logits if learned else None, x_t, step, clip=clip
        )
        for key, got in (("mean", mean), ("log_variance", log_variance), ("pred_xstart", data)):
            assert_close(f"{name} {key}", got, stored[f"pmv.{name}.{key}"])
        variance = log_variance.exp()
        if name == "fixed_small":
            # At step 0 the published pair disagrees: variance 0 beside the log variance of step 1.
            variance = chain.at(chain.posterior_variance, step, x_t).expand_as(x_t)
        assert_close(f"{name} variance", variance, stored[f"pmv.{name}.variance"])


@parity_kind("dit.sampler")
def check_sampler(fixture, case):
    meta, stored = fixture.meta, fixture.tensors
    learned = meta["create_diffusion"].get("learn_sigma", True)
    process = Gaussian(meta["schedule"])
    sampler = ChainSampler(meta["kind"], meta["respacing"], meta["eta"], meta["clip_denoised"])
    for dtype in (torch.float32, torch.float64):
        toy = gaussian_toy(fixture, learned)
        got = sampler.sample(
            process,
            toy,
            stored["x_T"].to(dtype),
            noise=lambda k, x: stored["noise"][k],
            return_trajectory=True,
        )
        assert torch.equal(torch.stack(toy.times).long(), stored["model_t"])
        assert sampler.num_function_evaluations == len(stored["model_t"])
        assert_close(f"samples {dtype}", got, stored["samples"])
    data = []
    chain = process.chain(meta["respacing"])
    for place, x in zip(reversed(range(len(chain))), toy.states, strict=True):
        step = torch.full((len(x),), place)
        output = gaussian_toy(fixture, False)(x, toy.times[len(data)])
        data.append(process.backward_step(chain, output, None, x, step, meta["clip_denoised"])[2])
    assert_close("pred_xstart", torch.stack(data), stored["pred_xstart"])


@parity_kind("dit.reverse_bpd")
def check_reverse_bpd(fixture, case):
    stored, spacing = fixture.tensors, fixture.meta["respacing"]
    process, toy = Gaussian("linear"), gaussian_toy(fixture)
    sampler = ChainSampler("ddim", spacing)
    got = sampler.encode(process, toy, stored["x0"], return_trajectory=True)
    assert_close("reverse", got, stored["reverse"])
    for dtype in (torch.float32, torch.float64):
        bound = variational_bound(
            process, toy, stored["x0"].to(dtype), spacing=spacing, noise=lambda k, x: stored["noise"][k]
        )
        for key, value in {
            "total_bpd": bound.total,
            "prior_bpd": bound.prior,
            "vb": bound.terms,
            "xstart_mse": bound.data_error,
            "mse": bound.noise_error,
        }.items():
            assert_close(f"{key} {dtype}", value, stored[f"bpd.{key}"])


@parity_kind("uvit.schedules")
def check_schedules(fixture, case):
    stored = dict(fixture.tensors)
    check_sdes(stored)
    for name, schedule in (("dpm.linear", LinearBeta()), ("dpm.cosine", Cosine()), ("disc", sd_table())):
        check_dpm_schedule(stored, name, schedule)
    process = StableDiffusion()
    betas = BETAS.get("scaled_linear")(1000)
    assert_close("sd.betas", betas, stored.pop("sd.betas"), of_max=1e-9)
    clean = torch.ones(1, dtype=torch.float64)
    chain = process.chain()
    assert_close(
        "sd.cum_alphas", torch.cat([clean, chain.alphas_bar]), stored.pop("sd.cum_alphas"), of_max=1e-9
    )
    assert_close(
        "sd.cum_betas", torch.cat([clean * 0, 1 - chain.alphas_bar]), stored.pop("sd.cum_betas"), of_max=1e-9
    )
    skips = [
        Chain(chain.times[[*steps]], chain.alphas_bar[[*steps]]) for steps in ((499,), (498, 499), (499, 998))
    ]
    variances = torch.stack([skip.posterior_variance[-1] for skip in skips])
    assert_close("tilde_beta", variances, stored.pop("sd.tilde_beta_s_t_0_500_999"), of_max=1e-9)
    assert not stored, f"not compared: {sorted(stored)}"


def sd_table():
    return Table(BETAS.get("scaled_linear")(1000))


def check_sdes(stored):
    s = stored.pop("t").double()
    for name, process in (("vpsde", VariancePreserving()), ("cosine", VariancePreserving("cosine"))):
        path = process.path
        alphas_bar = path.alpha(1 - s) ** 2
        rate = path.schedule.rate(s)
        # Where alpha vanishes, the stored float32 values are round-off.
        inner = s < 1 if name == "cosine" else s <= 1
        got = {
            "cum_alpha": alphas_bar,
            "cum_beta": 1 - alphas_bar,
            "snr": path.log_snr(1 - s).exp(),
            "nsr": (-path.log_snr(1 - s)).exp(),
            "diffusion": (2 * rate).sqrt(),
            "drift_of_ones": -rate[:, None],
        }
        for key, value in got.items():
            want = stored.pop(f"{name}.{key}")[inner]
            if key in ("snr", "nsr"):
                # float32 took 1 - alpha_bar or alpha_bar with an absolute error, which the quotient magnifies.
                least = (1 - alphas_bar if key == "snr" else alphas_bar)[inner]
                worst = (value[inner] * 4 * FLOAT32_EPS / least).max().item()
                assert_close(f"{name} {key}", value[inner], want, floor=worst)
            else:
                assert_close(f"{name} {key}", value[inner], want)
    path = VariancePreserving().path
    first = torch.tensor(0.7, dtype=torch.float64)
    skip = (path.alpha(1 - s) / path.alpha(first)) ** 2
    assert_close("skip", skip, stored.pop("vpsde.skip_alpha_0.3_t"))


def check_dpm_schedule(stored, name, schedule):
    s = stored.pop(f"{name}.t").double()
    log_alpha = schedule.log_alpha(s)
    sigma = (-torch.expm1(2 * log_alpha)).sqrt()
    lam = log_alpha - sigma.log()
    assert_close(f"{name} log_alpha", log_alpha, stored.pop(f"{name}.log_alpha"))
    assert_close(f"{name} std", sigma, stored.pop(f"{name}.std"))
    # The published lambda takes 1 - alpha^2 in float32, of which little is left near the data.
    floor = (2 * FLOAT32_EPS / sigma**2).max().item()
    assert_close(f"{name} lambda", lam, stored.pop(f"{name}.lambda"), floor=floor)
    inverse = schedule.time_of_log_alpha(0.5 * torch.nn.functional.logsigmoid(2 * lam))
    assert_close(f"{name} inverse", inverse, s, of_max=1e-9)
    assert_close(f"{name} inverse_lambda", inverse, stored.pop(f"{name}.inverse_lambda"))


@parity_kind("uvit.losses")
def check_losses(fixture, case):
    stored = fixture.tensors
    x1, x0, u = stored["x0"], stored["noise"], stored["u_rand"]
    for name, prediction in (("noise_pred", "noise"), ("x0_pred", "data")):
        process, toy = VariancePreserving(prediction=prediction), continuous_toy(fixture)
        loss = process.loss(toy, x1, x0, process.sample_time(u))
        assert_close(f"{name} net time", toy.times[0], stored[f"cont.{name}.net_time"])
        assert_close(f"{name} xt", toy.states[0], stored[f"cont.{name}.xt"])
        assert_close(f"{name} loss", loss, stored[f"cont.{name}.loss"])
    process, toy = StableDiffusion(), discrete_toy(fixture)
    n = stored["disc.n"]
    u = (n - 0.5) / 1000
    t = process.sample_time(u)
    loss = process.loss(toy, x1, x0, t)
    assert torch.equal(toy.times[0], n.float())
    assert_close("xn", toy.states[0], stored["disc.xn"])
    assert_close("disc loss", loss, stored["disc.loss"])


@parity_kind("uvit.euler_maruyama")
def check_euler_maruyama(fixture, case):
    stored, meta = fixture.tensors, fixture.meta
    sampler = SdeSampler(
        "Euler",
        meta["steps"],
        diffusion_form="SBDM",
        diffusion_norm=0.0 if meta["ode"] else 1.0,
        last_step="Mean",
        last_step_size=meta["eps"],
    )
    process = VariancePreserving()
    for dtype, want in ((torch.float32, stored["trace"]), (torch.float64, stored["final_f64"][None])):
        toy = continuous_toy(fixture)
        got = sampler.sample(
            process,
            toy,
            stored["x_init"].to(dtype),
            noise=lambda k, x: stored["noise"][k],
            return_trajectory=True,
        )
        exact = dtype == torch.float64
        assert_close("net_time", torch.stack(toy.times), stored["net_time"])
        assert_close(
            f"states {dtype}",
            got[-1:] if exact else got,
            want if exact else want[1:],
            of_max=1e-9 if exact else 1e-4,
        )


def dpm_sampler(kwargs, method, grid):
    variant = "fast_equal_spans" if kwargs.get("fast_version") else "singlestep"
    if kwargs.get("adaptive_step_size"):
        variant = "adaptive"
    return DpmSolver(
        method,
        kwargs.get("method", variant),
        kwargs.get("steps", 50),
        kwargs.get("order", 3),
        kwargs.get("skip_type", grid),
        kwargs.get("solver_type", "dpm_solver"),
        lower_order_final=kwargs.get("lower_order_final", False),
        interval=(0.0, 1 - kwargs["eps"]),
        coupled=True,
        last_step=False,
    )


def check_dpm(fixture, process, toy, sampler, exact):
    stored, meta = fixture.tensors, fixture.meta
    floor = 4 * meta["f32_minus_f64"]
    for dtype in (torch.float32, torch.float64):
        net = toy(fixture)
        got = sampler.sample(process, net, stored["x_init"].to(dtype))
        assert sampler.num_function_evaluations == meta["nfe"]
        times, states = torch.stack(net.times), torch.stack(net.states)
        # The stored times went through lambda in float32 and back (see check_dpm_schedule).
        assert_close("net times", times, stored["calls.net_time"], floor=0.2 if exact else floor)
        assert_close("states", states, stored["calls.x"], floor=floor)
        assert_close("final", got, stored["final"], floor=floor)
    assert_close("final, float64", got, stored["final_f64"], of_max=1e-9 if exact else 1e-6)


@parity_kind("uvit.dpm_continuous")
def check_dpm_continuous(fixture, case):
    kwargs = fixture.meta["sample_kwargs"]
    sampler = dpm_sampler(kwargs, "dpm_solver", "logSNR")
    check_dpm(fixture, VariancePreserving(), continuous_toy, sampler, True)


@parity_kind("uvit.dpm_discrete")
def check_dpm_discrete(fixture, case):
    method = "dpm_solver++" if fixture.meta["predict_x0"] else "dpm_solver"
    sampler = dpm_sampler({"method": "fast", **fixture.meta["sample_kwargs"]}, method, "time_uniform")
    check_dpm(fixture, StableDiffusion(), discrete_toy, sampler, False)
