"""A run that continues on another number of processes keeps its global batch."""

import logging
from dataclasses import dataclass
from pathlib import Path

from zigflow.data.global_batch import split_global_batch

from . import checkpoint

__all__ = ["Split", "split_for"]

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Split:
    """How one optimizer step is divided: ``global_batch = processes * grad_accum * batch_size``."""

    batch_size: int
    grad_accum: int
    processes: int

    @property
    def global_batch(self) -> int:
        return self.batch_size * self.grad_accum * self.processes


def split_for(run_dir: Path, batch_size: int, grad_accum: int, processes: int) -> Split:
    """The division to train with, from what was asked for and what the run directory holds.

    A new run takes what was asked for. One that continues keeps the global batch of its newest checkpoint, so that
    the same samples stand in the same steps: ``batch_size`` is then the most that a process takes at once, and
    ``grad_accum`` follows.

    Args:
        batch_size, grad_accum: as configured, per process.

    Raises:
        ValueError: the stored global batch does not divide by ``processes``; the nearest numbers that do are named.
    """
    asked = Split(batch_size, grad_accum, processes)
    stored = _stored(run_dir)
    if stored is None or stored == asked.global_batch:
        return asked
    try:
        local, accumulate = split_global_batch(stored, processes, batch_size)
    except ValueError as error:
        raise ValueError(f"{run_dir} continues with its global batch of {stored}: {error}") from error
    log.info(
        "the global batch of %d that %s began with stands: %d processes x %d micro-batches x %d samples "
        "(asked for: %d x %d x %d)",
        stored, run_dir, processes, accumulate, local, processes, grad_accum, batch_size,
    )  # fmt: skip
    return Split(local, accumulate, processes)


def _stored(run_dir: Path) -> int | None:
    found = checkpoint.find_latest(run_dir)
    try:
        return None if found is None else int(found.trainer["data"]["global_batch"])
    except (OSError, ValueError, KeyError, TypeError):
        # A damaged checkpoint is reported when it is opened.
        return None
