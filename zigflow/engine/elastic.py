"""What a run that continues keeps, whatever is asked for or by default now: its global batch and its data order."""

import logging
from pathlib import Path
from typing import Any

from zigflow.data.global_batch import GlobalBatch, split_global_batch

from . import checkpoint
from .ranks import Ranks

__all__ = ["global_batch_for", "shards_at_once_for"]

log = logging.getLogger(__name__)


def global_batch_for(run_dir: Path, batch_size: int, grad_accum: int, ranks: Ranks) -> GlobalBatch:
    """The global batch to train with, from what was asked for and what the run directory holds.

    A new run takes what was asked for. One that continues keeps the global batch of its newest checkpoint, so that
    the same samples stand in the same steps: ``batch_size`` is then the most that a process takes at once, and
    ``grad_accum`` follows.

    Args:
        batch_size, grad_accum: as configured, per process.

    Raises:
        ValueError: the stored global batch does not divide by the number of processes; the nearest that do are named.
    """
    asked = GlobalBatch.of(batch_size, grad_accum, ranks.size, ranks.rank)
    stored = _stored(run_dir, "global_batch")
    if not isinstance(stored, int) or stored == asked.size:
        return asked
    try:
        local, accumulate = split_global_batch(stored, ranks.size, batch_size)
    except ValueError as error:
        raise ValueError(f"{run_dir} continues with its global batch of {stored}: {error}") from error
    log.info(
        "the global batch of %d that %s began with stands: %d processes x %d micro-batches x %d samples "
        "(asked for: %d x %d x %d)",
        stored, run_dir, ranks.size, accumulate, local, ranks.size, grad_accum, batch_size,
    )  # fmt: skip
    return GlobalBatch.of(local, accumulate, ranks.size, ranks.rank)


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
