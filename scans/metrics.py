"""How well a path keeps neighbors together, in both directions: along the walk, and on the grid.

Distances on the grid are L1 (grid steps); a step to a diagonal neighbor has length 2.
"""

import math
from dataclasses import dataclass

import numpy as np

from scans.path import ScanPath


@dataclass(frozen=True)
class PathMetrics:
    """Numbers of one path over its grid.

    Attributes:
        continuity: share of steps of length 1, in [0, 1]; 1 for a walk without jumps.
        mean_jump: mean length of a step.
        max_jump: longest step.
        neighbor_gap: mean number of steps between two neighbors of the grid.
        window_spread: mean distance on the grid between tokens at most ``window`` steps apart.
    """

    continuity: float
    mean_jump: float
    max_jump: int
    neighbor_gap: float
    window_spread: float


def path_metrics(path: ScanPath, shape: tuple[int, ...] | None = None, window: int = 16) -> PathMetrics:
    """All numbers at once; ``shape`` defaults to the path's own grid. See the single functions."""
    steps = step_lengths(path, shape)
    return PathMetrics(
        continuity=continuity(path, shape),
        mean_jump=float(steps.mean()) if steps.size else 0.0,
        max_jump=int(steps.max(initial=0)),
        neighbor_gap=neighbor_gap(path, shape),
        window_spread=window_spread(path, shape, window),
    )


def visited_cells(path: ScanPath, shape: tuple[int, ...] | None = None) -> np.ndarray:
    """(L, len(shape)) grid coordinates in order of visit.

    Raises:
        ValueError: neither the path nor the caller gives a grid, or it has another number of tokens.
    """
    return np.stack(np.unravel_index(path.order, _grid_of(path, shape)), axis=1)


def _grid_of(path: ScanPath, shape: tuple[int, ...] | None) -> tuple[int, ...]:
    shape = shape or path.shape
    if shape is None or math.prod(shape) != len(path):
        raise ValueError(f"path {path.name!r} of {len(path)} tokens needs the shape of its grid, got {shape}")
    return shape


def step_lengths(path: ScanPath, shape: tuple[int, ...] | None = None) -> np.ndarray:
    """(L - 1,) L1 lengths of the steps."""
    return np.abs(np.diff(visited_cells(path, shape), axis=0)).sum(axis=1)


def continuity(path: ScanPath, shape: tuple[int, ...] | None = None) -> float:
    """Share of steps that go to a grid neighbor; 1 for a single token."""
    steps = step_lengths(path, shape)
    return float((steps == 1).mean()) if steps.size else 1.0


def neighbor_gap(path: ScanPath, shape: tuple[int, ...] | None = None) -> float:
    """Mean of |inverse[i] - inverse[j]| over all pairs of grid neighbors i, j; 0 without a pair."""
    ranks = path.inverse.reshape(_grid_of(path, shape))
    gaps = [np.abs(np.diff(ranks, axis=axis)).ravel() for axis in range(ranks.ndim)]
    every = np.concatenate(gaps)
    return float(every.mean()) if every.size else 0.0


def window_spread(path: ScanPath, shape: tuple[int, ...] | None = None, window: int = 16) -> float:
    """Mean L1 distance between tokens visited 1..window steps apart; 0 for a single token.

    Raises:
        ValueError: ``window`` is below 1.
    """
    if window < 1:
        raise ValueError(f"window must be at least 1, got {window}")
    cells = visited_cells(path, shape)
    lags = range(1, min(window, len(path) - 1) + 1)
    distances = [np.abs(cells[lag:] - cells[:-lag]).sum(axis=1) for lag in lags]
    return float(np.concatenate(distances).mean()) if distances else 0.0
