"""Grids of raster indices: the symmetric views of one curve, and frames joined into one walk."""

from collections.abc import Callable, Iterable, Iterator

import numpy as np

from scans.path import Order

Curve = Callable[[int, int], Order]


def raster(h: int, w: int) -> Order:
    """(h, w) array of raster indices."""
    return np.arange(h * w, dtype=np.int64).reshape(h, w)


def corner_views(h: int, w: int) -> Iterator[Order]:
    """The grid's eight symmetric views: from each corner TL, TR, BL, BR, rows first, then columns first.

    A view's first entry is its corner and its first row is what is walked first; the column views
    have shape (w, h).
    """
    grid = raster(h, w)
    for view in (grid, grid[:, ::-1], grid[::-1], grid[::-1, ::-1]):
        yield view
        yield view.T


def frame_views(t: int, h: int, w: int) -> Iterator[Order]:
    """`corner_views` of every frame at once: eight arrays of shape (t, h, w) or (t, w, h)."""
    frames = np.arange(t * h * w, dtype=np.int64).reshape(t, h, w)
    for view in (frames, frames[..., ::-1], frames[:, ::-1], frames[:, ::-1, ::-1]):
        yield view
        yield view.swapaxes(1, 2)


def rotated_views(h: int, w: int) -> Iterator[Order]:
    """The four rotations of the grid: first entry at TL, TR, BR, BL, first row walked clockwise."""
    for turns in range(4):
        yield np.rot90(raster(h, w), turns)


def along(curve: Curve, views: Iterable[Order]) -> list[Order]:
    """Visiting orders of one curve drawn on each view: ``curve(rows, columns)`` indexes the flat view."""
    return [view.ravel()[curve(view.shape[0], view.shape[1])] for view in views]


def there_and_back(orders: Iterable[Order], t: int) -> list[Order]:
    """Joint (t, h, w) orders out of (h, w) orders: odd frames are walked backwards.

    Frame f + 1 starts at the pixel where frame f ended, so a walk without jumps stays one.
    """
    return [np.concatenate([(o if f % 2 == 0 else o[::-1]) + f * len(o) for f in range(t)]) for o in orders]
