"""Counting the samples that were passed over because they could not be read."""

import hashlib
import logging
from collections.abc import Iterable

from .tar import BudgetError

log = logging.getLogger(__name__)


class SkippedSamples:
    """The different unreadable samples that a run has met, as far as this process knows.

    Args:
        limit: how many there may be.

    Attributes:
        messages: what was wrong, with the places, in the order of this process's batches.
        known: a digest of each message, those of other processes and earlier launches among them once they are added.
    """

    def __init__(self, limit: int):
        self.limit = limit
        self.messages: dict[str, None] = {}
        self.known: set[str] = set()

    def add(self, messages: Iterable[str]) -> None:
        """Count and log what was skipped.

        Raises:
            BudgetError: this process alone knows of too many.
        """
        for message in messages:
            if message not in self.messages:
                self.messages[message] = None
                self.known.add(hashlib.sha256(message.encode()).hexdigest()[:16])
                log.warning("skipped, replaced by the next readable sample: %s", message)
        self.check(len(self.known))

    def check(self, total: int) -> None:
        """Compare a count, of this process or over all, with the budget.

        Raises:
            BudgetError: it is exceeded; the last problem of this process is named.
        """
        if total > self.limit:
            last = f"; the last one here: {list(self.messages)[-1]}" if self.messages else ""
            raise BudgetError(f"{total} unreadable samples, data.max_skipped is {self.limit}{last}")
