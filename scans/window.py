"""Local windows, one finished before the next is entered.

``window{k}`` sweeps inside k x k windows and over them, as in LocalMamba (Huang et al. 2024,
arXiv 2403.09338); ``window{k}_zigzag`` turns round instead of jumping back. The sizes 2, 4 and 8 are
registered; `windows` and `window_bands` make the orders of any other. Windows are cut off where the grid ends.
"""

import numpy as np

from scans.grid import along, corner_views, frame_views
from scans.path import Order
from scans.registry import check_grid, register_scan

SIZES = (2, 4, 8)


def windows(t: int, h: int, w: int, size: int) -> list[Order]:
    """Boxes of ``size`` frames, rows and columns, swept inside and swept over; eight positions in the plane.

    Raises:
        ValueError: a size is below 1.
    """
    t, h, w, size = check_grid((t, h, w, size))
    return [view.ravel()[_swept(view.shape, size)] for view in frame_views(t, h, w)]


def window_bands(h: int, w: int, size: int) -> list[Order]:
    """Bands of ``size`` rows, each walked column by column, up and down, and the next one back; eight positions.

    A band is a row of windows. Steps inside it are unit steps, and so is the one to the next band when the
    band has an odd number of columns.

    Raises:
        ValueError: a size is below 1.
    """
    h, w, size = check_grid((h, w, size))
    return along(lambda rows, columns: _turning(rows, columns, size), corner_views(h, w))


def _swept(sizes: tuple[int, ...], size: int) -> Order:
    inside = np.indices(sizes)
    keys = [*inside[::-1], *(inside[::-1] // size)]
    return np.lexsort([key.ravel() for key in keys])


def _turning(rows: int, columns: int, size: int) -> Order:
    r, c = np.indices((rows, columns))
    band = r // size
    column = np.where(band % 2 == 0, c, columns - 1 - c)
    row = np.where(column % 2 == 0, r, -r)
    return np.lexsort([key.ravel() for key in (row, column, band)])


def _register(size: int) -> None:
    def swept(h: int, w: int) -> list[Order]:
        return windows(1, h, w, size)

    def joint(t: int, h: int, w: int) -> list[Order]:
        return windows(t, h, w, size)

    def turning(h: int, w: int) -> list[Order]:
        return window_bands(h, w, size)

    swept.__doc__ = f"Windows of {size} x {size} tokens, swept inside and swept over, from each corner."
    joint.__doc__ = f"Windows of {size} x {size} x {size} tokens, swept inside and swept over."
    turning.__doc__ = f"Bands of {size} rows or columns, walked across up and down, the next band back."
    register_scan(f"window{size}")(swept)
    register_scan(f"window{size}")(joint)
    register_scan(f"window{size}_zigzag")(turning)


for _size in SIZES:
    _register(_size)
