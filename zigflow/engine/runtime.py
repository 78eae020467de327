"""Where a run computes."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from .ranks import Ranks

if TYPE_CHECKING:
    from accelerate import Accelerator

__all__ = ["Runtime"]


@dataclass(frozen=True)
class Runtime:
    """A device, and the processes that share the work.

    Attributes:
        device: of this process.
        ranks: this process among the others.
        accelerator: what joined them; None for one process that nothing was launched for.
    """

    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    ranks: Ranks = field(default_factory=Ranks)
    accelerator: "Accelerator | None" = None

    @classmethod
    def of(cls, accelerator: "Accelerator") -> "Runtime":
        """The processes that an accelerator has joined. Collectives run on a GPU over nccl, else on the CPU."""
        device = accelerator.device
        return cls(device, Ranks(device if device.type == "cuda" else "cpu"), accelerator)
