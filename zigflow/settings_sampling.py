"""How a checkpoint is sampled, as frozen, typed values: part of :mod:`zigflow.settings`."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from zigflow.typed import SettingsError, at_least, one_of, positive

ODE_METHODS = ("euler", "midpoint", "heun", "heun2", "heun3", "rk4", "rk4_classic", "dopri5", "bosh3")
SDE_METHODS = ("Euler", "Heun")
DIFFUSION_METHODS = ("ddpm", "ddim", "dpm_solver", "dpm_solver++")
DPM_VARIANTS = ("singlestep", "fast", "fast_equal_spans", "multistep", "adaptive")
DPM_GRIDS = ("logSNR", "time_uniform", "time_quadratic")
DIFFUSION_FORMS = (
    "constant", "SBDM", "sigma", "linear", "decreasing", "increasing-decreasing", "inccreasing-decreasing",
)  # fmt: skip
SKIP_TUNING = ("as_published", "as_intended")


@dataclass(frozen=True, kw_only=True)
class OdeSettings:
    """Group ``ode``; ``num_steps`` counts grid points, a fixed solver makes one step less."""

    sampling_method: str = "dopri5"
    num_steps: int = 250
    atol: float = 1e-6
    rtol: float = 1e-3
    last_step: bool = True
    reverse: bool = False
    likelihood: bool = False

    def __post_init__(self):
        if not self.sampling_method.startswith("torchdiffeq/"):
            one_of("ode.sampling_method", self.sampling_method, (*ODE_METHODS, "torchdiffeq/NAME"))
        at_least("ode.num_steps", self.num_steps, 2)
        positive("ode.atol", self.atol)
        positive("ode.rtol", self.rtol)


@dataclass(frozen=True, kw_only=True)
class SdeSettings:
    """Group ``sde``."""

    sampling_method: str = "Euler"
    num_steps: int = 250
    diffusion_form: str = "sigma"
    diffusion_norm: float = 1.0
    last_step: str | None = "Tweedie"
    last_step_size: float = 0.04

    def __post_init__(self):
        one_of("sde.sampling_method", self.sampling_method, SDE_METHODS)
        one_of("sde.diffusion_form", self.diffusion_form, DIFFUSION_FORMS)
        one_of("sde.last_step", self.last_step, (None, "Mean", "Tweedie", "Euler"))
        at_least("sde.num_steps", self.num_steps, 2)
        if not 0 <= self.last_step_size < 1:
            raise SettingsError(
                f"sde.last_step_size={self.last_step_size} is not in [0, 1): a part of the time"
            )


@dataclass(frozen=True, kw_only=True)
class DiffusionSettings:
    """Group ``diffusion``: the samplers of the processes gaussian, vp and sd_discrete.

    ``num_steps`` is text: a number, or for ddpm and ddim a spacing such as ddim50 or 10,15,20.
    """

    sampling_method: str = "ddim"
    num_steps: str = "50"
    eta: float = 0.0
    clip_denoised: bool = False
    variant: str = "fast"
    order: int = 3
    grid: str = "time_uniform"
    correction: str = "dpm_solver"
    lower_order_final: bool = True
    last_step: bool = True
    lambda_floor: float | None = -5.1
    atol: float = 0.0078
    rtol: float = 0.05

    def __post_init__(self):
        one_of("diffusion.sampling_method", self.sampling_method, DIFFUSION_METHODS)
        one_of("diffusion.variant", self.variant, DPM_VARIANTS)
        one_of("diffusion.grid", self.grid, DPM_GRIDS)
        one_of("diffusion.correction", self.correction, ("dpm_solver", "taylor"))
        one_of("diffusion.order", self.order, (1, 2, 3))
        positive("diffusion.atol", self.atol)
        positive("diffusion.rtol", self.rtol)
        if not 0 <= self.eta <= 1:
            raise SettingsError(f"diffusion.eta={self.eta} is not in [0, 1]: 0 is deterministic, 1 ancestral")
        if self.eta and self.sampling_method != "ddim":
            raise SettingsError(
                f"diffusion.eta={self.eta} is for diffusion.sampling_method=ddim, not {self.sampling_method}: drop it"
            )
        if self.lambda_floor is not None and not self.lambda_floor < 0:
            raise SettingsError(
                f"diffusion.lambda_floor={self.lambda_floor} is not negative: give where the noise ends, such as -5.1, "
                "or null for no floor"
            )
        if not self.sampling_method.startswith("dpm_solver") and not self.last_step:
            raise SettingsError(
                f"diffusion.last_step=false: the steps of diffusion.sampling_method={self.sampling_method} end at the "
                "data, drop it"
            )
        if self.sampling_method.startswith("dpm_solver"):
            if not self.num_steps.isdecimal() or int(self.num_steps) < self.order:
                raise SettingsError(
                    f"diffusion.num_steps={self.num_steps} must be a number, {self.order} (diffusion.order) at least, "
                    f"for diffusion.sampling_method={self.sampling_method}"
                )
            if self.variant == "adaptive" and self.order == 1:
                raise SettingsError("diffusion.variant=adaptive needs diffusion.order=2 or 3")


@dataclass(frozen=True, kw_only=True)
class UpsampleSettings:
    """Group ``upsample``; ``factor`` 1 is off."""

    factor: int = 1
    eta: float = 0.3
    theta: float = 1.0
    matching: str = "exact"
    skip_tuning: str | None = None
    skip_tuning_range: tuple[float, float] = (0.82, 1.0)

    def __post_init__(self):
        at_least("upsample.factor", self.factor, 1)
        positive("upsample.theta", self.theta)
        one_of("upsample.matching", self.matching, ("exact", "as_published"))
        one_of("upsample.skip_tuning", self.skip_tuning, (None, *SKIP_TUNING))
        if not 0 < self.eta <= 1:
            raise SettingsError(
                f"upsample.eta={self.eta} is not in (0, 1]: give a share of the sampling time"
            )
        if self.factor == 1 and self.skip_tuning is not None:
            raise SettingsError(
                f"upsample.skip_tuning={self.skip_tuning} is for larger images: set upsample.factor=2 or more, "
                "or drop it"
            )

    def check(self, process: Mapping[str, Any], measures: bool) -> None:
        """Refuse what cannot be upsampled.

        Args:
            process: the process's node.
            measures: data are measured or encoded, and nothing is sampled.
        """
        if self.factor == 1:
            return
        if measures:
            raise SettingsError(
                f"upsample.factor={self.factor} with likelihood=true or ode.reverse=true: only samples are made "
                "larger, set upsample.factor=1"
            )
        target = str(process.get("_target_", ""))
        if self.matching == "as_published" and not target.endswith(".StableDiffusion"):
            raise SettingsError(
                "upsample.matching=as_published is the published table of process=sd_discrete: use "
                "upsample.matching=exact"
            )
        if self.skip_tuning is not None and target.endswith(".Flow"):
            raise SettingsError(
                f"upsample.skip_tuning={self.skip_tuning} weighs by the noise level 0..1000 that diffusion processes "
                "feed the model, process=flow feeds it otherwise: drop upsample.skip_tuning"
            )
