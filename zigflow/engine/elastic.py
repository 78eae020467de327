"""What a run that continues keeps, whatever is asked for or by default now: its global batch and its data order."""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from zigflow.data.global_batch import split_global_batch

from . import checkpoint

__all__ = ["Split", "shards_at_once_for", "split_for"]

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
    stored = _stored(run_dir, "global_batch")
    if not isinstance(stored, int) or stored == asked.global_batch:
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


def shards_at_once_for(run_dir: Path, asked: int | None, shards: int) -> int | None:
    """How many of ``shards`` shards mix: a run that continues keeps the number that it began with.

    Args:
        asked: as configured; None for the default.

    Raises:
        ValueError: another number was asked for, by which the samples would come in another order.
    """
    order = (_stored(run_dir, "identity") or {}).get("order") or {}
    stored = order.get("shards_at_once")
    if not isinstance(stored, int) or isinstance(stored, bool) or stored < 1:
        return asked
    if asked is not None and min(asked, shards) != min(stored, shards):
        raise ValueError(
            f"data.shards_at_once={asked}: {run_dir} began with {stored}, and its samples would come in another order; "
            "drop data.shards_at_once, or start a new run_dir"
        )
    return stored


def _stored(run_dir: Path, key: str) -> Any:
    """What the newest checkpoint says of its data."""
    found = checkpoint.find_latest(run_dir)
    try:
        return None if found is None else found.trainer["data"][key]
    except (OSError, ValueError, KeyError, TypeError):
        # A damaged checkpoint is reported when it is opened.
        return None
