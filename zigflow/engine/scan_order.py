"""The order that every layer of a model walks, as a digest: weights that were trained along one order fit no other.

A configuration names a scan; what the name stands for is code, which may be edited. So the digest covers the orders
themselves: gathers, folds and branches of each layer over the grid that the model was built for.
"""

import hashlib
import logging
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from zigflow.nn import as_denoiser

from .checkpoint import Checkpoint, CheckpointError
from .tensors import full

__all__ = ["check_scan", "scan_facts"]

log = logging.getLogger(__name__)


def scan_facts(model: nn.Module, grid: tuple[int, int, int] | None = None) -> dict[str, str] | None:
    """``{"name", "sha256"}`` of what a model's layers walk, its ``scan_walks()``; None for a model without scans.

    Args:
        grid: another token grid (T, h, w) than that which the model was built for; None is then also "not known".
    """
    asked = as_denoiser(model)
    walks = asked.scan_walks() if grid is None else asked.scan_walks_at(grid)
    if walks is None:
        return None
    digest = hashlib.sha256()
    for parts in walks:
        digest.update(b"\n")
        for part in parts:
            if isinstance(part, Tensor):
                array = full(part).numpy().astype("<i8")
                digest.update(f" {array.shape} ".encode() + array.tobytes())
            else:
                digest.update(f" {part}".encode())
    return {"name": asked.scan_name, "sha256": digest.hexdigest()[:32]}


def check_scan(model: nn.Module, checkpoint: Checkpoint, grid: tuple[int, int, int] | None = None) -> None:
    """Refuse a model whose layers walk otherwise than those that a checkpoint was trained with.

    Args:
        grid: that of the checkpoint, where the model was built for another size.

    Raises:
        CheckpointError: they do; the scan is named.
    """
    now, before = scan_facts(model, grid), checkpoint.trainer.get("scan")
    if now is None:
        return
    if before is None:
        log.info(
            "%s was written before the orders of scans were kept: scan %r is taken as it is now",
            checkpoint.path, now["name"],
        )  # fmt: skip
    elif before["sha256"] != now["sha256"]:
        raise CheckpointError(
            f"{checkpoint.path} was trained along another order: {changed_scan(before, now)}"
        )


def changed_scan(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """What differs between two facts about scans, and the cure."""
    if before.get("name") != now.get("name"):
        return f"scan {before.get('name')!r} there, {now.get('name')!r} here; use the same scan"
    here, there = (str(facts.get("sha256", ""))[:8] for facts in (now, before))
    return (
        f"scan {now.get('name')!r} walks {here} here and walked {there} there, so its code was edited since; restore "
        "it, or register the new order under a name of its own and train with that"
    )
