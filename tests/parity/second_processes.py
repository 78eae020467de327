"""Second fixtures of processes and samplers, by their formulas in float64; see make_second_fixtures.py."""

import itertools
import json
import math
import zlib
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor


class Maker:
    """Writes fixtures into a folder, and remembers their kinds."""

    def __init__(self, folder: Path):
        self.folder, self.kinds = folder, set()
        folder.mkdir(parents=True, exist_ok=True)

    def seed(self, name: str) -> int:
        return zlib.crc32(name.encode())

    def read(self, name: str) -> dict:
        """The JSON of a fixture that is written."""
        return json.loads((self.folder / f"{name}.json").read_text())

    def write(
        self, name: str, meta: dict, tensors: dict[str, Tensor] | None = None, listed: bool = False
    ) -> None:
        self.kinds.add(meta["fixture_kind"])
        if tensors is not None:
            tensors = {k: v.detach().contiguous().clone() for k, v in tensors.items()}
            save_file(tensors, self.folder / f"{name}.safetensors")
            if listed:
                meta = {**meta, "tensors": {k: [list(v.shape), str(v.dtype)[6:]] for k, v in tensors.items()}}
        (self.folder / f"{name}.json").write_text(json.dumps(meta))


def noise_of(x: Tensor, alpha: Tensor | float, sigma: Tensor | float, mu: Tensor, sd: float) -> Tensor:
    """The stand-in network of the stored cases."""
    return sigma * (x - alpha * mu) / (alpha**2 * sd**2 + sigma**2) + 0.05 * sigma * torch.sin(2 * x)


def linear_betas(steps: int) -> Tensor:
    scale = 1000 / steps
    return torch.tensor(
        [scale * (1e-4 + (0.02 - 1e-4) * i / (steps - 1)) for i in range(steps)], dtype=torch.float64
    )


def cosine_betas(steps: int) -> Tensor:
    bar = lambda t: math.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2  # noqa: E731
    return torch.tensor(
        [min(1 - bar((i + 1) / steps) / bar(i / steps), 0.999) for i in range(steps)], dtype=torch.float64
    )


def spread(steps: int, count: int) -> list[int]:
    """So many of the steps, both ends among them."""
    return [round(i * (steps - 1) / (count - 1)) for i in range(count)]


def tables(maker: Maker) -> None:
    """Other lengths of both schedules, another spacing."""
    tensors = {}
    for name, betas in (("linear40", linear_betas(40)), ("squaredcos_cap_v212", cosine_betas(12))):
        bars = torch.cumprod(1 - betas, 0)
        before = torch.cat([torch.ones(1).double(), bars[:-1]])
        variance = betas * (1 - before) / (1 - bars)
        tensors |= {
            f"{name}.betas": betas, f"{name}.alphas_cumprod": bars, f"{name}.posterior_variance": variance,
            f"{name}.posterior_mean_coef1": betas * before.sqrt() / (1 - bars),
        }  # fmt: skip
    tensors["get_beta.const"] = torch.full((7,), 0.02, dtype=torch.float64)
    maker.write("tables", {
        "fixture_kind": "dit.diffusion_tables", "space_timesteps": {"5": spread(200, 5), "ddim4": [0, 50, 100, 150]},
        "diffusion_steps": 200, "errors": {"201": "too many"},
    }, tensors)  # fmt: skip


