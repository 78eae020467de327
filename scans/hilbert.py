"""A Hilbert curve for every grid: (h, w) and (t, h, w), any sizes, no jumps.

The idea of a Hilbert curve on boxes of any size is J. Cerveny's ("gilbert"). A box is walked from one
corner to the other end of one of its edges, the main leg, by cutting it into boxes that are walked in
the same way:

* long: the main leg is over 1.5 times the others; two boxes, one after the other along it;
* U: up the first half of a side leg, along the main leg through the second half, and back down; three boxes;
* octants: the same in both side legs at once; five boxes, three of them two octants long.

On a chessboard coloring such a walk of unit steps is possible only if the main leg is even or all legs
are odd. Cutting off even parts keeps that true in every part (octants: if a side leg is even too), so
choosing the first main leg well gives unit steps everywhere. On squares the first path starts at the top
left and ends at the bottom left; at powers of two it is Hilbert's.
"""

import numpy as np

from scans.path import Order
from scans.registry import register_scan

Leg = tuple[int, int]  # (axis, length; negative when it runs against the axis)
Memo = dict[tuple[Leg, Leg, Leg], np.ndarray]


@register_scan("hilbert")
def hilbert(h: int, w: int) -> list[Order]:
    """The Hilbert curve in its eight symmetric positions, on any grid. Unit steps only."""
    return [np.argsort(ranks) for ranks in rank_maps(1, h, w)]


@register_scan("hilbert")
def joint_hilbert(t: int, h: int, w: int) -> list[Order]:
    """A three-dimensional Hilbert curve in its eight positions in the plane. Unit steps only."""
    return [np.argsort(ranks) for ranks in rank_maps(t, h, w)]


def rank_maps(t: int, h: int, w: int) -> list[Order]:
    """For each of the eight positions, the (t*h*w,) step at which each raster token is visited.

    With R the rank map as an array of frames, the positions are R, R^T, and both after one, two and
    three quarter turns counter-clockwise, as in ZigMa. Where that swaps h and w, the curve of the (w, h)
    grid is used; there R has the longer side of a frame as main leg and R^T the shorter one.
    """
    main = 1 if h >= w else 2
    upright = curve_of_box((t, h, w), main).argsort().reshape(t, h, w)
    lying = upright if h == w else curve_of_box((t, w, h), main).argsort().reshape(t, w, h)
    maps = []
    for turns in range(4):
        straight, swapped = (upright, lying) if turns % 2 == 0 else (lying, upright)
        maps.append(np.rot90(straight, turns, axes=(1, 2)).ravel())
        maps.append(np.rot90(swapped, turns, axes=(1, 2)).swapaxes(1, 2).ravel())
    return maps


def curve_of_box(shape: tuple[int, int, int], axis: int) -> Order:
    """Visiting order of the box from its first corner, mainly along ``axis``, as raster indices.

    A box over twice as long elsewhere is walked along its longest leg: across, it would lose its locality.
    """
    _, h, w = shape
    legs = sorted(enumerate(shape), key=lambda leg: -leg[1])
    main = (axis, shape[axis]) if legs[0][1] <= 2 * shape[axis] else legs[0]
    one, other = (leg for leg in legs if leg[0] != main[0])
    even = one if one[1] % 2 == 0 else other
    memo: Memo = {}
    if main[1] % 2 == 1 and even[1] % 2 == 0:
        # No walk of unit steps ends at this leg's other end, so only an even part of the leg is walked along;
        # the rest, an odd number of lines, is walked along an even leg.
        side = other if even is one else one
        rest = min(main[1] // 2 | 1, even[1] - 1)
        start = (main[0], main[1] - rest)
        cells = _walk(even, (main[0], rest), side, memo)
        if start[1]:
            cells = np.concatenate([_walk(start, even, side, memo), cells + _vector(start)])
    else:
        cells = _walk(main, one, other, memo)
    return cells @ np.array([h * w, w, 1])


def _walk(main: Leg, left: Leg, right: Leg, memo: Memo) -> np.ndarray:
    """Cells (n, 3) of the box, relative to its first corner, ending at the last cell of ``main``."""
    if abs(left[1]) < abs(right[1]):
        left, right = right, left
    key = (main, left, right)
    if key not in memo:
        memo[key] = _cut(main, left, right, memo)
    return memo[key]


def _cut(main: Leg, left: Leg, right: Leg, memo: Memo) -> np.ndarray:
    a, b, c = abs(main[1]), abs(left[1]), abs(right[1])
    if b == 1:
        return np.arange(a)[:, None] * _vector(_unit(main))
    if 2 * a > 3 * b:
        parts = _cut_long(main, left, right)
    elif 3 * b <= 4 * c and a % 2 == 0 and (b % 2 == 0 or c % 2 == 0):
        parts = _cut_octants(main, left, right) if c % 2 == 0 else _cut_octants(main, right, left)
    else:
        parts = _cut_u(main, left, right)
    return np.concatenate([_walk(*legs, memo) + start for start, legs in parts])


Part = tuple[np.ndarray, tuple[Leg, Leg, Leg]]


def _cut_long(main: Leg, left: Leg, right: Leg) -> list[Part]:
    near, far = _even_half(main)
    return [(_vector(), (near, left, right)), (_vector(near), (far, left, right))]


def _cut_u(main: Leg, left: Leg, right: Leg) -> list[Part]:
    near, far = _half(main)
    low, high = _even_half(left)
    return [
        (_vector(), (low, near, right)),
        (_vector(low), (main, high, right)),
        (_vector(_last(main), _last(low)), (_back(low), _back(far), right)),
    ]


def _cut_octants(main: Leg, left: Leg, right: Leg) -> list[Part]:
    near, far = _even_half(main)
    low, high = _even_half(left)
    front, rear = _even_half(right)
    return [
        (_vector(), (low, front, near)),
        (_vector(low), (right, near, high)),
        (_vector(_last(low), _last(right)), (main, _back(low), _back(rear))),
        (_vector(_last(main), low, _last(right)), (_back(right), _back(far), high)),
        (_vector(_last(main), _last(low)), (_back(low), front, _back(far))),
    ]


def _half(leg: Leg) -> tuple[Leg, Leg]:
    """Two parts of a leg; an odd one is cut at the lower coordinate, whichever way it runs."""
    axis, length = leg
    return (axis, length // 2), (axis, length - length // 2)


def _even_half(leg: Leg) -> tuple[Leg, Leg]:
    """As `_half`, the first part made even, unless the leg has only two cells."""
    axis, length = leg
    half = length // 2
    if half % 2 and abs(length) > 2:
        half += 1 if length > 0 else -1
    return (axis, half), (axis, length - half)


def _unit(leg: Leg) -> Leg:
    return leg[0], 1 if leg[1] > 0 else -1


def _last(leg: Leg) -> Leg:
    return leg[0], leg[1] - _unit(leg)[1]


def _back(leg: Leg) -> Leg:
    return leg[0], -leg[1]


def _vector(*legs: Leg) -> np.ndarray:
    vector = np.zeros(3, dtype=np.int64)
    for axis, length in legs:
        vector[axis] += length
    return vector
