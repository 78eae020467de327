"""How a checkpoint is sampled, as frozen, typed values: part of :mod:`zigflow.settings`."""

from dataclasses import dataclass

from zigflow.typed import SettingsError, at_least, positive


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
        at_least("sde.num_steps", self.num_steps, 2)
        if not 0 <= self.last_step_size < 1:
            raise SettingsError(
                f"sde.last_step_size={self.last_step_size} is not in [0, 1): a part of the time"
            )


@dataclass(frozen=True, kw_only=True)
class DiffusionSettings:
    """Group ``diffusion``: the samplers of the processes gaussian, vp and sd_discrete.

    Each sampler takes the keys that it has; ``num_steps`` is text: a number, or for ddpm and ddim a spacing such as
    ddim50 or 10,15,20.
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
        at_least("diffusion.order", self.order, 1)
        positive("diffusion.atol", self.atol)
        positive("diffusion.rtol", self.rtol)
        if not 0 <= self.eta <= 1:
            raise SettingsError(f"diffusion.eta={self.eta} is not in [0, 1]: 0 is deterministic, 1 ancestral")
        if self.lambda_floor is not None and not self.lambda_floor < 0:
            raise SettingsError(
                f"diffusion.lambda_floor={self.lambda_floor} is not negative: give where the noise ends, such as -5.1, "
                "or null for no floor"
            )


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
        if not 0 < self.eta <= 1:
            raise SettingsError(
                f"upsample.eta={self.eta} is not in (0, 1]: give a share of the sampling time"
            )
        if self.factor == 1 and self.skip_tuning is not None:
            raise SettingsError(
                f"upsample.skip_tuning={self.skip_tuning} is for larger images: set upsample.factor=2 or more, "
                "or drop it"
            )

    def check(self, measures: bool) -> None:
        """Refuse to upsample where data are measured or encoded (``measures``), and nothing is sampled."""
        if self.factor > 1 and measures:
            raise SettingsError(
                f"upsample.factor={self.factor} with likelihood=true or ode.reverse=true: only samples are made "
                "larger, set upsample.factor=1"
            )