def ancestral(maker: Maker) -> None:
    """DDPM with the small fixed variance of a network that predicts the data, over a cosine table of 50 steps."""
    steps, count, sd = 50, 4, 0.7
    torch.manual_seed(maker.seed("ancestral"))
    bars = torch.cumprod(1 - cosine_betas(steps), 0)
    kept = spread(steps, count)
    short = bars[kept]
    before = torch.cat([torch.ones(1).double(), short[:-1]])
    betas = 1 - short / before
    variance = betas * (1 - before) / (1 - short)
    mu, x = torch.randn(1, 2, 3, 3), torch.randn(2, 2, 3, 3)
    start, noises, samples, predicted, called = x, [], [], [], []
    x = x.double()
    for place in reversed(range(count)):
        bar = bars[kept[place]]
        data = noise_of(x, bar.sqrt(), (1 - bar).sqrt(), mu.double(), sd).clamp(-1, 1)
        noise = torch.randn(start.shape)
        mean = (
            betas[place] * before[place].sqrt() * data + (1 - before[place]) * (1 - betas[place]).sqrt() * x
        ) / (1 - short[place])
        x = mean + (place > 0) * variance[place].sqrt() * noise.double()
        noises, samples, predicted = [*noises, noise], [*samples, x.float()], [*predicted, data.float()]
        called.append([kept[place]] * 2)
    maker.write("ancestral", {
        "fixture_kind": "dit.sampler", "sd": sd, "respacing": str(count), "kind": "ddpm", "eta": 0.0,
        "schedule": "squaredcos_cap_v2", "clip_denoised": True,
        "create_diffusion": {
            "learn_sigma": False, "sigma_small": True, "predict_xstart": True, "diffusion_steps": steps,
        },
    }, {
        "toy.mu": mu, "x_T": start, "noise": torch.stack(noises), "samples": torch.stack(samples),
        "pred_xstart": torch.stack(predicted), "model_t": torch.tensor(called),
    })  # fmt: skip


def backwards(maker: Maker) -> None:
    """DDIM from data to noise and the terms of the bound, of a network with a fixed variance on a cosine table."""
    count, sd, ln2 = 3, 0.6, math.log(2)
    torch.manual_seed(maker.seed("backwards"))
    bars = torch.cumprod(1 - cosine_betas(1000), 0)
    kept = spread(1000, count)
    short = bars[kept]
    before = torch.cat([torch.ones(1).double(), short[:-1]])
    betas = 1 - short / before
    variance = betas * (1 - before) / (1 - short)
    log_variance = torch.cat([variance[1:2], variance[1:]]).log()
    wide = torch.cat([variance[1:2], betas[1:]]).log()
    mu, x1 = torch.randn(1, 1, 2, 2), torch.randn(2, 1, 2, 2).clamp(-0.9, 0.9)
    net = lambda x, place: noise_of(x, short[place].sqrt(), (1 - short[place]).sqrt(), mu.double(), sd)  # noqa: E731
    after = torch.cat([short[1:], torch.zeros(1).double()])
    x, reverse = x1.double(), []
    for place in range(count - 1):
        eps = net(x, place)
        data = ((x - (1 - short[place]).sqrt() * eps) / short[place].sqrt()).clamp(-1, 1)
        eps = (x - short[place].sqrt() * data) / (1 - short[place]).sqrt()
        x = after[place].sqrt() * data + (1 - after[place]).sqrt() * eps
        reverse.append(x.float())
    mean_over = lambda v: v.mean((1, 2, 3))  # noqa: E731
    cdf = lambda z: 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)))  # noqa: E731
    noises, vb, data_error, noise_error = [], [], [], []
    for place in reversed(range(count)):
        noise = torch.randn(x1.shape)
        x_t = short[place].sqrt() * x1.double() + (1 - short[place]).sqrt() * noise.double()
        eps = net(x_t, place)
        data = ((x_t - (1 - short[place]).sqrt() * eps) / short[place].sqrt()).clamp(-1, 1)
        front = betas[place] * before[place].sqrt() / (1 - short[place])
        back = (1 - before[place]) * (1 - betas[place]).sqrt() / (1 - short[place])
        gap = front * (x1.double() - data)
        if place:
            kl = 0.5 * (-1 + wide[place] - log_variance[place] + (log_variance[place] - wide[place]).exp()
                        + gap**2 * (-wide[place]).exp())  # fmt: skip
            vb.append(mean_over(kl) / ln2)
        else:
            centered, inverse = x1.double() - front * data - back * x_t, (-0.5 * wide[0]).exp()
            mass = cdf(inverse * (centered + 1 / 255)) - cdf(inverse * (centered - 1 / 255))
            vb.append(-mean_over(mass.clamp(min=1e-12).log()) / ln2)
        data_error.append(mean_over((data - x1.double()) ** 2))
        back_noise = (x_t - short[place].sqrt() * data) / (1 - short[place]).sqrt()
        noise_error.append(mean_over((back_noise - noise.double()) ** 2))
        noises.append(noise)
    last = short[-1]
    prior = mean_over(0.5 * (last * x1.double() ** 2 - last - torch.log1p(-last))) / ln2
    columns = {"vb": vb, "xstart_mse": data_error, "mse": noise_error}
    tensors = {f"bpd.{k}": torch.stack(v, 1).float() for k, v in columns.items()}
    maker.write("backwards", {
        "fixture_kind": "dit.reverse_bpd", "sd": sd, "respacing": str(count), "schedule": "squaredcos_cap_v2",
        "create_diffusion": {"learn_sigma": False}, "clip_denoised": True,
    }, tensors | {
        "toy.mu": mu, "x0": x1, "reverse": torch.stack(reverse), "noise": torch.stack(noises),
        "bpd.prior_bpd": prior.float(), "bpd.total_bpd": (prior + torch.stack(vb, 1).sum(1)).float(),
    })  # fmt: skip


