"""Balls and nearest neighbors against a plain count, in any block size, and against known expectations."""

import numpy as np
import pytest
import torch

from zigflow.metrics.manifold import (
    coverage,
    manifold_scores,
    nearest_distance,
    nearest_distances,
    neighbor_radii,
)


def points(n, f, seed, shift=0.0):
    return torch.randn(n, f, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) + shift


def counted(real, fake, k):
    """The definitions, one point at a time."""
    real, fake = real.numpy(), fake.numpy()

    def radius(set_, i):
        return sorted(np.linalg.norm(set_ - set_[i], axis=1)[np.arange(len(set_)) != i])[k - 1]

    real_radii = [radius(real, i) for i in range(len(real))]
    fake_radii = [radius(fake, i) for i in range(len(fake))]
    inside = np.array(
        [[np.linalg.norm(r - f) <= q for f in fake] for r, q in zip(real, real_radii, strict=True)]
    )
    recalled = np.array(
        [[np.linalg.norm(r - f) <= q for f, q in zip(fake, fake_radii, strict=True)] for r in real]
    )
    return {
        "precision": inside.any(0).mean(),
        "recall": recalled.any(1).mean(),
        "density": inside.sum(0).mean() / k,
        "coverage": inside.any(1).mean(),
    }


@pytest.mark.parametrize("k", [1, 3, 5])
@pytest.mark.parametrize("block_bytes", [1, 1000, 1 << 26])
def test_scores_are_the_definitions_in_any_block_size(k, block_bytes):
    real, fake = points(31, 4, 0), points(23, 4, 1, shift=0.4)
    want = counted(real, fake, k)
    got = manifold_scores(real, fake, k, block_bytes)
    assert got == pytest.approx(want, abs=1e-12)
    assert coverage(real, fake, k, block_bytes) == got["coverage"]


def test_equal_distributions_reach_the_expected_coverage():
    # The k + 1 nearest of 2n points to a real one are a fair draw of both sets: all k real has odds 2**-k.
    scores = manifold_scores(points(1200, 2, 2), points(1200, 2, 3), k=4)
    assert scores["coverage"] == pytest.approx(1 - 2**-4, abs=0.03)
    assert scores["density"] == pytest.approx(1.0, abs=0.1)


def test_extremes():
    real = points(60, 3, 4)
    same = manifold_scores(real, real.clone())
    assert same["precision"] == same["recall"] == same["coverage"] == 1.0
    far = manifold_scores(real, points(60, 3, 5, shift=100.0))
    assert set(far.values()) == {0.0}
    one_spot = real[:1].repeat(60, 1)
    collapsed = manifold_scores(real, one_spot)
    assert collapsed["precision"] == 1.0
    assert collapsed["coverage"] < 0.35
    assert collapsed["recall"] <= 1 / 60


def test_radii_skip_the_point_itself_and_count_duplicates():
    x = torch.tensor([[0.0], [0.0], [1.0], [3.0]])
    assert neighbor_radii(x, 1).tolist() == [0.0, 0.0, 1.0, 2.0]
    assert neighbor_radii(x, 2).tolist() == [1.0, 1.0, 1.0, 3.0]
    assert coverage(torch.zeros(8, 2), torch.zeros(1, 2), k=3) == 1.0


def test_nearest_distance_is_exact_for_copies_far_from_zero():
    reference = points(40, 64, 6, shift=1e4)
    assert nearest_distances(reference[7:9], reference).tolist() == [0.0, 0.0]
    moved = reference[:5] + torch.tensor([3.0, 4.0] + [0.0] * 62) * 1e-3
    assert nearest_distances(moved, reference, block_bytes=1).tolist() == pytest.approx([5e-3] * 5, rel=1e-6)
    assert nearest_distance(moved, reference) == pytest.approx(5e-3, rel=1e-6)


def test_images_are_flattened_and_integers_allowed():
    images = torch.randint(0, 256, (12, 1, 4, 4), dtype=torch.uint8)
    assert nearest_distance(images, images.flatten(1)) == 0.0


def test_bad_input_is_refused():
    with pytest.raises(ValueError, match=r"k \+ 1 points"):
        neighbor_radii(torch.zeros(5, 2), 5)
    with pytest.raises(ValueError, match="k >= 1"):
        neighbor_radii(torch.zeros(5, 2), 0)
    with pytest.raises(ValueError, match="real has 2 features per point, fake 3"):
        coverage(torch.zeros(9, 2), torch.zeros(9, 3))
    with pytest.raises(ValueError, match="not finite"):
        coverage(torch.zeros(9, 2), torch.full((9, 2), torch.nan))
    with pytest.raises(ValueError, match="N >= 1"):
        nearest_distance(torch.zeros(0, 2), torch.zeros(3, 2))
