"""Group ``upsample`` of the configuration: sampling larger than the model was trained."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from zigflow.typed import SettingsError, at_least, one_of, positive

SKIP_TUNING = ("as_published", "as_intended")


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
