"""A second fixture of DiT's Gaussian diffusion step by step, by its formulas; see make_second_fixtures.py."""

import math

import torch
from torch import Tensor

from tests.parity.second_processes import Maker, cosine_betas, noise_of, spread

LN2 = math.log(2)


class Steps:
    """The tables of a chain of betas (N,), and what they give at steps (B,)."""

    def __init__(self, bars: Tensor):
        self.bars = bars
        self.before = torch.cat([torch.ones(1).double(), bars[:-1]])
        self.betas = 1 - bars / self.before
        self.variance = self.betas * (1 - self.before) / (1 - bars)
        # The first variance is 0, of which the second takes the place.
        self.log_small = torch.cat([self.variance[1:2], self.variance[1:]]).log()
        self.log_large = torch.cat([self.variance[1:2], self.betas[1:]]).log()

    @staticmethod
    def at(table: Tensor, step: Tensor) -> Tensor:
        return table[step].reshape(-1, 1, 1, 1)

    def noised(self, x1: Tensor, x0: Tensor, step: Tensor) -> Tensor:
        bar = self.at(self.bars, step)
        return bar.sqrt() * x1 + (1 - bar).sqrt() * x0

    def data(self, x_t: Tensor, eps: Tensor, step: Tensor) -> Tensor:
        bar = self.at(self.bars, step)
        return (x_t - (1 - bar).sqrt() * eps) / bar.sqrt()

    def mean(self, data: Tensor, x_t: Tensor, step: Tensor) -> Tensor:
        front = self.betas * self.before.sqrt() / (1 - self.bars)
        back = (1 - self.before) * (1 - self.betas).sqrt() / (1 - self.bars)
        return self.at(front, step) * data + self.at(back, step) * x_t

    def log_variance(self, name: str, logits: Tensor | None, step: Tensor) -> Tensor:
        if name == "learned":
            share = (logits + 1) / 2
            return share * self.at(self.betas.log(), step) + (1 - share) * self.at(self.log_small, step)
        return self.at(self.log_large if name == "fixed_large" else self.log_small, step)

    def bits(self, x1: Tensor, x_t: Tensor, step: Tensor, data: Tensor, log_variance: Tensor) -> Tensor:
        """The term (B,) of the variational bound: at step 0 the likelihood of the bin, else a divergence."""
        mean, right = self.mean(data, x_t, step), self.at(self.log_small, step)
        divergence = normal_kl(self.mean(x1, x_t, step), right, mean, log_variance)
        first = (step == 0).reshape(-1, 1, 1, 1)
        return (
            torch.where(first, -bin_likelihood(x1, mean, 0.5 * log_variance), divergence).mean((1, 2, 3))
            / LN2
        )


def normal_kl(mean: Tensor, log_variance: Tensor, other: Tensor, other_log: Tensor) -> Tensor:
    spread_of = (log_variance - other_log).exp() + (mean - other) ** 2 * (-other_log).exp()
    return 0.5 * (-1 + other_log - log_variance + spread_of)


def bin_likelihood(x: Tensor, mean: Tensor, log_scale: Tensor) -> Tensor:
    def cdf(z: Tensor) -> Tensor:
        return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)))

    below, above = (cdf((x - mean + edge) * (-log_scale).exp()) for edge in (-1 / 255, 1 / 255))
    below, above = torch.where(x < -0.999, 0.0, below), torch.where(x > 0.999, 1.0, above)
    return (above - below).clamp(min=1e-12).log()


# Name -> variance, whether the data are predicted, how the bound counts: beside the squared error with its factor, or
# alone times the number of steps.
LOSSES = {
    "mse_learned_range": ("learned", False, "error"),
    "rescaled_mse": ("learned", False, "rescaled_error"),
    "rescaled_kl": ("learned", False, "rescaled_bound"),
    "kl_learned_range": ("learned", False, "bound"),
    "fixed_large_mse": ("fixed_large", False, "error"),
    "fixed_small_mse": ("fixed_small", False, "error"),
    "xstart_mse": ("fixed_large", True, "error"),
    "fixed_small_kl": ("fixed_small", False, "rescaled_bound"),
    "fixed_large_kl": ("fixed_large", False, "rescaled_bound"),
}


