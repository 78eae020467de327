"""Rectangular spirals, from a corner to the centre and back out."""

import numpy as np

from scans.grid import along, rotated_views, there_and_back
from scans.path import Order
from scans.registry import register_scan


def _inward(rows: int, columns: int) -> Order:
    """Clockwise from the top left: sort by ring, then by distance walked along the ring."""
    r, c = np.indices((rows, columns))
    ring = np.minimum(np.minimum(r, c), np.minimum(rows - 1 - r, columns - 1 - c))
    high, wide = rows - 1 - 2 * ring, columns - 1 - 2 * ring
    down, right = r - ring, c - ring
    walked = np.select(
        [down == 0, right == wide, down == high],
        [right, wide + down, wide + high + (wide - right)],
        default=2 * wide + high + (high - down),
    )
    return np.lexsort((walked.ravel(), ring.ravel()))


@register_scan("spiral")
def spiral(h: int, w: int) -> list[Order]:
    """Four clockwise spirals from TL, TR, BR, BL, each inwards, then outwards. Unit steps only."""
    inward = along(_inward, rotated_views(h, w))
    return [path for order in inward for path in (order, order[::-1])]


@register_scan("spiral")
def joint_spiral(t: int, h: int, w: int) -> list[Order]:
    """The spirals through all frames: inwards in one frame, outwards in the next."""
    return there_and_back(spiral(h, w), t)
