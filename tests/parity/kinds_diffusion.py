"""DiT's Gaussian diffusion, U-ViT's schedules and losses, and all samplers of both, on networks with closed forms."""

import math
import re
from types import SimpleNamespace

import pytest
import torch

from tests.assertions import GRADIENT_RTOL_OF_MAX, assert_close
from tests.parity.harness import parity_kind
from zigflow.codec import IdentityCodec
from zigflow.keyed import _Active
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


def gaussian_settings(fixture, learn_sigma=None):
    """Keywords of Gaussian from the published ``create_diffusion`` options; its defaults where none are told.

    Args:
        learn_sigma: what the network says of it, where there is one.
    """
    meta = fixture.meta
    options = {k: meta["create_diffusion"][k] for k in meta.get("create_diffusion", {})}
    options.pop("timestep_respacing", None)
    learned = options.pop("learn_sigma", True) if learn_sigma is None else learn_sigma
    small, kl = options.pop("sigma_small", False), options.pop("use_kl", False)
    rescaled = options.pop("rescale_learned_sigmas", False)
    schedule = options.pop("noise_schedule", None) or meta.get("schedule", "linear")
    settings = {
        "betas": schedule,
        "num_steps": options.pop("diffusion_steps", None) or steps_of(fixture),
        "prediction": "data" if options.pop("predict_xstart", False) else "noise",
        "variance": "learned_range" if learned else "fixed_small" if small else "fixed_large",
        "loss": "rescaled_kl" if kl else "rescaled_mse" if rescaled else "mse",
    }
    assert not options, (
        f"{fixture.path.name}: create_diffusion has {sorted(options)}, which nothing here reads"
    )
    return settings


def steps_of(fixture):
    """The number of diffusion steps by its key or in the prose; both say nothing of it where it is the default."""
    told = re.search(r"create_diffusion\([^)]*\),? (\d+) steps|betas \S+ x ?(\d+)", fixture.prose)
    return fixture.meta.get("diffusion_steps", int(told[1] or told[2]) if told else 1000)


def gaussian_process(fixture, learn_sigma=None, **more):
    return Gaussian(**{**gaussian_settings(fixture, learn_sigma), **more})


def gaussian_toy(fixture, learned=None):
    settings = gaussian_settings(fixture)
    alphas_bar = torch.cumprod(1 - BETAS.get(settings["betas"])(settings["num_steps"]), 0)
    learned = settings["variance"] == "learned_range" if learned is None else learned

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
    """Tables named "{schedule}{N}.{quantity}", "get_beta.{schedule}" and "spaced.{spacing}.{quantity}"."""
    meta, stored, schedules = fixture.meta, fixture.tensors, set()
    for key in stored:
        name, _, quantity = key.rpartition(".")
        if name == "get_beta":
            assert_close(key, BETAS.get(quantity)(len(stored[key])), stored[key], of_max=1e-9)
        elif not name.startswith("spaced."):
            # A name may end in a number: "warmup10" of 40 steps is "warmup1040".
            steps = len(stored[key])
            schedule = name.removesuffix(str(steps))
            assert schedule != name, f"{key} has {steps} steps"
            schedules.add((schedule, steps))
            chain = Gaussian(schedule, steps).chain()
            assert_close(key, getattr(chain, TABLES[quantity]), stored[key], of_max=1e-9)
    process = Gaussian(meta.get("schedule", "linear"), meta.get("diffusion_steps", 1000))
    total = process.num_steps
    for spacing, steps in meta["space_timesteps"].items():
        assert spaced_steps(total, spacing) == steps, spacing
        chain = process.chain(spacing)
        assert ((1 - chain.times) * total - 1).round().long().tolist() == steps
        for quantity in fixture.names(f"spaced.{spacing}."):
            want = stored[f"spaced.{spacing}.{quantity}"]
            assert_close(f"{spacing} {quantity}", getattr(chain, TABLES[quantity]), want, of_max=1e-9)
    for spacing in meta.get("errors", {}):
        with pytest.raises(ValueError, match="spacing"):
            spaced_steps(total, spacing)