def euler_maruyama(maker: Maker) -> None:
    """Both equations of the VP-SDE with other steps and another end."""
    for ode, steps, eps, sd in ((True, 4, 0.01, 0.8), (False, 3, 0.002, 0.4)):
        name = f"euler_{'ode' if ode else 'sde'}"
        torch.manual_seed(maker.seed(name))
        mu, start = torch.randn(1, 2, 2, 2), torch.randn(3, 2, 2, 2)
        grid = [0.0, *(eps + (1 - eps) * i / (steps - 1) for i in range(steps))]
        x, trace, times, noises = start.double(), [start], [], []
        for t, s in zip(grid[:0:-1], grid[-2::-1], strict=True):
            beta, log_bar = 0.1 + 19.9 * t, -(0.1 * t + 9.95 * t**2)
            alpha, sigma = math.exp(log_bar / 2), math.sqrt(-math.expm1(log_bar))
            net = noise_of(x, alpha, sigma, mu.double(), sd)
            drift = -0.5 * beta * x + (0.5 if ode else 1.0) * beta * net / sigma
            noise = torch.randn(start.shape)
            x = x + drift * (s - t)
            if not ode and s > 0:
                x = x + math.sqrt(beta * (t - s)) * noise.double()
            trace, noises, times = [*trace, x.float()], [*noises, noise], [*times, [999 * t] * 3]
        maker.write(name, {"fixture_kind": "uvit.euler_maruyama", "sd": sd, "steps": steps, "eps": eps, "ode": ode}, {
            "toy.mu": mu, "x_init": start, "noise": torch.stack(noises), "trace": torch.stack(trace),
            "net_time": torch.tensor(times), "final": x.float(), "final_f64": x,
        })  # fmt: skip


def sd_bars(steps: int = 1000) -> Tensor:
    first, last = math.sqrt(0.00085), math.sqrt(0.012)
    betas = torch.tensor(
        [(first + (last - first) * i / (steps - 1)) ** 2 for i in range(steps)], dtype=torch.float64
    )
    return torch.cumprod(1 - betas, 0)


def losses(maker: Maker) -> None:
    """One prediction in continuous time, the discrete loss and latents of another scale."""
    torch.manual_seed(maker.seed("losses"))
    sd, x1, x0, mu = 0.9, torch.randn(2, 1, 3, 3), torch.randn(2, 1, 3, 3), torch.randn(1, 1, 3, 3)
    u, n = torch.tensor([0.2, 0.9]), torch.tensor([1, 777])
    over = lambda v: v.reshape(-1, 1, 1, 1)  # noqa: E731
    log_bar = over(-(0.1 * u.double() + 9.95 * u.double() ** 2))
    alpha, sigma = (log_bar / 2).exp(), (-torch.expm1(log_bar)).sqrt()
    xt = alpha * x1 + sigma * x0
    data_loss = ((noise_of(xt, alpha, sigma, mu.double(), sd) - x1) ** 2).mean((1, 2, 3))
    bar = over(sd_bars()[n - 1])
    xn = bar.sqrt() * x1 + (1 - bar).sqrt() * x0
    disc = ((noise_of(xn, bar.sqrt(), (1 - bar).sqrt(), mu.double(), sd) - x0) ** 2).mean((1, 2, 3))
    moments, noise = torch.randn(1, 4, 2, 2), torch.randn(1, 2, 2, 2)
    moments[0, 2, 0, 0] = 25.0
    latents = moments[:, :2] + (0.5 * moments[:, 2:].clamp(-30, 20)).exp() * noise
    maker.write("losses", {"fixture_kind": "uvit.losses", "sd": sd}, {
        "x0": x1, "noise": x0, "u_rand": u, "toy.mu": mu, "cont.x0_pred.loss": data_loss.float(),
        "cont.x0_pred.xt": xt.float(), "cont.x0_pred.net_time": (999 * u.double()).float(), "disc.n": n,
        "disc.xn": xn.float(), "disc.loss": disc.float(), "vae.moments": moments, "vae.noise": noise,
        "vae.z_0.5": 0.5 * latents,
    })  # fmt: skip


