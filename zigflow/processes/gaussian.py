"""Gaussian diffusion in discrete steps with fixed or learned variance, and its variational terms.

Ho et al. 2020; Nichol & Dhariwal 2021 (learned range of the variance, its loss, respacing); Peebles & Xie 2023
(DiT trains on ``mse`` plus the variational term in bits). Differences from the published code: tables stay float64
until they meet a state, a network with or without a learned variance is told by its output, the v prediction
and min-SNR weights, and a chain of one step.

Step n of 0..N-1 lies at t = 1 - (n + 1) / N, and n is what the network is fed. Between the steps log alpha is
linear, so that the samplers of continuous time run here, too. Shapes: x (B, ...), t (B,), K steps kept of N.
"""

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from zigflow.registry import Registry, unknown_name

from .chain import Chain, discretized_log_likelihood, gaussian_kl
from .diffusion import Diffusion
from .predictions import PREDICTIONS
from .process import ModelFunction, mean_over_sample, predict_with_variance, working_dtype
from .schedules import BETAS, spaced_steps

VARIANCES = ("auto", "learned_range", "fixed_large", "fixed_small")
LOSSES = ("mse", "rescaled_mse", "kl", "rescaled_kl")


class Gaussian(Diffusion):
    """The discrete Gaussian diffusion.

    Args:
        betas: a name in BETAS: "linear", "cosine", ...
        num_steps: N.
        prediction: "noise", "data" or "v".
        variance: of the model's steps: "learned_range", "fixed_large" (beta), "fixed_small" (the posterior's);
            "auto" is learned_range for a model with twice the channels, else fixed_large.
        loss: "mse" (plus the variational term in bits per dimension for a learned variance), "rescaled_mse" (that
            term times K/1000), "kl" (the variational term alone) or "rescaled_kl" (times K).
        respacing: train on fewer steps, see :func:`spaced_steps`; None or "": all.
        min_snr_gamma: see :class:`Diffusion`; weighs the squared error alone.

    Raises:
        UnknownNameError: a name that does not exist.
        ValueError: a number out of range, or a respacing that cannot be made.
    """

    registries: ClassVar[Mapping[str, Registry]] = {"prediction": PREDICTIONS, "betas": BETAS}

    def __init__(
        self,
        betas: str = "linear",
        num_steps: int = 1000,
        prediction: str = "noise",
        variance: str = "auto",
        loss: str = "mse",
        respacing: str | int | None = None,
        min_snr_gamma: float | None = None,
    ):
        if variance not in VARIANCES:
            raise unknown_name("variance", variance, list(VARIANCES))
        if loss not in LOSSES:
            raise unknown_name("loss", loss, list(LOSSES))
        if num_steps < 3:
            raise ValueError(f"num_steps is {num_steps}; give at least 3")
        table = BETAS.get(betas)(num_steps)
        super().__init__(table, prediction, min_snr_gamma, num_steps, 1.0, 1 / num_steps)
        self.num_steps = num_steps
        self.variance, self.loss_type = variance, loss
        self.kept = torch.tensor(spaced_steps(num_steps, respacing))
        self._chain = self.chain(respacing)

    def sample_time(self, u: Tensor) -> Tensor:
        """Training times (B,) from uniforms (B,), uniform on the kept steps."""
        place = (u * len(self.kept)).floor().long().clamp_max(len(self.kept) - 1)
        return 1 - (self.kept.to(u.device)[place].to(u) + 1) / self.num_steps

    def chain_step(self, t: Tensor) -> Tensor:
        """The place (B,) in the chain of the kept steps of training times t (B,)."""
        step = ((1 - t) * self.num_steps).round().long() - 1
        return torch.searchsorted(self.kept.to(t.device), step).clamp_max(len(self.kept) - 1)

    def variational_term(
        self,
        chain: Chain,
        output: Tensor,
        logits: Tensor | None,
        x1: Tensor,
        x_t: Tensor,
        step: Tensor,
        clip: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """One term (B,) of the variational bound in bits per dimension, and the expected data.

        The KL divergence from the posterior to the model's step; at step 0 the negative log likelihood of the data,
        taken as 8-bit values in [-1, 1] (so it is in the published loss for latents, too).
        """
        mean, log_variance, data = self.backward_step(chain, output, logits, x_t, step, clip)
        true_mean = chain.posterior_mean(x1, x_t, step)
        true_log_variance = chain.at(chain.posterior_log_variance, step, x_t)
        kl = mean_over_sample(gaussian_kl(true_mean, true_log_variance, mean, log_variance))
        decoded = -mean_over_sample(discretized_log_likelihood(x1, mean, 0.5 * log_variance))
        return torch.where(step.to(x_t.device) == 0, decoded, kl) / math.log(2), data

    def loss(self, model: ModelFunction, x1: Tensor, x0: Tensor, t: Tensor, y: Any = None) -> Tensor:
        """The loss of ``loss``, averaged over every axis but the batch; see :meth:`loss_terms`."""
        return self.loss_terms(model, x1, x0, t, y)["loss"]

    def loss_terms(
        self, model: ModelFunction, x1: Tensor, x0: Tensor, t: Tensor, y: Any = None
    ) -> dict[str, Tensor]:
        """``loss`` and what it is the sum of: ``mse`` and, with a variational term, ``vb``; each (B,).

        The variational term of a squared-error loss moves the variance alone: the prediction is detached in it.

        Raises:
            ValueError: shapes that do not agree.
        """
        t = self.step_time(self.exact(t, x1))
        x1, x0 = x1.to(working_dtype(x1)), x0.to(working_dtype(x1))
        x_t = self.interpolate(x1, x0, t)
        output, logits = predict_with_variance(self, model, x_t, t, y)
        step, chain = self.chain_step(t), self._chain
        if self.loss_type in ("kl", "rescaled_kl"):
            term = self.variational_term(chain, output, logits, x1, x_t, step)[0]
            scaled = term * len(chain) if self.loss_type == "rescaled_kl" else term
            return {"loss": scaled, "vb": term}
        error = mean_over_sample((output - self.target(x1, x0, t)) ** 2)
        error = self.loss_weights(t).to(error.dtype) * error
        if self.step_variance(logits) != "learned_range":
            return {"loss": error, "mse": error}
        vb = self.variational_term(chain, output.detach(), logits, x1, x_t, step)[0]
        if self.loss_type == "rescaled_mse":
            vb = vb * (len(chain) / 1000)
        return {"loss": error + vb, "mse": error, "vb": vb}

    def prior_term(self, chain: Chain, x1: Tensor) -> Tensor:
        """Bits per dimension (B,) by which the noised data differ from the prior."""
        last = torch.full((x1.shape[0],), len(chain) - 1, device=x1.device)
        alphas_bar = chain.at(chain.alphas_bar, last, x1)
        zero = torch.zeros_like(x1)
        kl = gaussian_kl(alphas_bar.sqrt() * x1, (1 - alphas_bar).log().expand_as(x1), zero, zero)
        return mean_over_sample(kl) / math.log(2)
