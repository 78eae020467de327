"""The budget of unreadable samples, over all processes and all launches of a run."""

import json
import logging

from zigflow.data.skipped import SkippedSamples

from .step import StepRecord
from .trainer import Hook, Trainer

__all__ = ["SkipBudget"]

log = logging.getLogger(__name__)


class SkipBudget(Hook):
    """Counts unreadable samples; at logged and at saved steps all processes join theirs, and stop together.

    What was skipped stands in the counters of a checkpoint, so that a sample which a launch meets again counts once.

    Args:
        limit: how many there may be.
    """

    def __init__(self, limit: int):
        self.skipped = SkippedSamples(limit)
        self._logged = 0

    def begin(self, trainer: Trainer) -> None:
        """Before the first step: what earlier launches have met counts."""
        self.skipped.known.update(trainer.counters.unreadable)

    def after_step(self, trainer: Trainer, record: StepRecord) -> None:
        """Count, and compare with the budget.

        Raises:
            BudgetError: it is exceeded.
        """
        self.skipped.add(record.skipped)
        every = (trainer.options.log_every, trainer.options.ckpt_every)
        if all(record.step % steps for steps in every):
            return
        parts = trainer.ranks.gather(json.dumps(sorted(self.skipped.known)).encode())
        self.skipped.known.update(*(json.loads(part) for part in parts))
        total = len(self.skipped.known)
        trainer.counters.unreadable = sorted(self.skipped.known)
        if total != self._logged:
            log.warning("%d unreadable samples were replaced so far, over all processes", total)
            self._logged = total
        self.skipped.check(total)
