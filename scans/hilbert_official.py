"""The table that ZigMa's ``hilbertN{k}`` uses, as published."""

from scans.hilbert import rank_maps
from scans.path import Order
from scans.registry import register_scan


@register_scan("hilbert_official")
def hilbert_official(h: int, w: int) -> list[Order]:
    """The inverse of each `hilbert` path, as published by ZigMa: needed for its checkpoints, not continuous.

    The published code gathers with the rank map (token -> step) where a visiting order (step -> token)
    belongs. Equal to the stored tables on squares; other grids follow the same construction.
    """
    return rank_maps(1, h, w)
