"""The Z-order curve (Morton 1966) on every grid: tokens by the interleaved bits of their coordinates."""

import numpy as np

from scans.grid import frame_views
from scans.path import Order
from scans.registry import register_scan


@register_scan("morton")
def morton(h: int, w: int) -> list[Order]:
    """The Z-order curve in its eight symmetric positions; codes outside the grid are left out."""
    return joint_morton(1, h, w)


@register_scan("morton")
def joint_morton(t: int, h: int, w: int) -> list[Order]:
    """A three-dimensional Z-order curve in its eight positions in the plane."""
    return [view.ravel()[np.argsort(_codes(*view.shape))] for view in frame_views(t, h, w)]


def _codes(*sizes: int) -> Order:
    """Flat array of Morton codes of the raster tokens; the first axis has the higher bit of each group."""
    code = np.zeros(sizes, dtype=np.int64)
    for axis, coordinate in enumerate(np.indices(sizes, dtype=np.int64)):
        for bit in range((sizes[axis] - 1).bit_length()):
            code |= (coordinate >> bit & 1) << (bit * len(sizes) + len(sizes) - 1 - axis)
    return code.ravel()
