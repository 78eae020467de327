"""Walks through a whole video that treat time as one more axis: (t, h, w) only.

The joint forms of the image scans have the symmetries of a frame; these have every order of the axes, so that
time is innermost, in between and outermost by turns. Chosen by ``scan=`` they also replace a factorized
schedule, since they have no walk within a frame.
"""

from collections.abc import Callable

import numpy as np

from scans.grid import raster, there_and_back
from scans.hilbert import curve_of_box
from scans.path import Order
from scans.registry import register_scan
from scans.zigzag import snake

# Outermost axis first. The innermost is w, t, h by turns, so that three layers see every axis.
AXES = ((0, 1, 2), (1, 2, 0), (2, 0, 1), (0, 2, 1), (1, 0, 2), (2, 1, 0))
Box = tuple[int, int, int]


@register_scan("sweep3d")
def sweep3d(t: int, h: int, w: int) -> list[Order]:
    """Six sweeps, one for each order of the axes t, h, w; each forwards, then backwards."""
    return _both_ways(lambda box: raster(box[0], box[1] * box[2]).ravel(), (t, h, w))


@register_scan("zigzag3d")
def zigzag3d(t: int, h: int, w: int) -> list[Order]:
    """Six snakes, one for each order of the axes t, h, w; each forwards, then backwards. Unit steps only."""
    return _both_ways(lambda box: there_and_back([snake(box[1], box[2])], box[0])[0], (t, h, w))


@register_scan("hilbert3d")
def hilbert3d(t: int, h: int, w: int) -> list[Order]:
    """The three-dimensional Hilbert curve with its axes in six orders; each both ways. Unit steps only."""
    return _both_ways(lambda box: curve_of_box(box, 1 if box[1] >= box[2] else 2), (t, h, w))


def _both_ways(curve: Callable[[Box], Order], sizes: Box) -> list[Order]:
    """The curve drawn on the grid with its axes in each order, and each of these from its end."""
    voxels = np.arange(np.prod(sizes), dtype=np.int64).reshape(sizes)
    orders = []
    for axes in AXES:
        box = sizes[axes[0]], sizes[axes[1]], sizes[axes[2]]
        order = voxels.transpose(axes).ravel()[curve(box)]
        orders += [order, order[::-1]]
    return orders
