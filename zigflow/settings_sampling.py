"""How a checkpoint is sampled, as frozen, typed values: part of :mod:`zigflow.settings`."""

from dataclasses import dataclass

from zigflow.typed import SettingsError, key


@dataclass(frozen=True, kw_only=True)
class OdeSettings:
    """Group ``ode``; ``num_steps`` counts grid points, a fixed solver makes one step less."""

    sampling_method: str = key(
        "dopri5",
        "solver: dopri5 | bosh3 | euler | heun | midpoint | rk4 | torchdiffeq/NAME | another registered one",
    )
    num_steps: int = key(250, "grid points; a fixed-step solver makes one step less", least=2)
    atol: float = key(1e-6, "absolute tolerance of an adaptive solver", above=0)
    rtol: float = key(1e-3, "relative tolerance of an adaptive solver", above=0)
    last_step: bool = key(
        True,
        "where the interval ends before the data: to the data, one more call of the model; false: its noise stays",
    )
    reverse: bool = key(False, "encode data into noise instead")
    likelihood: bool = key(False, "as the key likelihood")


@dataclass(frozen=True, kw_only=True)
class SdeSettings:
    """Group ``sde``."""

    sampling_method: str = key("Euler", "solver: Euler | Heun | another registered one")
    num_steps: int = key(250, "grid points; one step less is made", least=2)
    diffusion_form: str = key(
        "sigma",
        "how much noise is added over time: constant | SBDM | sigma | linear | decreasing | increasing-decreasing",
    )
    diffusion_norm: float = key(1.0, "factor of the added noise")
    last_step: str | None = key(
        "Tweedie",
        "how the interval's end becomes data: null | Mean (published; overshoots) | Tweedie (expected data) | Euler",
    )
    last_step_size: float = key(0.04, "part of the time that the last step covers, in [0, 1)")

    def __post_init__(self):
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

    sampling_method: str = key("ddim", "ddpm | ddim | dpm_solver | dpm_solver++ | another registered one")
    num_steps: str = key(
        "50",
        'ddpm, ddim: steps, or a spacing: ddim50, "10,15,20"; dpm_solver: calls of the model before the last step',
    )
    eta: float = key(0.0, "ddim: 0 is deterministic, 1 as noisy as ddpm")
    clip_denoised: bool = key(False, "ddpm, ddim: clip the expected data to [-1, 1]")
    variant: str = key(
        "fast",
        "dpm_solver: fast | fast_equal_spans (as published for continuous time) | singlestep | multistep | adaptive",
    )
    order: int = key(3, "dpm_solver: 1 | 2 | 3", least=1)
    grid: str = key("time_uniform", "dpm_solver: logSNR | time_uniform | time_quadratic")
    correction: str = key("dpm_solver", "dpm_solver: dpm_solver | taylor")
    lower_order_final: bool = key(True, "dpm_solver: multistep ends with lower orders")
    last_step: bool = key(
        True, "dpm_solver: one more call of the model, a step to the data; false: the last time's noise stays"
    )
    lambda_floor: float | None = key(
        -5.1, "dpm_solver: start where lambda = log(alpha / sigma) is at least this; null: at the first time"
    )
    atol: float = key(0.0078, "dpm_solver: absolute tolerance of the adaptive variant", above=0)
    rtol: float = key(0.05, "dpm_solver: relative tolerance of the adaptive variant", above=0)

    def __post_init__(self):
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

    factor: int = key(1, "images so many times as high and wide as trained on; 1: off", least=1)
    eta: float = key(0.3, "the first so large share of the process's time is guided by the small image")
    theta: float = key(1.0, "how much of the block means is replaced", above=0)
    matching: str = key("exact", "of times: exact | as_published (process=sd_discrete)")
    skip_tuning: str | None = key(
        None,
        "weights of the long skips of dim, uvit, dis: null | as_intended | as_published (off in effect)",
    )
    skip_tuning_range: tuple[float, float] = key(
        (0.82, 1.0), "weights of the last and the first joining block at pure noise"
    )

    def __post_init__(self):
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
