"""Diffusion processes in continuous time: what they share, the VP-SDE, and Stable Diffusion's schedule.

Direction, as everywhere here: t = 0 is noise x0 ~ N(0, I), t = 1 is data x1, x_t = alpha x1 + sigma x0 with
alpha^2 + sigma^2 = 1. The papers' time is s = 1 - t, with their signs of time. Song et al. 2021 (VP-SDE), Rombach
et al. 2022 (schedule), Salimans & Ho 2022 (v), Hang et al. 2023 (min-SNR). Differences from U-ViT's code: float64
tables, expm1 where it takes 1 - exp, the v prediction and the weights.

Shapes: x (B, ...), t (B,).
"""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from zigflow.nn import as_denoiser
from zigflow.registry import Registry, unknown_name

from .chain import Chain
from .diffusion_forms import DIFFUSION_FORMS
from .interpolants import VP
from .predictions import PREDICTIONS, bounded_predictions
from .process import ModelFunction, mean_over_sample, over_batch, predict, time_like
from .schedules import BETAS, SCHEDULES, Schedule, Table, spaced_steps


class Diffusion:
    """What all diffusion processes share.

    Args:
        schedule: log alpha as a function of s = 1 - t, or the betas (N,) of a process in N steps.
        prediction: what the network outputs, a bounded one of PREDICTIONS: "noise", "data", or "v" = alpha noise -
            sigma data.
        min_snr_gamma: weigh the loss of a sample as if its signal-to-noise ratio counted at most so much; None
            is the plain squared error.
        net_scale, net_offset: the network is fed net_scale * s - net_offset.
        data_end: sampling ends at t = 1 - data_end, beside which noise and data no longer determine each other.

    ``steps`` is N for a process that is trained at times 1 - n/N only, n = 1..N, or None for every time.
    A model with ``time_factor`` multiplies its time by that itself; it is fed so much less.

    Raises:
        UnknownNameError: a prediction that does not exist.
        ValueError: a number out of range.
    """

    prior_scale = 1.0
    noise_end = 1.0
    variance = "auto"
    reads_variance = True
    feeds_noise_level = True
    registries: ClassVar[Mapping[str, Registry]] = {"prediction": PREDICTIONS}

    def __init__(
        self,
        schedule: Schedule | Tensor,
        prediction: str,
        min_snr_gamma: float | None,
        net_scale: float,
        net_offset: float,
        data_end: float,
    ):
        if prediction not in bounded_predictions():
            raise unknown_name("prediction of a diffusion process", prediction, bounded_predictions())
        self.predicted = PREDICTIONS.get(prediction)
        if min_snr_gamma is not None and not min_snr_gamma > 0:
            raise ValueError(f"min_snr_gamma is {min_snr_gamma}; give a positive number, or None for none")
        if not 0 < data_end < 0.5:
            raise ValueError(f"sampling would end {data_end} before the data; give a number in (0, 0.5)")
        self.steps = self.alphas_bar = None
        if isinstance(schedule, Tensor):
            self.steps, self.alphas_bar = len(schedule), torch.cumprod(1 - schedule, 0)
            schedule = Table(schedule)
        self.path = VP(schedule=schedule)
        self.prediction = prediction
        self.min_snr_gamma = min_snr_gamma
        self.net_scale, self.net_offset = net_scale, net_offset
        self.data_end = data_end

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.prediction!r}, steps={self.steps})"

    def interval(self, use: str = "train") -> tuple[float, float]:
        """First and last time of training ("train") or of sampling ("ode", "sde")."""
        if use not in ("train", "ode", "sde"):
            raise unknown_name("use of an interval", use, ["train", "ode", "sde"])
        trains_at_data = use == "train" and self.steps is None
        return 0.0, 1.0 if trains_at_data else 1 - self.data_end

    def sde_interval(
        self, diffusion_form: str, last_step_size: float, evaluates_end: bool
    ) -> tuple[float, float]:
        """The "sde" interval, ended earlier by ``last_step_size`` where that is more."""
        return 0.0, 1 - max(last_step_size, self.data_end)

    def sample_time(self, u: Tensor) -> Tensor:
        """Training times (B,) from uniforms (B,): s uniform on [0, 1), or on the N steps."""
        if self.steps is None:
            return 1 - u
        return 1 - ((u * self.steps).floor().clamp_max(self.steps - 1) + 1) / self.steps

    def exact(self, t: Tensor | float, x: Tensor) -> Tensor:
        """Times (B,) in float64 where they are, else as coefficients are computed.

        Raises:
            ValueError: ``t`` is neither a number nor of shape (B,).
        """
        checked = time_like(t, x)
        if isinstance(t, Tensor) and t.dtype == torch.float64 and t.ndim:
            return t.to(x.device)
        return checked

    def step_time(self, t: Tensor) -> Tensor:
        """Training times in float64, on the very step that a rounded time is of."""
        wide = t if t.device.type == "mps" else t.double()
        return wide if self.steps is None else 1 - ((1 - wide) * self.steps).round() / self.steps

    def time_map(self, t: Tensor, model: Any) -> Tensor:
        """net_scale * (1 - t) - net_offset, over the model's own ``time_factor``; whole numbers exact."""
        net = self.net_scale * (1 - t) - self.net_offset
        whole = net.round()
        near = (net - whole).abs() <= 4 * torch.finfo(net.dtype).eps * self.net_scale
        return torch.where(near, whole, net) / as_denoiser(model).time_factor

    def process_time(self, net_time: Tensor, model: Any) -> Tensor:
        """The inverse of :meth:`time_map`."""
        return 1 - (net_time * as_denoiser(model).time_factor + self.net_offset) / self.net_scale

    def interpolate(self, x1: Tensor, x0: Tensor, t: Tensor) -> Tensor:
        """x_t of the shape of x1, in the working dtype.

        Raises:
            ValueError: x1 and x0 differ in shape, or t is not (B,).
        """
        if x1.shape != x0.shape:
            raise ValueError(f"data has shape {tuple(x1.shape)}, noise {tuple(x0.shape)}; they must agree")
        t, dtype = self.exact(t, x1), time_like(0.0, x1).dtype
        alpha, sigma = (over_batch(c.to(dtype), x1) for c in (self.path.alpha(t), self.path.sigma(t)))
        return alpha * x1.to(dtype) + sigma * x0.to(dtype)

    def target(self, x1: Tensor, x0: Tensor, t: Tensor) -> Tensor:
        """What a perfect network would output for this pair at time t, of the shape of x1."""
        t, dtype = self.exact(t, x1), time_like(0.0, x1).dtype
        if self.prediction in ("noise", "data"):
            return x0 if self.prediction == "noise" else x1
        a, b = (over_batch(c.to(dtype), x1) for c in self.predicted.pair(self.path, t))
        return b * x0 + a * x1

    def loss_weights(self, t: Tensor) -> Tensor:
        """The (B,) factor on the squared error: 1, or min(SNR, gamma) in the units of the prediction."""
        if self.min_snr_gamma is None:
            return torch.ones_like(t)
        snr = self.path.log_snr(t).exp()
        weight = snr.clamp_max(self.min_snr_gamma)
        # An error of noise is sqrt(SNR) times that of the data, one of v sqrt(SNR + 1) times.
        if self.prediction == "noise":
            return (self.min_snr_gamma / snr).clamp_max(1.0)
        if self.prediction in ("data", "v"):
            return weight if self.prediction == "data" else weight / (snr + 1)
        a, b = self.predicted.pair(self.path, t)
        alpha, sigma = self.path.alpha(t), self.path.sigma(t)
        return weight * (sigma / (alpha * b - sigma * a)) ** 2

    def loss(self, model: ModelFunction, x1: Tensor, x0: Tensor, t: Tensor, y: Any = None) -> Tensor:
        """Weighted squared error of the prediction, averaged over every axis but the batch.

        Args:
            model: called as ``model(x_t, net_time, y)``.
            x1, x0: data and noise (B, ...); t: times (B,) from :meth:`sample_time`.

        Returns:
            (B,) in float32 (float64 for float64 data).

        Raises:
            ValueError: shapes that do not agree.
        """
        t = self.step_time(self.exact(t, x1))
        x_t = self.interpolate(x1, x0, t)
        output = predict(self, model, x_t, t, y)
        error = mean_over_sample((output - self.target(x1, x0, t)) ** 2)
        return self.loss_weights(t).to(error.dtype) * error

    def convert(self, value: Tensor, x: Tensor, t: Tensor, target: str, source: str | None = None) -> Tensor:
        """``value``, a ``source`` (default: the process's prediction) at (x, t), as a ``target``.

        Raises:
            UnknownNameError: not a name in PREDICTIONS.
        """
        source = self.prediction if source is None else source
        for name in (source, target):
            PREDICTIONS.get(name)
        t, dtype = self.exact(t, x), time_like(0.0, x).dtype
        value = value.to(dtype)
        if source == target:
            return value
        of_x, of_value = (over_batch(c.to(dtype), x) for c in self._coefficients(source, target, t))
        return of_x * x.to(dtype) + of_value * value

    def _coefficients(self, source: str, target: str, t: Tensor) -> tuple[Tensor, Tensor]:
        path = self.path
        if "v" not in (source, target) or not {source, target} <= {"velocity", "score", "noise", "data", "v"}:
            return path.coefficients(source, target, t)
        alpha, sigma = path.alpha(t), path.sigma(t)
        if target == "v":
            of_x, of_source = path.coefficients(source, "noise", t)
            return (of_x - sigma) / alpha, of_source / alpha
        if target == "velocity":
            return torch.zeros_like(t), -path.d_alpha(t) / sigma
        if target == "data":
            return alpha, -sigma
        return (sigma, alpha) if target == "noise" else (-torch.ones_like(t), -alpha / sigma)

    def velocity(self, output: Tensor, x: Tensor, t: Tensor) -> Tensor:
        return self.convert(output, x, t, "velocity")

    def score(self, output: Tensor, x: Tensor, t: Tensor) -> Tensor:
        return self.convert(output, x, t, "score")

    def noise(self, output: Tensor, x: Tensor, t: Tensor) -> Tensor:
        return self.convert(output, x, t, "noise")

    def data(self, output: Tensor, x: Tensor, t: Tensor) -> Tensor:
        return self.convert(output, x, t, "data")

    def diffusion(self, x: Tensor, t: Tensor, form: str = "SBDM", norm: float = 1.0) -> Tensor:
        """D of the SDE dX = (velocity + D score) dt + sqrt(2 D) dW at times t, of shape (B, 1, ...).

        "SBDM" with norm 1 is the reverse-time SDE of the papers.

        Raises:
            UnknownNameError: ``form`` is not in DIFFUSION_FORMS.
        """
        return over_batch(DIFFUSION_FORMS.get(form)(self.path, time_like(t, x), norm), x)

    def chain(self, spacing: str | int | None = None) -> Chain:
        """A Markov chain over some of the times, for ancestral sampling and DDIM.

        Args:
            spacing: of the N steps, see :func:`spaced_steps`; in continuous time a number of steps, evenly spread
                from the data's end to the noise's.

        Raises:
            ValueError: the spacing cannot be made.
        """
        if self.steps is not None and self.alphas_bar is not None:
            kept = torch.tensor(spaced_steps(self.steps, spacing))
            return Chain(1 - (kept.double() + 1) / self.steps, self.alphas_bar[kept])
        text = str(spacing).strip()
        if not text.isdecimal() or int(text) < 1:
            raise ValueError(
                f"the spacing {spacing!r}: {type(self).__name__} has no steps to choose from; give their number, such "
                "as 50"
            )
        # From the noise's end, so that a single step lies there.
        s = torch.linspace(self.noise_end, self.data_end, int(text), dtype=torch.float64).flip(0)
        return Chain(1 - s, self.path.alpha(1 - s) ** 2)

    def step_variance(self, logits: Tensor | None) -> str:
        """The kind of variance of a model with or without variance logits."""
        if self.variance != "auto":
            return self.variance
        return "fixed_large" if logits is None else "learned_range"

    def backward_step(
        self, chain: Chain, output: Tensor, logits: Tensor | None, x: Tensor, step: Tensor, clip: bool = False
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Of the model's p(x_{i-1} | x_i): mean, log variance and the expected data, each of the shape of x.

        Args:
            output: the network's prediction at x and the time of ``step`` (B,); ``logits`` of the variance or None.
            clip: clip the expected data to [-1, 1].
        """
        data = self.data(output, x, chain.times.to(x.device)[step])
        data = data.clamp(-1, 1) if clip else data
        log_variance = chain.log_variance(self.step_variance(logits), logits, x, step)
        return chain.posterior_mean(data, x, step), log_variance.expand_as(x), data


class VariancePreserving(Diffusion):
    """The VP-SDE in continuous time; the network is fed 999 s.

    Args:
        schedule: a name in SCHEDULES: "linear" (beta from beta_min to beta_max) or "cosine" (then the noise end s = 1
            has no score, and s stays below 0.9946, as published).
        sample_eps: sampling ends at s = sample_eps.
        prediction, min_snr_gamma: see :class:`Diffusion`.
    """

    registries: ClassVar[Mapping[str, Registry]] = {"prediction": PREDICTIONS, "schedule": SCHEDULES}

    def __init__(
        self,
        schedule: str = "linear",
        beta_min: float = 0.1,
        beta_max: float = 20.0,
        prediction: str = "noise",
        min_snr_gamma: float | None = None,
        sample_eps: float = 1e-4,
    ):
        shape = SCHEDULES.get(schedule)(beta_min, beta_max)
        super().__init__(shape, prediction, min_snr_gamma, 999.0, 0.0, sample_eps)
        self.noise_end = getattr(shape, "noise_end", 1.0)

    def interval(self, use: str = "train") -> tuple[float, float]:
        """See :class:`Diffusion`; it starts at 1 - noise_end."""
        return 1 - self.noise_end, super().interval(use)[1]

    def sde_interval(
        self, diffusion_form: str, last_step_size: float, evaluates_end: bool
    ) -> tuple[float, float]:
        """See :class:`Diffusion`; it starts at 1 - noise_end."""
        return 1 - self.noise_end, super().sde_interval(diffusion_form, last_step_size, evaluates_end)[1]

    def sample_time(self, u: Tensor) -> Tensor:
        """s uniform on [0, noise_end)."""
        return 1 - u * self.noise_end


class StableDiffusion(Diffusion):
    """A table of betas, Stable Diffusion's by default, trained at n = 1..N and sampled at any time between.

    The network is fed n while it trains and N s while it samples.

    Args:
        betas: a name in BETAS.
        num_steps: N.
        prediction, min_snr_gamma: see :class:`Diffusion`.
    """

    registries: ClassVar[Mapping[str, Registry]] = {"prediction": PREDICTIONS, "betas": BETAS}

    def __init__(
        self,
        betas: str = "scaled_linear",
        num_steps: int = 1000,
        prediction: str = "noise",
        min_snr_gamma: float | None = None,
    ):
        if num_steps < 3:
            raise ValueError(f"num_steps is {num_steps}; give at least 3")
        table = BETAS.get(betas)(num_steps)
        super().__init__(table, prediction, min_snr_gamma, num_steps, 0.0, 1 / num_steps)
