"""Locality numbers against values worked out by hand."""

import numpy as np
import pytest

from scans import ScanPath, get_scan, list_scans, path_metrics
from scans.metrics import continuity, neighbor_gap, step_lengths, window_spread


def test_rows_by_hand():
    """2 x 3 raster: steps 1 1 3 1 1; horizontal neighbors 1 apart (4 pairs), vertical ones 3 (3 pairs)."""
    path = get_scan("sweep1")(2, 3)[0]
    np.testing.assert_array_equal(step_lengths(path), [1, 1, 3, 1, 1])
    numbers = path_metrics(path, window=1)
    assert numbers.continuity == 0.8
    assert numbers.mean_jump == 7 / 5
    assert numbers.max_jump == 3
    assert numbers.neighbor_gap == pytest.approx((4 * 1 + 3 * 3) / 7)
    assert numbers.window_spread == 7 / 5
    # two steps apart: 2, (1,0)-(0,1) = 2, 2, 2
    assert window_spread(path, window=2) == pytest.approx((7 + 8) / 9)


@pytest.mark.parametrize("name", list_scans())
def test_numbers_are_in_their_ranges(name):
    for path in get_scan(name).over(1, 5, 7):
        numbers = path_metrics(path)
        assert 0 <= numbers.continuity <= 1
        assert 1 <= numbers.mean_jump <= numbers.max_jump <= 10
        assert 1 <= numbers.neighbor_gap <= 34
        assert 1 <= numbers.window_spread <= 10
        back = path_metrics(path.reversed())
        assert back.neighbor_gap == pytest.approx(numbers.neighbor_gap)
        assert back.window_spread == pytest.approx(numbers.window_spread)


@pytest.mark.parametrize("name", list_scans(dims=3))
def test_joint_numbers_are_in_their_ranges(name):
    for path in get_scan(name)(3, 4, 5):
        numbers = path_metrics(path)
        assert 0 <= numbers.continuity <= 1
        assert 1 <= numbers.mean_jump <= numbers.max_jump <= 9
        assert 1 <= numbers.neighbor_gap <= 59
        assert 1 <= numbers.window_spread <= 9


def test_frames_by_hand():
    """2 x 1 x 2 raster: steps 1 2 1; neighbors in a frame 1 apart (2 pairs), along time 2 (2 pairs)."""
    numbers = path_metrics(get_scan("sweep3d")(2, 1, 2)[0], window=1)
    assert (numbers.continuity, numbers.mean_jump, numbers.max_jump) == (2 / 3, 4 / 3, 2)
    assert numbers.neighbor_gap == 1.5


def test_joint_and_single_token():
    assert continuity(get_scan("hilbert")(3, 4, 5)[0]) == 1.0
    assert neighbor_gap(ScanPath.identity(8), (2, 2, 2)) == pytest.approx((1 + 2 + 4) / 3)
    one = path_metrics(get_scan("zigzag")(1, 1)[0])
    assert (one.continuity, one.mean_jump, one.max_jump, one.neighbor_gap, one.window_spread) == (
        1,
        0,
        0,
        0,
        0,
    )


def test_arguments():
    with pytest.raises(ValueError, match="needs the shape of its grid, got None"):
        path_metrics(ScanPath(range(4)))
    with pytest.raises(ValueError, match=r"got \(3, 3\)"):
        continuity(ScanPath(range(4)), (3, 3))
    with pytest.raises(ValueError, match="at least 1, got 0"):
        window_spread(get_scan("zigzag")(2, 2)[0], window=0)
