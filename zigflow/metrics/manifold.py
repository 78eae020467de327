"""Precision, recall, density and coverage by nearest-neighbor balls, and distances to the nearest real image.

Kynkaanniemi et al., "Improved precision and recall metric for assessing generative models" (2019); Naeem et
al., "Reliable fidelity and diversity metrics for generative models" (2020). The ball of a point is closed and
reaches to its k-th nearest other point of the same set.

Distances are Euclidean, from differences in float64 (not from inner products): equal points are at distance
zero exactly. Work goes in blocks of rows, so memory is bounded; the result does not depend on the block.

Legend: N real points, M generated points, F features.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

__all__ = ["coverage", "manifold_scores", "nearest_distance", "nearest_distances", "neighbor_radii"]

_BLOCK_BYTES = 1 << 26


def _points(name: str, x: Tensor) -> Tensor:
    """(N, ...) as (N, F) float64."""
    if x.ndim < 2 or not len(x):
        raise ValueError(f"{name} must hold points (N, F) with N >= 1, got shape {tuple(x.shape)}")
    if x.device.type == "mps":
        x = x.cpu()
    x = x.detach().reshape(len(x), -1).to(torch.float64)
    if not x.isfinite().all():
        raise ValueError(f"{name} holds a value that is not finite")
    return x


def _check_pair(name_a: str, a: Tensor, name_b: str, b: Tensor) -> None:
    if a.shape[1] != b.shape[1]:
        raise ValueError(f"{name_a} has {a.shape[1]} features per point, {name_b} {b.shape[1]}")


def _distance_blocks(a_NF: Tensor, b_MF: Tensor, block_bytes: int) -> Iterator[tuple[slice, Tensor]]:
    """Row ranges of ``a`` with their distances (rows, M)."""
    rows = max(1, block_bytes // (8 * len(b_MF)))
    for start in range(0, len(a_NF), rows):
        part = slice(start, min(start + rows, len(a_NF)))
        yield part, torch.cdist(a_NF[part], b_MF, compute_mode="donot_use_mm_for_euclid_dist")


def neighbor_radii(x: Tensor, k: int = 5, block_bytes: int = _BLOCK_BYTES) -> Tensor:
    """(N,) float64: every point's distance to its k-th nearest other point of ``x`` (N, F).

    Raises:
        ValueError: k < 1, or fewer than k + 1 points.
    """
    x = _points("x", x)
    if not 1 <= k < len(x):
        raise ValueError(f"k = {k} neighbors need at least k + 1 points and k >= 1, got {len(x)} points")
    radii = x.new_empty(len(x))
    for part, distances in _distance_blocks(x, x, block_bytes):
        rows = torch.arange(part.start, part.stop, device=x.device)
        distances[rows - part.start, rows] = torch.inf
        radii[part] = distances.kthvalue(k, dim=1).values
    return radii


def coverage(real: Tensor, fake: Tensor, k: int = 5, block_bytes: int = _BLOCK_BYTES) -> float:
    """Share of real points whose ball contains at least one generated point (Naeem et al., equation 5).

    For two sets of n points of one distribution the expectation is near 1 - 2**-k; it falls when there are
    fewer generated than real points.

    Args:
        real: (N, ...), flattened to (N, F).
        fake: (M, ...).

    Raises:
        ValueError: fewer than k + 1 real points, unequal numbers of features, a value that is not finite.
    """
    real, fake = _points("real", real), _points("fake", fake)
    _check_pair("real", real, "fake", fake)
    radii = neighbor_radii(real, k, block_bytes)
    covered = 0
    for part, distances in _distance_blocks(real, fake, block_bytes):
        covered += int((distances.min(dim=1).values <= radii[part]).sum())
    return covered / len(real)


def manifold_scores(
    real: Tensor, fake: Tensor, k: int = 5, block_bytes: int = _BLOCK_BYTES
) -> dict[str, float]:
    """Precision, recall, density and coverage of ``fake`` (M, ...) against ``real`` (N, ...).

    precision: share of generated points inside any real ball; recall: share of real points inside any
    generated ball; density: mean number of real balls around a generated point, over k; coverage: share of
    real balls with a generated point inside.

    Raises:
        ValueError: fewer than k + 1 points in a set, unequal numbers of features, a value that is not finite.
    """
    real, fake = _points("real", real), _points("fake", fake)
    _check_pair("real", real, "fake", fake)
    real_radii = neighbor_radii(real, k, block_bytes)
    fake_radii = neighbor_radii(fake, k, block_bytes)
    balls_around_fake = torch.zeros(len(fake), dtype=torch.int64, device=real.device)
    recalled = covered = 0
    for part, distances in _distance_blocks(real, fake, block_bytes):
        inside = distances <= real_radii[part, None]
        balls_around_fake += inside.sum(0)
        covered += int(inside.any(1).sum())
        recalled += int((distances <= fake_radii).any(1).sum())
    return {
        "precision": float((balls_around_fake > 0).double().mean()),
        "recall": recalled / len(real),
        "density": float(balls_around_fake.double().mean()) / k,
        "coverage": covered / len(real),
    }


def nearest_distances(x: Tensor, reference: Tensor, block_bytes: int = _BLOCK_BYTES) -> Tensor:
    """(N,) float64: distance of every point of ``x`` (N, ...) to the nearest point of ``reference`` (M, ...).

    Raises:
        ValueError: unequal numbers of features, or a value that is not finite.
    """
    x, reference = _points("x", x), _points("reference", reference)
    _check_pair("x", x, "reference", reference)
    nearest = x.new_empty(len(x))
    for part, distances in _distance_blocks(x, reference, block_bytes):
        nearest[part] = distances.min(dim=1).values
    return nearest


def nearest_distance(x: Tensor, reference: Tensor, block_bytes: int = _BLOCK_BYTES) -> float:
    """Mean of :func:`nearest_distances`: how far a set keeps from what it was trained on."""
    return float(nearest_distances(x, reference, block_bytes).mean())
