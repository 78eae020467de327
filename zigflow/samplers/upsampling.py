"""Larger images than a model was trained on, without training: guidance from its own low-resolution branch.

Hwang et al., "Upsample Guidance: Scale Up Diffusion Models without Training", 2024, arXiv:2404.01709, as DiM samples
at 2 and 3 times its training resolution. The mean over blocks of m x m of a noisy image alpha x1 + sigma x0 is a
noisy image of the small size with noise sigma / m, so its signal-to-noise ratio is m^2 times as high. Times a number
it is a state of the process at the time tau that has this ratio, where the model is at home. Early on, the block
means of what the model expects of the large image are moved to what it expects of the small one.

In terms of the noise this is out = noise + w up(noise_small / m - pool(noise)), as published; in terms of the data
data + w up(data_small - pool(data)), which is the same and is used for predictions of data, v and velocity, which
determine the noise badly. Differences from the published code: tau by the schedule's inverse, not the nearest of 1000
steps; signal and noise at the time itself, not at the step below; one tau per sample; any prediction and process with
a path; any whole m; videos.

Shapes: B batch; x (B, ..., H, W), t (B,).
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from zigflow.processes import PathProcess, Process, has_path
from zigflow.processes.process import channel_axis, over_batch, predict, working_dtype
from zigflow.registry import Registry

from .guidance import ModelFunction

_ROUNDING = 1e-6  # times that are rounded to float32 count as equal


def pool(x: Tensor, factor: int) -> Tensor:
    """Means over blocks of the last two axes: (..., H, W) -> (..., H / factor, W / factor).

    Raises:
        ValueError: the blocks do not fill the axes.
    """
    height, width = x.shape[-2:]
    if height % factor or width % factor:
        raise ValueError(
            f"a state of {height} x {width} has no whole blocks of {factor} x {factor}; upsampling by {factor} "
            f"needs sizes that are multiples of {factor}"
        )
    return x.unflatten(-1, (-1, factor)).unflatten(-3, (-1, factor)).mean((-3, -1))


def repeat(x: Tensor, factor: int) -> Tensor:
    """Every entry as a block: (..., h, w) -> (..., h * factor, w * factor)."""
    return x.repeat_interleave(factor, -1).repeat_interleave(factor, -2)


def match_exactly(process: PathProcess, t: Tensor, factor: int) -> tuple[Tensor, Tensor]:
    """The times tau (B,) whose SNR is factor^2 times that at t (B,), and the factors (B,) on pooled states.

    Not beyond the end of sampling, after which the process has no times; there tau is as late as sampling goes.
    """
    path = process.path
    log_snr = path.log_snr(t)
    wanted = log_snr + 2 * torch.log(torch.tensor(float(factor), dtype=t.dtype, device=t.device))
    # At pure noise every ratio is zero, and there is no time to look for.
    tau = torch.where(torch.isfinite(log_snr), path.time_of_log_snr(wanted), t)
    tau = torch.maximum(tau.clamp_max(process.interval("ode")[1]), t)
    alpha, sigma = path.alpha(t), path.sigma(t)
    # Both are the same number, but near an end of the path one is zero over zero, and where tau is cut the data count.
    return tau, torch.where(alpha > sigma, path.alpha(tau) / alpha, factor * path.sigma(tau) / sigma)


def match_as_published(process: PathProcess, t: Tensor, factor: int) -> tuple[Tensor, Tensor]:
    """DiM's published matching, which only Stable Diffusion's schedule has; as :func:`match_exactly`.

    The step below 1000 s, taken in float32, which is one too low at some whole numbers; of the steps 999, ..., 0 the
    i-th whose ratio is nearest, as the time 1 - i / 999; no later a noise than the first sample's.

    Raises:
        ValueError: another process.
    """
    alphas_bar = getattr(process, "alphas_bar", None)
    if alphas_bar is None or len(alphas_bar) != 1000 or getattr(process, "net_offset", None) != 0:
        raise ValueError(
            f"matching=as_published is made of the 1000 steps of process=sd_discrete, not of {process!r}; use "
            "matching=exact"
        )
    first = torch.ones(1, dtype=torch.float64)
    signal = torch.cat([first, alphas_bar])
    noise = 1 - signal
    signal, noise, ratio = (v.float().to(t.device) for v in (signal, noise, signal / noise))

    def step(s: Tensor) -> Tensor:
        return (s * 1000).long()

    s = (1 - t).float()
    preset = torch.arange(1000, dtype=torch.float32, device=t.device).flip(0) / 1000
    preset[-1] = 1e-5
    distance = (ratio[step(s)][:, None] * factor**2 - ratio[step(preset)]).abs()
    tau = (1 - distance.argmin(1) / 999).clamp(max=s[0])
    return 1 - tau.to(t), ((signal + noise / factor**2)[step(s)] ** -0.5).to(t)


MATCHINGS: Registry[Callable[[PathProcess, Tensor, int], tuple[Tensor, Tensor]]] = Registry(
    "matching of times"
)
"""What ``upsample.matching`` names: ``matching(process, t, factor)``, see :func:`match_exactly`."""

MATCHINGS.register("exact", match_exactly)
MATCHINGS.register("as_published", match_as_published)


class Upsampled(ModelFunction):
    """A model function for states ``factor`` times as high and wide as those that ``model`` was trained on.

    It takes the place of the model, or of a :class:`~zigflow.samplers.Guided` one, in every sampler: it calls the
    model on the large state and, while it acts, on the small one, and returns a prediction for the large one. The
    model must read other sizes than the one that it was trained on, as every family here does.

    Args:
        model: ``model(x, t, y)``.
        process: has a path of alpha and sigma: ``flow``, ``gaussian``, ``vp``, ``sd_discrete``.
        factor: m, a whole number from 2 on.
        eta: acts in the first so large share of the process's time, from the noise on, in (0, 1].
        theta: w, how much of the block means is replaced.
        matching: "exact", or "as_published" (DiM's, for ``sd_discrete``).

    A learned variance is that of the large state. A solver's number of calls counts large states only.

    Raises:
        TypeError: the process has no path of alpha and sigma.
        UnknownNameError: an unknown matching.
        ValueError: a number out of range.
    """

    def __init__(
        self,
        model: Any,
        process: Process,
        factor: int,
        eta: float = 0.3,
        theta: float = 1.0,
        matching: str = "exact",
        skip_outside: bool = True,
    ):
        if not has_path(process):
            raise TypeError(
                f"{type(process).__name__} has no path of alpha and sigma, by which upsampling matches times; use "
                "process=flow, gaussian, vp or sd_discrete"
            )
        if factor != int(factor) or factor < 2:
            raise ValueError(f"the upsampling factor is {factor}; give a whole number from 2 on")
        if not 0 < eta <= 1:
            raise ValueError(f"upsampling's eta is {eta}; give a share of the time in (0, 1]")
        if not theta > 0:
            raise ValueError(
                f"upsampling's theta is {theta}; give a positive number, 1 replaces the block means"
            )
        # Refused here, before anything is sampled, where the process does not suit.
        MATCHINGS.get(matching)(process, torch.tensor([0.5], dtype=torch.float64), int(factor))
        self.model = model
        self.process = process
        self.factor = int(factor)
        self.eta = eta
        self.theta = theta
        self.matching = matching
        self.skip_outside = skip_outside

    def always_doubled(self) -> "Upsampled":
        """The same with both calls at all times, so that a sample's bits do not depend on its neighbors' times."""
        inner = self.model.always_doubled() if isinstance(self.model, ModelFunction) else self.model
        return Upsampled(inner, self.process, self.factor, self.eta, self.theta, self.matching, False)

    def __call__(self, x: Tensor, t: Tensor, y: Any = None) -> Tensor:
        """The prediction (B, ...), with a learned variance of twice the channels, for x (B, ...), net times t (B,).

        Raises:
            ValueError: the sizes of ``x`` are not multiples of the factor.
        """
        output = self.model(x, t, y)
        wide = t if t.device.type == "mps" else t.double()
        time = self.process.process_time(wide, self)
        acts = (time <= self.eta + _ROUNDING) & (self.process.path.sigma(time) > 0)
        if self.skip_outside and not acts.any():
            return output
        axis = channel_axis(x)
        value, *variance = output.split(x.shape[axis], axis)
        guided = self._guided(value.to(working_dtype(x)), x, time, y)
        guided = torch.where(over_batch(acts, x), guided, value.to(guided.dtype))
        return (
            torch.cat([guided, *(part.to(guided.dtype) for part in variance)], axis) if variance else guided
        )

    def _guided(self, value: Tensor, x: Tensor, t: Tensor, y: Any) -> Tensor:
        process, m = self.process, self.factor
        tau, scale = MATCHINGS.get(self.matching)(process, t, m)
        small = over_batch(scale.to(value.dtype), x) * pool(x.to(value.dtype), m)
        at_small = predict(process, self.model, small, tau, y)
        if process.prediction in ("noise", "score"):
            noise = process.noise(value, x, t)
            change = process.noise(at_small, small, tau) / m - pool(noise, m)
            return process.convert(noise + self.theta * repeat(change, m), x, t, process.prediction, "noise")
        data = process.data(value, x, t)
        change = process.data(at_small, small, tau) - pool(data, m)
        return process.convert(data + self.theta * repeat(change, m), x, t, process.prediction, "data")
