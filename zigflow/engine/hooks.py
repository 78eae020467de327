"""What is called while a run trains, and what of it is reported."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from .trackers import Trackers

if TYPE_CHECKING:
    from .step import StepRecord
    from .trainer import Trainer

__all__ = ["Hook", "Monitoring"]


class Hook:
    """A callback of the trainer; subclasses override what they need. Every process calls every method."""

    def begin(self, trainer: "Trainer") -> None:
        """Before the first step of this launch."""

    def after_step(self, trainer: "Trainer", record: "StepRecord") -> None:
        """After every step. What takes long asks ``trainer.should_stop()`` now and then and returns early."""

    def pending(self, trainer: "Trainer") -> bool:
        """Whether work for the step that the run is at was left undone, because the run was asked to stop."""
        return False


@dataclass(frozen=True)
class Monitoring:
    """What accompanies a run.

    Attributes:
        hooks: called in this order.
        trackers: where the lines of the log go besides.
        training_flops: operations of a sample's forward and backward pass; None logs no utilization.
        peak_flops: operations per second of one device; None logs no utilization.
    """

    hooks: tuple[Hook, ...] = ()
    trackers: Trackers = field(default_factory=Trackers)
    training_flops: float | None = None
    peak_flops: float | None = None