def losses_of(
    chain: Steps, name: str, x1: Tensor, x0: Tensor, step: Tensor, output: Tensor
) -> dict[str, Tensor]:
    variance, of_data, kind = LOSSES[name]
    x_t, channels = chain.noised(x1, x0, step), x1.shape[1]
    value, logits = output[:, :channels], output[:, channels:]
    moved = value.detach() if kind.endswith("error") else value
    data = moved if of_data else chain.data(x_t, moved, step)
    bound = chain.bits(x1, x_t, step, data, chain.log_variance(variance, logits, step))
    if kind.endswith("bound"):
        return {"loss": bound * (len(chain.bars) if kind == "rescaled_bound" else 1), "vb": bound}
    error = ((value - (x1 if of_data else x0)) ** 2).mean((1, 2, 3))
    if variance != "learned":
        return {"loss": error, "mse": error}
    bound = bound * (len(chain.bars) / 1000 if kind == "rescaled_error" else 1)
    return {"loss": error + bound, "mse": error, "vb": bound}


def core(maker: Maker) -> None:
    """A cosine table of 60 steps, both ends of it, data at the edges of the bins, another spacing and every loss."""
    steps, count, sd, shape = 60, 5, 0.8, (4, 2, 3, 3)
    chain = Steps(torch.cumprod(1 - cosine_betas(steps), 0))
    # Float32 says nothing of a bin's mass in the upper tail: the data are near the means, those in the last bins too.
    x1, x0, mu = (
        torch.randn(shape).clamp(-0.1, 0.1),
        torch.randn(shape).clamp(-0.6, 0.6),
        torch.randn(1, *shape[1:]),
    )
    x1[3, :, 0, 0], x0[3, :, 0, 0] = torch.tensor([1.0, -1.0]), torch.tensor([3.0, -3.0])
    step = torch.tensor([0, 1, 31, 59])
    d1, d0 = x1.double(), x0.double()
    x_t = chain.noised(d1, d0, step)
    bar = chain.at(chain.bars, step)

    def toy(x: Tensor, bar: Tensor) -> Tensor:
        eps = noise_of(x, bar.sqrt(), (1 - bar).sqrt(), mu.double(), sd)
        return torch.cat([eps, 0.5 * torch.tanh(x) - 0.2], 1)

    tensors = {
        "x0": x1, "noise": x0, "t": step, "toy.mu": mu, "q_sample": x_t, "q_post.mean": chain.mean(d1, x_t, step),
        "q_post.var": chain.at(chain.variance, step).expand(shape), "q.mean": bar.sqrt() * d1,
        "q_post.logvar": chain.at(chain.log_small, step).expand(shape), "q.var": (1 - bar).expand(shape),
        "q.logvar": (1 - bar).log().expand(shape),
        "vb_t0.discretized_loglik": bin_likelihood(d1, 0.3 * x_t, 0.1 * d0 - 2),
        "normal_kl": normal_kl(d1, 0.1 * d0, x_t, 0.2 * d0 - 1),
    }  # fmt: skip
    raw = torch.randn(4, 4, 3, 3)
    tensors["raw_model_output"] = raw
    for name, (variance, *_) in LOSSES.items():
        output = (raw if variance == "learned" else raw[:, :2]).double().requires_grad_()
        terms = losses_of(chain, name, d1, d0, step, output)
        (gradient,) = torch.autograd.grad(terms["loss"].mean(), output)
        tensors |= {f"loss.{name}.{k}": v for k, v in terms.items()}
        tensors[f"loss.{name}.grad_mean_loss_wrt_model_output"] = gradient
    eps, logits = toy(x_t, bar).chunk(2, 1)
    for name, clip in (
        ("learned.clip0", 0),
        ("learned.clip1", 1),
        ("fixed_small", 0),
        ("fixed_large.clip1", 1),
    ):
        variance = name.partition(".")[0]
        data, log_variance = (
            chain.data(x_t, eps, step),
            chain.log_variance(variance, logits, step).expand(shape),
        )
        data = data.clamp(-1, 1) if clip else data
        exact = (
            chain.at(chain.variance, step).expand(shape) if variance == "fixed_small" else log_variance.exp()
        )
        parts = {"mean": chain.mean(data, x_t, step), "log_variance": log_variance, "variance": exact,
                 "pred_xstart": data}  # fmt: skip
        tensors |= {f"pmv.{name}.{k}": v for k, v in parts.items()}
    kept, place = spread(steps, count), torch.tensor([0, 1, 3, 4])
    short = Steps(chain.bars[kept])
    output = toy(short.noised(d1, d0, place), short.at(short.bars, place))
    terms = losses_of(short, "mse_learned_range", d1, d0, place, output)
    tensors |= {f"spaced{count}.loss.{k}": v for k, v in terms.items()}
    tensors |= {f"spaced{count}.t": place, f"spaced{count}.model_t": torch.tensor(kept)[place]}
    maker.write("core", {
        "fixture_kind": "dit.diffusion_core", "sd": sd, "schedule": "squaredcos_cap_v2",
        "create_diffusion": {"diffusion_steps": steps},
    }, {k: v.float() if v.is_floating_point() else v for k, v in tensors.items()})  # fmt: skip
