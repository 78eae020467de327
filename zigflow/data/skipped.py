"""Counting the samples that were passed over because they could not be read."""

import logging
from collections.abc import Iterable, Iterator

from .batch import Batch
from .tar import BudgetError

log = logging.getLogger(__name__)


class SkippedSamples:
    """The different unreadable samples that one process has met since it started.

    Args:
        limit: how many there may be.

    Attributes:
        messages: what was wrong, with the places, in the order of the batches.
    """

    def __init__(self, limit: int):
        self.limit = limit
        self.messages: dict[str, None] = {}

    def watch(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """The batches, after what they skipped has been counted and logged.

        Raises:
            BudgetError: this process alone has met too many.
        """
        for batch in batches:
            for message in batch.skipped:
                if message not in self.messages:
                    self.messages[message] = None
                    log.warning("skipped, replaced by the next readable sample: %s", message)
            self.check(len(self.messages))
            yield batch

    def check(self, total: int) -> None:
        """Compare a count, of this process or summed over all, with the budget.

        Raises:
            BudgetError: it is exceeded; the last problem of this process is named.
        """
        if total > self.limit:
            last = f"; the last one here: {list(self.messages)[-1]}" if self.messages else ""
            raise BudgetError(f"{total} unreadable samples, data.max_skipped is {self.limit}{last}")