@parity_kind("dit.diffusion_core")
def check_core(fixture, case):
    stored = fixture.tensors
    x1, x0, step = stored["x0"], stored["noise"], stored["t"]
    schedule = gaussian_settings(fixture)["betas"]
    steps = gaussian_settings(fixture)["num_steps"]
    process = Gaussian(schedule, steps)
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
    check_core_losses(fixture, (schedule, steps), x1, x0, t)
    raw = gaussian_toy(fixture, learned=True)(x_t, step.float())
    check_core_steps(fixture, (schedule, steps), chain, raw, x_t, step)
    for count in fixture.numbered("spaced"):
        spaced = Gaussian(schedule, steps, variance="learned_range", respacing=count)
        times = spaced.chain(count).times[stored[f"spaced{count}.t"]].float()
        toy = gaussian_toy(fixture, learned=True)
        terms = spaced.loss_terms(toy, x1, x0, times)
        assert torch.equal(toy.times[0].long(), stored[f"spaced{count}.model_t"])
        for key in fixture.names(f"spaced{count}.loss."):
            assert_close(f"spaced{count} {key}", terms[key], stored[f"spaced{count}.loss.{key}"])
    means, scales = 0.3 * stored["q_sample"], 0.1 * x0 - 2
    decoded = discretized_log_likelihood(x1, means, scales)
    assert_close("discretized_loglik", decoded, stored["vb_t0.discretized_loglik"])
    kl = gaussian_kl(x1, 0.1 * x0, stored["q_sample"], 0.2 * x0 - 1)
    assert_close("normal_kl", kl, stored["normal_kl"])


CORE_LOSSES = {
    "mse_learned_range": {"variance": "learned_range"},
    "rescaled_mse": {"variance": "learned_range", "loss": "rescaled_mse"},
    "rescaled_kl": {"variance": "learned_range", "loss": "rescaled_kl"},
    "kl_learned_range": {"variance": "learned_range", "loss": "kl"},
    "fixed_large_mse": {"variance": "fixed_large"},
    "fixed_small_mse": {"variance": "fixed_small"},
    "xstart_mse": {"variance": "fixed_large", "prediction": "data"},
    "fixed_small_kl": {"variance": "fixed_small", "loss": "rescaled_kl"},
    "fixed_large_kl": {"variance": "fixed_large", "loss": "rescaled_kl"},
}


def check_core_losses(fixture, table, x1, x0, t):
    stored = fixture.tensors
    names = dict.fromkeys(key.split(".")[0] for key in fixture.names("loss."))
    assert names and set(names) <= set(CORE_LOSSES), f"losses {sorted(set(names) - set(CORE_LOSSES))}"
    for name in names:
        gradient = stored[f"loss.{name}.grad_mean_loss_wrt_model_output"]
        output = stored["raw_model_output"][:, : gradient.shape[1]].clone().requires_grad_()
        terms = Gaussian(*table, **CORE_LOSSES[name]).loss_terms(lambda x, t, y, o=output: o, x1, x0, t)
        for key in fixture.names(f"loss.{name}."):
            if key != "grad_mean_loss_wrt_model_output":
                assert_close(f"{name} {key}", terms[key], stored[f"loss.{name}.{key}"])
        (got,) = torch.autograd.grad(terms["loss"].mean(), output)
        assert_close(f"{name} gradient", got, gradient, of_max=GRADIENT_RTOL_OF_MAX)


