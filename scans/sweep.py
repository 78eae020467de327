"""Sweeps: whole rows or columns, always in the same direction, with a jump at each line's end.

``sweepK`` alternates K directions over the layers, with one set of weights. The official "sweep-2"
model (``scan_type="v2"``) is something else, one raster order under a bidirectional mixer.
"""

import numpy as np

from scans.grid import raster
from scans.path import Order
from scans.registry import register_scan


def _directions(frames: Order) -> list[Order]:
    rows = frames.ravel()
    columns = frames.swapaxes(-1, -2).ravel()
    return [rows, rows[::-1], columns, columns[::-1]]


def _frames(t: int, h: int, w: int) -> Order:
    return np.arange(t * h * w, dtype=np.int64).reshape(t, h, w)


@register_scan("sweep1")
def sweep1(h: int, w: int) -> list[Order]:
    """Row by row from the top left: the raster order itself."""
    return _directions(raster(h, w))[:1]


@register_scan("sweep2")
def sweep2(h: int, w: int) -> list[Order]:
    """Row by row, forwards and backwards."""
    return _directions(raster(h, w))[:2]


@register_scan("sweep4")
def sweep4(h: int, w: int) -> list[Order]:
    """Rows, rows backwards, columns, columns backwards."""
    return _directions(raster(h, w))


@register_scan("sweep")
def sweep(h: int, w: int) -> list[Order]:
    """Rows, rows backwards, columns, columns backwards (sweep4)."""
    return _directions(raster(h, w))


@register_scan("sweep1")
def joint_sweep1(t: int, h: int, w: int) -> list[Order]:
    """Frame by frame, row by row."""
    return _directions(_frames(t, h, w))[:1]


@register_scan("sweep2")
def joint_sweep2(t: int, h: int, w: int) -> list[Order]:
    """Frame by frame, row by row, forwards and backwards."""
    return _directions(_frames(t, h, w))[:2]


@register_scan("sweep4")
def joint_sweep4(t: int, h: int, w: int) -> list[Order]:
    """Frame by frame: rows, columns, and both backwards."""
    return _directions(_frames(t, h, w))


@register_scan("sweep")
def joint_sweep(t: int, h: int, w: int) -> list[Order]:
    """Frame by frame: rows, columns, and both backwards (sweep4)."""
    return _directions(_frames(t, h, w))
