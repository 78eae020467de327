"""Flow matching and stochastic interpolants (SiT): one process for every path and prediction.

Direction: t = 0 is noise x0 ~ N(0, I), t = 1 is data x1; x_t = alpha x1 + sigma x0. Lipman et al., "Flow
Matching" (2022); Ma et al., "SiT" (2024). Differences from the published transport code: the `data`
prediction, logit-normal times, an epsilon of its own for sampling, a constant diffusion that works, and SDE
intervals that step off singular ends.

Shapes: x (B, ...), t (B,). Coefficients are computed in float32, or float64 for a float64 state.
"""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from zigflow.nn import as_denoiser
from zigflow.registry import Registry, unknown_name

from .diffusion_forms import DIFFUSION_FORMS
from .interpolants import INTERPOLANTS, Interpolant
from .predictions import PREDICTIONS, Prediction
from .process import (
    ModelFunction,
    mean_over_sample,
    over_batch,
    predict,
    time_like,
    working_dtype,
)
from .time_laws import TIME_LAWS, TimeLaw

DEFAULT_EPS = 1e-3
DEFAULT_TRAIN_EPS_VP = 1e-5
LOSS_WEIGHTS = (None, "velocity", "likelihood")


class Flow:
    """The flow process.

    Args:
        path_type: a name in INTERPOLANTS: "Linear", "GVP" or "VP".
        prediction: what the network outputs, a name in PREDICTIONS: "velocity", "score", "noise", "data" or "v".
        loss_weight: None (plain squared error), "velocity" (the error of the velocity that the prediction
            implies) or "likelihood" (the weight of the likelihood bound). No effect for prediction "velocity".
        train_eps, sample_eps: distance kept from singular ends of [0, 1]. None: 1e-3, but 1e-5 for training
            on the VP path. Velocity on Linear or GVP has no singular end: both are 0, whatever is given.
        time_law: a name in TIME_LAWS: "uniform" or "logit_normal" (with ``logit_mean``, ``logit_std``), on the training
            interval.

    Raises:
        UnknownNameError: a name that does not exist (near matches are suggested).
        ValueError: an epsilon outside [0, 0.5).
    """

    prior_scale = 1.0
    registries: ClassVar[Mapping[str, Registry]] = {
        "path_type": INTERPOLANTS,
        "prediction": PREDICTIONS,
        "time_law": TIME_LAWS,
    }

    def __init__(
        self,
        path_type: str = "Linear",
        prediction: str = "velocity",
        loss_weight: str | None = None,
        train_eps: float | None = None,
        sample_eps: float | None = None,
        time_law: str = "uniform",
        logit_mean: float = 0.0,
        logit_std: float = 1.0,
    ):
        self.predicted: Prediction = PREDICTIONS.get(prediction)
        if loss_weight not in LOSS_WEIGHTS:
            raise unknown_name("loss weight", loss_weight, [str(w) for w in LOSS_WEIGHTS])
        for name, eps in (("train_eps", train_eps), ("sample_eps", sample_eps)):
            if eps is not None and not 0 <= eps < 0.5:
                raise ValueError(f"{name} is {eps}; give a number in [0, 0.5), or None for the default")
        self.path: Interpolant = INTERPOLANTS.get(path_type)()
        self.path_type = path_type
        self.prediction = prediction
        self.loss_weight = loss_weight
        self.time_law: TimeLaw = TIME_LAWS.get(time_law)(logit_mean, logit_std)
        # A velocity is finite at the noise's end even where alpha(0) = 0, which the other predictions are not.
        self._uses_all_times = self.predicted.regular and self.path.ends_are_regular
        if self._uses_all_times:
            train_eps = sample_eps = 0.0
        default_train_eps = DEFAULT_EPS if self.path.noise_end_is_singular else DEFAULT_TRAIN_EPS_VP
        self.train_eps = default_train_eps if train_eps is None else train_eps
        self.sample_eps = DEFAULT_EPS if sample_eps is None else sample_eps

    def __repr__(self) -> str:
        return f"Flow({self.path_type!r}, {self.prediction!r}, loss_weight={self.loss_weight!r})"

    def interval(
        self, use: str = "train", *, diffusion_form: str = "SBDM", last_step_size: float = 0.0
    ) -> tuple[float, float]:
        """The times (low, high) of training ("train") or sampling ("ode", "sde"), as published.

        ``last_step_size`` > 0 ends an SDE at 1 - last_step_size; a last step then covers the rest. The
        reverse ODE runs over the "ode" interval from high to low.
        """
        if use not in ("train", "ode", "sde"):
            raise unknown_name("use of an interval", use, ["train", "ode", "sde"])
        eps = self.train_eps if use == "train" else self.sample_eps
        stochastic = use == "sde"
        keeps_off_noise = not self.predicted.regular or not self.path.ends_are_regular
        keeps_off_noise = keeps_off_noise or (stochastic and self._is_infinite_at_noise(diffusion_form))
        low = eps if self.path.noise_end_is_singular and keeps_off_noise else 0.0
        high = 1 - last_step_size if stochastic and last_step_size > 0 else 1 - eps
        return float(low), float(high)

    def sde_interval(
        self, diffusion_form: str, last_step_size: float, evaluates_end: bool
    ) -> tuple[float, float]:
        """The "sde" interval, moved off ends where drift or diffusion are infinite by 1e-3.

        That concerns eps = 0: SBDM diffusion at alpha = 0, and the score at sigma = 0 if the solver
        evaluates the last grid point. The published code returns NaN there.
        """
        low, high = self.interval("sde", diffusion_form=diffusion_form, last_step_size=last_step_size)
        if low == 0 and self._is_infinite_at_noise(diffusion_form):
            low = DEFAULT_EPS
        if evaluates_end and high == 1:
            high = 1 - DEFAULT_EPS
        return low, high

    def _is_infinite_at_noise(self, diffusion_form: str) -> bool:
        form, start = DIFFUSION_FORMS.get(diffusion_form), torch.zeros(1, dtype=torch.float64)
        return not bool(torch.isfinite(form(self.path, start, 1.0)).all())

    def sample_time(self, u: Tensor) -> Tensor:
        """Training times (B,) in float32 (float64 for float64 uniforms) from uniforms (B,) in [0, 1)."""
        return self.time_law.quantile(u, *self.interval("train")).to(working_dtype(u))

    def time_map(self, t: Tensor, model: Any) -> Tensor:
        """t times ``model.time_scale`` (1 where the model has none)."""
        return t * as_denoiser(model).time_scale

    def process_time(self, net_time: Tensor, model: Any) -> Tensor:
        """The inverse of :meth:`time_map`."""
        return net_time / as_denoiser(model).time_scale

    def interpolate(self, x1: Tensor, x0: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """(x_t, d x_t / dt), each of the shape of x1 in the working dtype.

        Raises:
            ValueError: x1 and x0 differ in shape, or t is not (B,).
        """
        if x1.shape != x0.shape:
            raise ValueError(f"data has shape {tuple(x1.shape)}, noise {tuple(x0.shape)}; they must agree")
        t = time_like(t, x1)
        x1, x0 = x1.to(t.dtype), x0.to(t.dtype)
        path = self.path
        x_t = over_batch(path.alpha(t), x1) * x1 + over_batch(path.sigma(t), x1) * x0
        return x_t, over_batch(path.d_alpha(t), x1) * x1 + over_batch(path.d_sigma(t), x1) * x0

    def target(self, x1: Tensor, x0: Tensor, t: Tensor) -> Tensor:
        """What a perfect network would output for this pair at time t, of the shape of x1."""
        t = time_like(t, x1)
        return self.predicted.target(self.path, x1.to(t.dtype), x0.to(t.dtype), t)

    def loss_weights(self, t: Tensor) -> Tensor:
        """The (B,) factor on the squared error of what is predicted (of sigma * score); 1 without a weight."""
        path = self.path
        if self.loss_weight is None or self.prediction == "velocity":
            return torch.ones_like(t)
        if self.prediction not in ("data", "noise", "score"):
            return self._derived_loss_weights(t)
        if self.loss_weight == "velocity":
            return (path.data_gain(t) if self.prediction == "data" else path.noise_gain(t)) ** 2
        weight = path.score_gain(t) / path.sigma(t) ** 2
        # An error of the data is (alpha / sigma) times as large an error of the noise.
        return weight * (path.alpha(t) / path.sigma(t)) ** 2 if self.prediction == "data" else weight

    def _derived_loss_weights(self, t: Tensor) -> Tensor:
        """:meth:`loss_weights` of any prediction: an error of it is W / D as large an error of the velocity."""
        path = self.path
        a, b = self.predicted.error_pair(path, t)
        whole = path.alpha(t) * b - path.sigma(t) * a
        if self.loss_weight == "velocity":
            return (path.wronskian(t) / whole) ** 2
        return path.score_gain(t) / path.sigma(t) ** 2 * (path.alpha(t) / whole) ** 2

    def loss(self, model: ModelFunction, x1: Tensor, x0: Tensor, t: Tensor, y: Any = None) -> Tensor:
        """Weighted squared error of the prediction, averaged over every axis but the batch.

        Args:
            model: called as ``model(x_t, net_time, y)``.
            x1, x0: data and noise (B, ...); t: times (B,) from :meth:`sample_time`.

        Returns:
            (B,) in float32 (float64 for float64 data). The score's error is taken times sigma.

        Raises:
            ValueError: shapes that do not agree.
        """
        t = time_like(t, x1)
        x_t, velocity = self.interpolate(x1, x0, t)
        output = predict(self, model, x_t, t, y)
        if self.prediction == "velocity":
            return mean_over_sample((output - velocity) ** 2)
        error = self.predicted.error(self.path, output, x1, x0, t)
        return self.loss_weights(t) * mean_over_sample(error**2)

    def convert(self, value: Tensor, x: Tensor, t: Tensor, target: str, source: str | None = None) -> Tensor:
        """``value``, a ``source`` (default: the process's prediction) at (x, t), as a ``target``.

        Finite wherever the quantity itself is: at sigma = 0 there is no score, at alpha = 0 noise does not
        determine data or velocity. The training and sampling intervals avoid those ends.
        """
        t = time_like(t, x)
        source = self.prediction if source is None else source
        value = value.to(t.dtype)
        if source == target:
            return value
        of_x, of_value = self.path.coefficients(source, target, t)
        scaled = over_batch(of_value, x) * value
        if {source, target} == {"noise", "score"}:
            return scaled
        return over_batch(of_x, x) * x.to(t.dtype) + scaled

    def velocity(self, output: Tensor, x: Tensor, t: Tensor) -> Tensor:
        return self.convert(output, x, t, "velocity")

    def score(self, output: Tensor, x: Tensor, t: Tensor) -> Tensor:
        return self.convert(output, x, t, "score")

    def noise(self, output: Tensor, x: Tensor, t: Tensor) -> Tensor:
        return self.convert(output, x, t, "noise")

    def data(self, output: Tensor, x: Tensor, t: Tensor) -> Tensor:
        return self.convert(output, x, t, "data")

    def drift_terms(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """(m, g) with velocity = m + g * score: m = (alpha'/alpha) x of the shape of x, g (B, 1, ...).

        The published `compute_drift` returns (-m, g).
        """
        t = time_like(t, x)
        rate = over_batch(self.path.d_alpha_over_alpha(t), x)
        return rate * x.to(t.dtype), over_batch(self.path.score_gain(t), x)

    def diffusion(self, x: Tensor, t: Tensor, form: str = "SBDM", norm: float = 1.0) -> Tensor:
        """D of the SDE dX = (velocity + D score) dt + sqrt(2 D) dW at times t, of shape (B, 1, ...).

        Raises:
            UnknownNameError: ``form`` is not in DIFFUSION_FORMS.
        """
        t = time_like(t, x)
        return over_batch(DIFFUSION_FORMS.get(form)(self.path, t, norm), x)