def check_core_steps(fixture, table, chain, raw, x_t, step):
    """ "pmv.{learned or fixed_...}[.clip0 or .clip1].{quantity}": the model's step of the chain."""
    stored = fixture.tensors
    names = dict.fromkeys(key.rpartition(".")[0] for key in fixture.names("pmv."))
    for name in names:
        variance_name, _, clip = name.partition(".")
        learned = variance_name == "learned"
        process = Gaussian(*table, variance="learned_range" if learned else variance_name)
        output, logits = raw.chunk(2, 1)
        mean, log_variance, data = process.backward_step(
            chain,
            output,
            logits if learned else None,
            x_t,
            step,
            clip={"": False, "clip0": False, "clip1": True}[clip],
        )
        got = {
            "mean": mean,
            "log_variance": log_variance,
            "pred_xstart": data,
            "variance": log_variance.exp(),
        }
        if variance_name == "fixed_small":
            # At step 0 the published pair disagrees: variance 0 beside the log variance of step 1.
            got["variance"] = chain.at(chain.posterior_variance, step, x_t).expand_as(x_t)
        for key in fixture.names(f"pmv.{name}."):
            assert_close(f"{name} {key}", got[key], stored[f"pmv.{name}.{key}"])


@parity_kind("dit.sampler")
def check_sampler(fixture, case):
    meta, stored = fixture.meta, fixture.tensors
    process = gaussian_process(fixture)
    sampler = ChainSampler(meta["kind"], meta["respacing"], meta["eta"], meta["clip_denoised"])
    # The published code draws noise where none is needed, too.
    assert stored["noise"].shape == stored["samples"].shape
    for dtype in (torch.float32, torch.float64):
        toy = gaussian_toy(fixture)
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
        logits = torch.zeros_like(output) if process.variance == "learned_range" else None
        data.append(process.backward_step(chain, output, logits, x, step, meta["clip_denoised"])[2])
    assert_close("pred_xstart", torch.stack(data), stored["pred_xstart"])


@parity_kind("dit.reverse_bpd")
def check_reverse_bpd(fixture, case):
    stored, spacing = fixture.tensors, fixture.meta["respacing"]
    process, toy = gaussian_process(fixture), gaussian_toy(fixture)
    sampler = ChainSampler("ddim", spacing, clip_denoised=fixture.flag("clip_denoised"))
    got = sampler.encode(process, toy, stored["x0"], return_trajectory=True)
    assert_close("reverse", got, stored["reverse"])
    for dtype in (torch.float32, torch.float64):
        bound = variational_bound(
            process, toy, stored["x0"].to(dtype), spacing=spacing, noise=lambda k, x: stored["noise"][k]
        )
        got = {
            "total_bpd": bound.total,
            "prior_bpd": bound.prior,
            "vb": bound.terms,
            "xstart_mse": bound.data_error,
            "mse": bound.noise_error,
        }
        for key in fixture.names("bpd."):
            # The prior's term is what cancellation leaves of terms of order 1.
            floor = 2 * FLOAT32_EPS / math.log(2) if key == "prior_bpd" else 0.0
            assert_close(f"{key} {dtype}", got[key], stored[f"bpd.{key}"], floor=floor)
    exact = prior_bits(process, spacing, stored["x0"])
    assert_close("prior_bpd by its formula", bound.prior, exact, of_max=1e-9, floor=1e-15)


def prior_bits(process, spacing, x1):
    """KL(q(x_T | x_1) || N(0, 1)) in bits per dimension, in float64."""
    alpha_bar = process.chain(spacing).alphas_bar[-1]
    nats = 0.5 * (alpha_bar * x1.double() ** 2 - alpha_bar - torch.log1p(-alpha_bar))
    return nats.mean(tuple(range(1, x1.ndim))) / math.log(2)