def schedules(maker: Maker) -> None:
    """Another number of times and another skip of the VP-SDE; the table and three of its steps."""
    s = torch.tensor([0.05, 0.4, 0.95])
    log_bar = -(0.1 * s.double() + 9.95 * s.double() ** 2)
    bar, beta, first = log_bar.exp(), 0.1 + 19.9 * s.double(), -(0.1 * 0.6 + 9.95 * 0.36)
    bars = torch.cat([torch.ones(1).double(), sd_bars()])
    skips = [
        (1 - bars[b] / bars[a]) * (1 - bars[a]) / (1 - bars[b]) for a, b in ((0, 40), (39, 40), (40, 1000))
    ]
    maker.write("schedules", {"fixture_kind": "uvit.schedules"}, {
        "t": s, "vpsde.cum_alpha": bar.float(), "vpsde.cum_beta": (1 - bar).float(),
        "vpsde.diffusion": beta.sqrt().float(), "vpsde.drift_of_ones": (-0.5 * beta)[:, None].float(),
        "vpsde.skip_alpha_0.6_t": (log_bar - first).exp().float(), "sd.cum_alphas": bars, "sd.cum_betas": 1 - bars,
        "sd.tilde_beta_s_t_0_40_1000": torch.stack(skips),
    })  # fmt: skip


def first_order(maker: Maker) -> None:
    """DPM-Solver of order 1 on an even grid of times, which is DDIM: in continuous time and on the table."""
    bars = torch.cat([torch.ones(1).double(), sd_bars()])

    def continuous(t: float) -> float:
        return math.exp(-(0.1 * t + 9.95 * t**2))

    def table(t: float) -> float:
        return bars[round(1000 * t)].item()

    plain = {"order": 1, "skip_type": "time_uniform"}
    for name, bar_of, scale, steps, eps, more, meta in (
        ("continuous", continuous, 999, 5, 0.05, {"adaptive_step_size": False, "fast_version": False}, {}),
        ("discrete", table, 1000, 9, 0.1, {"method": "singlestep", "T": 1.0}, {"predict_x0": True}),
    ):
        torch.manual_seed(maker.seed(name))
        sd, mu, start = 0.8, torch.randn(1, 1, 2, 2), torch.randn(2, 1, 2, 2)
        grid = [1 - (1 - eps) * i / steps for i in range(steps + 1)]
        x, times, states = start.double(), [], []
        for t, s in itertools.pairwise(grid):
            bar, after = bar_of(t), bar_of(s)
            net = noise_of(x, math.sqrt(bar), math.sqrt(1 - bar), mu.double(), sd)
            times, states = [*times, [scale * t] * 2], [*states, x.float()]
            x = (
                math.sqrt(after) * (x - math.sqrt(1 - bar) * net) / math.sqrt(bar)
                + math.sqrt(1 - after) * net
            )
        kwargs = {"steps": steps, "eps": eps, **plain, **more}
        maker.write(f"dpm_{name}", {
            "fixture_kind": f"uvit.dpm_{name}", "sd": sd, "sample_kwargs": kwargs, "nfe": steps, "f32_minus_f64": 1e-6,
            **meta,
        }, {
            "toy.mu": mu, "x_init": start, "calls.net_time": torch.tensor(times), "calls.x": torch.stack(states),
            "final": x.float(), "final_f64": x,
        })  # fmt: skip


PROCESSES = (tables, ancestral, backwards, euler_maruyama, losses, schedules, first_order)
