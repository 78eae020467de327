"""Exponential moving averages of the weights, kept in float32 under the parameters' names.

After an optimizer step on ``n`` images, ``ema <- d ema + (1 - d) weights``. A profile says what ``d`` is:

* half-life ``H`` images with ramp ``r``: ``d = 2 ** (-n / min(H, r * seen))``, ``seen`` the images before the
  step. While the run is young the memory is a share of its length, so the initial weights fade at once; the
  first step copies the weights (Karras et al., "Elucidating the design space", NeurIPS 2022, appendix F.2,
  describe such a ramp);
* constant rate: ``d = rate``, what the official ZigMa and DiT code does (0.9999).

The averages start as a copy of the weights. Frozen parameters are averaged too, integer tensors are not.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .checkpoint import check_names
from .tensors import assign, full, named_floating

__all__ = ["EmaProfile", "EmaProfiles"]


@dataclass(frozen=True)
class EmaProfile:
    """One way of averaging.

    Args:
        name: letters, digits, ``_``, ``-`` and ``.``; the file of the checkpoint is ``ema_<name>.safetensors``.
        half_life: images after which a weight's influence has halved; exclusive with ``rate``.
        ramp: the half-life is at most this share of the images seen; 0 turns the ramp off.
        rate: constant ``d`` per optimizer step, whatever the batch.

    Raises:
        ValueError: a name that cannot stand in a file name, both or none of ``half_life`` and ``rate``,
            or a value out of range.
    """

    name: str
    half_life: float | None = None
    ramp: float = 0.05
    rate: float | None = None

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", self.name):
            raise ValueError(
                f"an EMA profile's name must be letters, digits, '_', '-', '.', got {self.name!r}"
            )
        if (self.half_life is None) == (self.rate is None):
            raise ValueError(
                f"EMA profile {self.name!r}: give either half_life (images) or rate (per step), "
                f"got half_life={self.half_life!r} and rate={self.rate!r}"
            )
        if self.half_life is not None and not (self.half_life > 0 and math.isfinite(self.half_life)):
            raise ValueError(f"EMA profile {self.name!r}: half_life must be positive, got {self.half_life!r}")
        if self.rate is not None and not 0 <= self.rate < 1:
            raise ValueError(f"EMA profile {self.name!r}: rate must lie in [0, 1), got {self.rate!r}")
        if not self.ramp >= 0:
            raise ValueError(f"EMA profile {self.name!r}: ramp must be >= 0, got {self.ramp!r}")

    def decay(self, images_seen: int, batch: int) -> float:
        """``d`` of the step that takes ``images_seen`` to ``images_seen + batch``."""
        if self.rate is not None:
            return self.rate
        memory = self.half_life or 0.0
        if self.ramp > 0:
            memory = min(memory, self.ramp * images_seen)
        return 0.0 if memory <= 0 else 2.0 ** (-batch / memory)


class EmaProfiles:
    """The running averages of one model under several profiles.

    Args:
        model: its floating parameters are averaged, in their dtype but at least float32, on their device.
        profiles: distinct names.

    Raises:
        ValueError: two profiles share a name.
    """

    def __init__(self, model: nn.Module, profiles: Sequence[EmaProfile]):
        names = [profile.name for profile in profiles]
        if len(set(names)) != len(names):
            raise ValueError(f"EMA profiles need distinct names, got {names}")
        self.profiles = tuple(profiles)
        self._weights = named_floating(model)
        self._averages = {
            profile.name: {name: _master(weight) for name, weight in self._weights.items()}
            for profile in self.profiles
        }

    def names(self) -> list[str]:
        return [profile.name for profile in self.profiles]

    @torch.no_grad()
    def update(self, images_seen: int, batch: int) -> None:
        """Fold in the weights as they are now, ``images_seen`` being the images before this step."""
        weights = [weight.detach() for weight in self._weights.values()]
        if not weights:
            return
        for profile in self.profiles:
            averages = list(self._averages[profile.name].values())
            decay = profile.decay(images_seen, batch)
            torch._foreach_mul_(averages, decay)  # pyright: ignore[reportPrivateImportUsage]
            torch._foreach_add_(averages, weights, alpha=1.0 - decay)  # pyright: ignore[reportPrivateImportUsage]

    def state_dict(self, name: str) -> dict[str, Tensor]:
        """The averages of one profile: plain CPU tensors by parameter name (sharded: all ranks together)."""
        return {key: full(value) for key, value in self._of(name).items()}

    def load_state_dict(self, name: str, state: Mapping[str, Tensor]) -> None:
        """Take over stored averages.

        Raises:
            KeyError: no such profile.
            CheckpointError: names or shapes differ from the model's floating parameters.
        """
        check_names(f"EMA profile {name!r}", state, self._of(name))
        for key, target in self._of(name).items():
            assign(target, state[key])

    @torch.no_grad()
    def copy_to(self, model: nn.Module, name: str) -> None:
        """Put the averages of one profile into the parameters of ``model`` (another instance or the same)."""
        for key, weight in named_floating(model).items():
            weight.copy_(self._of(name)[key])

    def _of(self, name: str) -> dict[str, Tensor]:
        if name not in self._averages:
            raise KeyError(f"there is no EMA profile {name!r}; known: {', '.join(self.names()) or 'none'}")
        return self._averages[name]


def _master(weight: Tensor) -> Tensor:
    return weight.detach().to(torch.promote_types(weight.dtype, torch.float32)).clone()