@parity_kind("uvit.schedules")
def check_schedules(fixture, case):
    check_sdes(fixture)
    schedules = {"dpm.linear": LinearBeta(), "dpm.cosine": Cosine(), "disc": sd_table()}
    for name in dict.fromkeys(
        k.rpartition(".")[0] for k in fixture.tensors if k.startswith(("dpm.", "disc."))
    ):
        check_dpm_schedule(fixture, name, schedules[name])
    stored = fixture.tensors
    total = len(stored["sd.betas"]) if "sd.betas" in stored else 1000
    process = StableDiffusion(num_steps=total)
    clean, chain = torch.ones(1, dtype=torch.float64), process.chain()
    got = {
        "betas": BETAS.get("scaled_linear")(total),
        "cum_alphas": torch.cat([clean, chain.alphas_bar]),
        "cum_betas": torch.cat([clean * 0, 1 - chain.alphas_bar]),
    }
    for name in fixture.names("sd."):
        if name.startswith("tilde_beta_s_t_"):
            got[name] = skipped_variances(chain, [int(n) for n in re.findall(r"\d+", name)])
        assert_close(f"sd.{name}", got[name], stored[f"sd.{name}"], of_max=1e-9)


def skipped_variances(chain, places):
    """The posterior variances from one of three steps to another, n = 1..N, 0 being the data: a to b, b - 1 to b, b
    to c."""
    a, b, c = places
    pairs = [(a, b), (b - 1, b), (b, c)]
    skips = [[n - 1 for n in pair if n > 0] for pair in pairs]
    chains = [Chain(chain.times[kept], chain.alphas_bar[kept]) for kept in skips]
    return torch.stack([skip.posterior_variance[-1] for skip in chains])


def sd_table():
    return Table(BETAS.get("scaled_linear")(1000))


def check_sdes(fixture):
    stored = fixture.tensors
    if "t" not in stored:
        return
    s = stored["t"].double()
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
        for key in fixture.names(f"{name}."):
            want = stored[f"{name}.{key}"]
            if match := re.fullmatch(r"skip_alpha_([\d.]+)_t", key):
                first = torch.tensor(1 - float(match[1]), dtype=torch.float64)
                skip = (path.alpha(1 - s) / path.alpha(first)) ** 2
                assert_close(f"{name} {key}", skip[inner], want[inner])
                continue
            value, want = got[key], want[inner]
            if key in ("snr", "nsr"):
                # float32 took 1 - alpha_bar or alpha_bar with an absolute error, which the quotient magnifies.
                least = (1 - alphas_bar if key == "snr" else alphas_bar)[inner]
                worst = (value[inner] * 4 * FLOAT32_EPS / least).max().item()
                assert_close(f"{name} {key}", value[inner], want, floor=worst)
            else:
                assert_close(f"{name} {key}", value[inner], want)


def check_dpm_schedule(fixture, name, schedule):
    stored = fixture.under(f"{name}.")
    s = stored.pop("t").double()
    log_alpha = schedule.log_alpha(s)
    sigma = (-torch.expm1(2 * log_alpha)).sqrt()
    lam = log_alpha - sigma.log()
    # The published lambda takes 1 - alpha^2 in float32, of which little is left near the data.
    floor = (2 * FLOAT32_EPS / sigma**2).max().item()
    inverse = schedule.time_of_log_alpha(0.5 * torch.nn.functional.logsigmoid(2 * lam))
    assert_close(f"{name} inverse", inverse, s, of_max=1e-9)
    got = {"log_alpha": log_alpha, "std": sigma, "lambda": lam, "inverse_lambda": inverse}
    for key, want in stored.items():
        assert_close(f"{name} {key}", got[key], want, floor=floor if key == "lambda" else 0.0)


