"""Walks along the anti-diagonals, turning round at the border, or all in one direction."""

import numpy as np

from scans.grid import along, corner_views, there_and_back
from scans.path import Order
from scans.registry import register_scan


def _turning(rows: int, columns: int) -> Order:
    """Anti-diagonals r + c = 0, 1, ...; even ones go up and to the right, odd ones down and to the left."""
    r, c = np.indices((rows, columns))
    line = r + c
    return np.lexsort((np.where(line % 2 == 0, c, r).ravel(), line.ravel()))


def _one_way(rows: int, columns: int) -> Order:
    """The anti-diagonals, each up and to the right."""
    r, c = np.indices((rows, columns))
    return np.lexsort((c.ravel(), (r + c).ravel()))


@register_scan("diagonal")
def diagonal(h: int, w: int) -> list[Order]:
    """Anti-diagonals with turns, from each corner, both ways. Steps go to one of the eight neighbours."""
    return along(_turning, corner_views(h, w))


@register_scan("diagonal")
def joint_diagonal(t: int, h: int, w: int) -> list[Order]:
    """The diagonal walks through all frames, each frame walked back from where the last one ended."""
    return there_and_back(diagonal(h, w), t)


@register_scan("diagonal_sweep")
def diagonal_sweep(h: int, w: int) -> list[Order]:
    """Anti-diagonals in one direction, with a jump at each end, from each corner, both ways."""
    return along(_one_way, corner_views(h, w))
