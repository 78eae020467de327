"""What every registered scan owes its user, found through the registry."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from scans import ScanPath, get_scan, list_scans, parse_scan_type, registry
from tests.scans.properties import quick

GRIDS = [(1, 1), (1, 7), (7, 1), (2, 3), (3, 2), (2, 2), (5, 5), (8, 8), (16, 16), (6, 10), (10, 6), (31, 17)]
VOLUMES = [(1, 3, 4), (2, 2, 2), (3, 1, 5), (4, 4, 4), (5, 3, 2), (7, 1, 1), (3, 6, 5), (4, 8, 8)]
each_scan = pytest.mark.parametrize("name", list_scans())
each_joint_scan = pytest.mark.parametrize("name", list_scans(dims=3))


def assert_paths(paths, grid):
    assert paths
    for path in paths:
        assert isinstance(path, ScanPath)
        assert path.shape == grid
        assert path.order.dtype == path.inverse.dtype == np.int64
        np.testing.assert_array_equal(np.sort(path.order), np.arange(np.prod(grid)))
        np.testing.assert_array_equal(path.order[path.inverse], np.arange(np.prod(grid)))
        np.testing.assert_array_equal(path.inverse[path.order], np.arange(np.prod(grid)))


@each_scan
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_every_token_is_visited_once(name, grid):
    if 2 in get_scan(name).dims:
        assert_paths(get_scan(name)(*grid), grid)
    else:
        assert_paths(get_scan(name)(1, *grid), (1, *grid))


@each_joint_scan
@pytest.mark.parametrize("grid", VOLUMES, ids=str)
def test_every_voxel_is_visited_once(name, grid):
    assert_paths(get_scan(name)(*grid), grid)


@each_scan
@quick
@given(h=st.integers(1, 20), w=st.integers(1, 20))
def test_any_grid(name, h, w):
    assert_paths(get_scan(name).over(1, h, w), (h, w) if 2 in get_scan(name).dims else (1, h, w))


@each_joint_scan
@pytest.mark.parametrize("grid", [(1, 1), (1, 6), (5, 4), (8, 8), (7, 3)], ids=str)
def test_one_frame_is_an_image(name, grid):
    if 2 in get_scan(name).dims:
        assert get_scan(name)(1, *grid) == get_scan(name)(*grid)


@each_scan
def test_built_anew_it_is_the_same(name):
    first = get_scan(name).over(1, 6, 9)
    registry._build.cache_clear()
    again = get_scan(name).over(1, 6, 9)
    assert again is not first
    assert again == first


@each_scan
def test_cached_and_read_only(name):
    scan = get_scan(name)
    paths = scan.over(1, 6, 4)
    assert scan.over(1, 6, 4) is paths
    for array in (paths[0].order, paths[0].inverse):
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 1


@each_scan
@pytest.mark.parametrize("sizes", [(0, 4), (4, 0), (-1, 4), (1, 4, -2), (0, 4, 4)], ids=str)
def test_sizes_below_one_are_refused(name, sizes):
    with pytest.raises(ValueError, match="at least 1"):
        get_scan(name)(*sizes)


@each_scan
@pytest.mark.parametrize("sizes", [(2.0, 4), (True, 4), ("3", 4)], ids=str)
def test_sizes_are_integers(name, sizes):
    with pytest.raises(TypeError, match="integers"):
        get_scan(name)(*sizes)


@each_scan
def test_it_has_a_summary_and_is_a_scan_string(name):
    assert get_scan(name).summary.strip(), f"{name}: its function needs a docstring"
    spec = parse_scan_type(name)
    paths = get_scan(name).over(1, 4, 4)
    schedule = spec.schedule(2 * len(paths) + 1, 1, 4, 4)
    for layer, step in enumerate(schedule):
        assert step.path == paths[layer % len(paths)]
        assert step.fold == "none"
        assert step.is_exact


def test_numpy_sizes_are_sizes():
    assert get_scan("zigzag")(np.int64(3), np.int32(4)) is get_scan("zigzag")(3, 4)