@parity_kind("uvit.losses")
def check_losses(fixture, case):
    stored = fixture.tensors
    x1, x0 = stored["x0"], stored["noise"]
    for name in dict.fromkeys(key.split(".")[0] for key in fixture.names("cont.")):
        process = VariancePreserving(prediction={"noise_pred": "noise", "x0_pred": "data"}[name])
        toy = continuous_toy(fixture)
        loss = process.loss(toy, x1, x0, process.sample_time(stored["u_rand"]))
        got = {"net_time": toy.times[0], "xt": toy.states[0], "loss": loss}
        for key in fixture.names(f"cont.{name}."):
            assert_close(f"{name} {key}", got[key], stored[f"cont.{name}.{key}"])
    if "disc.n" in stored:
        process, toy = StableDiffusion(), discrete_toy(fixture)
        n = stored["disc.n"]
        t = process.sample_time((n - 0.5) / process.steps)
        loss = process.loss(toy, x1, x0, t)
        assert torch.equal(toy.times[0], n.float())
        assert_close("xn", toy.states[0], stored["disc.xn"])
        assert_close("disc loss", loss, stored["disc.loss"])
    for scale in fixture.names("vae.z_"):
        batch = SimpleNamespace(moments=stored["vae.moments"], latents=None, pixels=None)
        with _Active(StoredNoise(stored["vae.noise"])):
            got = IdentityCodec(scale=float(scale)).encode(batch)
        assert_close(f"latents of scale {scale}", got, stored[f"vae.z_{scale}"])


class StoredNoise:
    """The stored normals in place of keyed ones."""

    def __init__(self, noise):
        self.noise = noise

    def normal(self, purpose, shape=()):
        assert purpose == "codec.encode"
        return self.noise


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
        assert torch.equal(stored["final"], stored["trace"][-1])
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
        interval=(1 - kwargs.get("T", 1.0), 1 - kwargs["eps"]),
        lower_order_final=kwargs.get("lower_order_final", False),
        coupled=True,
        last_step=False,
        **{name: kwargs[name] for name in ("atol", "rtol") if name in kwargs},
    )


def check_dpm(fixture, process, toy, sampler, exact):
    stored, meta = fixture.tensors, fixture.meta
    if sampler.variant == "adaptive":
        check_dpm_adaptive(fixture, process, toy, sampler)
        return
    floor = 4 * meta["f32_minus_f64"]
    # The published inverse of this grid's times is looked up in a table of 10^7 times.
    of_max = 1e-6 if sampler.grid == "time_quadratic" else 1e-9 if exact else 1e-6
    for dtype in (torch.float32, torch.float64):
        net = toy(fixture)
        got = sampler.sample(process, net, stored["x_init"].to(dtype))
        assert sampler.num_function_evaluations == meta["nfe"]
        times, states = torch.stack(net.times), torch.stack(net.states)
        # The stored times went through lambda in float32 and back (see check_dpm_schedule).
        assert_close("net times", times, stored["calls.net_time"], floor=0.2 if exact else floor)
        assert_close("states", states, stored["calls.x"], floor=floor)
        assert_close("final", got, stored["final"], floor=floor)
    assert_close("final, float64", got, stored["final_f64"], of_max=of_max)


def check_dpm_adaptive(fixture, process, toy, sampler):
    """The first step goes with E^(-1 / order) of an error E that float32 moves by 0.7 %, and whether a step is accepted
    may turn on noise of 2^-24: a walk that agrees is compared loosely, the end with a fine solution in float64."""
    stored, meta = fixture.tensors, fixture.meta
    x0, times, states = stored["x_init"], stored["calls.net_time"], stored["calls.x"]
    fine = DpmSolver(
        sampler.method,
        "singlestep",
        600,
        3,
        "logSNR",
        interval=sampler.interval,
        coupled=True,
        last_step=False,
    ).sample(process, toy(fixture), x0.double())
    largest = fine.abs().max().item()
    published = max((stored[name].double() - fine).abs().max().item() for name in ("final", "final_f64"))
    assert published <= 0.1 * largest + 4 * meta["f32_minus_f64"]
    assert meta["nfe"] == len(times) == len(states)
    for dtype in (torch.float32, torch.float64):
        net = toy(fixture)
        got = sampler.sample(process, net, x0.to(dtype))
        own = torch.stack(net.times)
        assert sampler.num_function_evaluations == len(own)
        if own.shape == times.shape and (own - times).abs().max() <= 1.0:
            assert_close("states", torch.stack(net.states), states, of_max=1e-3)
        assert_close("end", got, fine, floor=max(1.5 * published, 1e-3 * largest))


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
