"""What each scheme promises beyond being a bijection."""

import numpy as np
import pytest
from hilbert import decode
from hypothesis import given
from hypothesis import strategies as st

from scans import ScanPath, get_scan, path_metrics
from scans.metrics import step_lengths, visited_cells
from scans.window import windows
from tests.scans.properties import quick

UNIT_STEPS = ["zigzag", "spiral", "hilbert"]
JOINT_UNIT_STEPS = [*UNIT_STEPS, "zigzag3d", "hilbert3d"]
sizes = st.integers(1, 40)


def views(h, w):
    """Index grids of the symmetries of an (h, w) grid onto itself or its transpose."""
    grid = np.arange(h * w).reshape(h, w)
    for view in (grid, grid[::-1], grid[:, ::-1], grid[::-1, ::-1]):
        yield view
        yield view.T


def longest_chebyshev(path):
    return np.abs(np.diff(visited_cells(path), axis=0)).max(initial=0)


@pytest.mark.parametrize("name", UNIT_STEPS)
@quick
@given(h=sizes, w=sizes)
def test_unit_steps_on_any_grid(name, h, w):
    for path in get_scan(name)(h, w):
        assert step_lengths(path).max(initial=1) == 1


@pytest.mark.parametrize("name", JOINT_UNIT_STEPS)
@quick
@given(t=st.integers(1, 9), h=st.integers(1, 9), w=st.integers(1, 9))
def test_unit_steps_through_any_video(name, t, h, w):
    for path in get_scan(name)(t, h, w):
        assert step_lengths(path).max(initial=1) == 1


@quick
@given(h=sizes, w=sizes)
def test_diagonal_steps_touch(h, w):
    for path in get_scan("diagonal")(h, w):
        assert longest_chebyshev(path) <= 1


@quick
@given(t=st.integers(1, 5), h=st.integers(1, 9), w=st.integers(1, 9))
def test_joint_diagonal_steps_touch(t, h, w):
    for path in get_scan("diagonal")(t, h, w):
        assert longest_chebyshev(path) <= 1


def test_diagonal_sweep_keeps_its_direction():
    row, column = visited_cells(get_scan("diagonal_sweep")(5, 7)[0]).T
    line = row + column
    assert (np.diff(line) >= 0).all()
    assert (np.diff(column)[np.diff(line) == 0] == 1).all()


@pytest.mark.parametrize(
    "name, grid, distinct",
    [
        ("zigzag", (8, 8), 8),
        ("zigzag", (3, 5), 8),
        ("spiral", (8, 8), 8),
        ("spiral", (4, 7), 8),
        ("diagonal", (8, 8), 8),
        ("diagonal", (5, 7), 8),
        ("diagonal_sweep", (5, 7), 8),
        ("hilbert", (8, 8), 8),
        ("hilbert", (7, 7), 8),
        ("hilbert", (9, 12), 8),
        ("hilbert", (16, 8), 8),
        ("hilbert", (9, 20), 4),
        ("hilbert_official", (8, 8), 8),
        ("hilbert", (4, 8, 8), 8),
        ("zigzag", (3, 4, 5), 8),
        ("sweep", (8, 8), 4),
        ("sweep4", (3, 5), 4),
        ("sweep2", (3, 5), 2),
        ("sweep1", (3, 5), 1),
        ("random", (4, 4), 8),
        ("morton", (8, 8), 8),
        ("morton", (3, 5), 8),
        ("morton", (2, 4, 8), 8),
        ("window2", (8, 8), 8),
        ("window4", (5, 7), 8),
        ("window2", (3, 4, 5), 8),
        ("window4_zigzag", (8, 8), 8),
        ("window4_zigzag", (5, 7), 8),
        ("sweep3d", (3, 4, 5), 12),
        ("zigzag3d", (3, 4, 5), 12),
        ("hilbert3d", (4, 4, 4), 12),
        ("hilbert3d", (4, 16, 16), 4),
    ],
)
def test_number_of_distinct_paths(name, grid, distinct):
    assert len(set(get_scan(name)(*grid))) == distinct


@pytest.mark.parametrize(
    "name", ["zigzag", "hilbert", "diagonal", "diagonal_sweep", "morton", "window2", "window4_zigzag"]
)
def test_the_eight_paths_are_one_curve_in_eight_positions(name):
    paths = get_scan(name)(8, 8)
    moved = {tuple(view.ravel()[paths[0].order]) for view in views(8, 8)}
    assert moved == {tuple(path.order) for path in paths}


def test_sweeps():
    rows, rows_back, columns, columns_back = get_scan("sweep")(2, 3)
    np.testing.assert_array_equal(rows.order, [0, 1, 2, 3, 4, 5])
    np.testing.assert_array_equal(columns.order, [0, 3, 1, 4, 2, 5])
    assert rows_back == rows.reversed()
    assert columns_back == columns.reversed()
    assert get_scan("sweep4")(2, 3) == (rows, rows_back, columns, columns_back)
    assert get_scan("sweep2")(2, 3) == (rows, rows_back)
    assert get_scan("sweep1")(2, 3) == (rows,)
    np.testing.assert_array_equal(get_scan("sweep4")(2, 2, 2)[2].order, [0, 2, 1, 3, 4, 6, 5, 7])
    assert get_scan("sweep1")(3, 4, 5)[0].is_identity


def test_spiral_goes_in_and_out():
    inward, outward = get_scan("spiral")(3, 4)[:2]
    np.testing.assert_array_equal(inward.order, [0, 1, 2, 3, 7, 11, 10, 9, 8, 4, 5, 6])
    assert outward == inward.reversed()
    starts = [path.order[0] for path in get_scan("spiral")(3, 4)[::2]]
    assert starts == [0, 3, 11, 8]


def test_diagonal_by_hand():
    np.testing.assert_array_equal(get_scan("diagonal")(3, 3)[0].order, [0, 1, 3, 6, 4, 2, 5, 7, 8])


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 5])
def test_hilbert_is_hilberts_at_powers_of_two(bits):
    side = 2**bits
    cells = decode(np.arange(side * side), num_dims=2, num_bits=bits).astype(np.int64)
    oracle = cells[:, 0] * side + cells[:, 1]
    ours = {tuple(path.order) for path in get_scan("hilbert")(side, side)}
    assert ours == {tuple(view.ravel()[oracle]) for view in views(side, side)}


def assert_blocks_are_finished(path, block):
    """No block of this side is entered twice."""
    cells = visited_cells(path)
    moves = (np.diff(cells // block, axis=0) != 0).any(axis=1).sum()
    assert moves == np.prod([-(-size // block) for size in path.shape]) - 1


@pytest.mark.parametrize(
    "name, side, dims",
    [("hilbert", 16, 2), ("hilbert", 8, 3), ("hilbert3d", 8, 3), ("morton", 16, 2), ("morton", 8, 3)],
)
def test_every_block_is_finished_before_the_next(name, side, dims):
    for path in get_scan(name)(*[side] * dims):
        for block in (2, 4, side // 2):
            assert_blocks_are_finished(path, block)


@pytest.mark.parametrize("size", [2, 4, 8])
@quick
@given(t=st.integers(1, 5), h=st.integers(1, 20), w=st.integers(1, 20))
def test_windows_are_finished_before_the_next(size, t, h, w):
    # The corners move windows to the far border: only the views from the top left have them at the raster's blocks.
    for path in get_scan(f"window{size}")(t, h, w)[:2]:
        assert_blocks_are_finished(path, size)
    for path in get_scan(f"window{size}_zigzag")(h, w)[:2]:
        assert_blocks_are_finished(path, size)


def test_windows_by_hand():
    np.testing.assert_array_equal(get_scan("window2")(3, 4)[0].order, [0, 1, 4, 5, 2, 3, 6, 7, 8, 9, 10, 11])
    np.testing.assert_array_equal(
        get_scan("window2")(2, 2, 3)[0].order, [0, 1, 3, 4, 6, 7, 9, 10, 2, 5, 8, 11]
    )
    np.testing.assert_array_equal(
        get_scan("window2_zigzag")(4, 3)[0].order, [0, 3, 4, 1, 2, 5, 8, 11, 10, 7, 6, 9]
    )
    with pytest.raises(ValueError, match="at least 1"):
        windows(1, 4, 4, 0)


@quick
@given(h=sizes, w=sizes, size=st.sampled_from([2, 4, 8]))
def test_bands_have_unit_steps_inside_and_between_when_odd(h, w, size):
    steps = step_lengths(get_scan(f"window{size}_zigzag")(h, w)[0])
    bands = -(-h // size)
    assert (steps > 1).sum() <= (0 if w % 2 else bands - 1)
    assert steps.max(initial=1) <= size


def interleaved(*cell):
    """A Morton code read off binary numbers, one digit of each coordinate after the other."""
    digits = [f"{number:08b}" for number in cell]
    return int("".join("".join(column) for column in zip(*digits, strict=True)), 2)


@quick
@given(t=st.integers(1, 5), h=st.integers(1, 20), w=st.integers(1, 20))
def test_morton_sorts_by_interleaved_digits(t, h, w):
    codes = [interleaved(*cell) for cell in visited_cells(get_scan("morton")(t, h, w)[0]).tolist()]
    assert codes == sorted(codes)


@quick
@given(t=st.integers(1, 4), h=st.integers(1, 6), w=st.integers(1, 6))
def test_joint_scans_walk_along_every_axis_and_back(t, h, w):
    for name in ("sweep3d", "zigzag3d", "hilbert3d"):
        paths = get_scan(name)(t, h, w)
        assert all(back == path.reversed() for path, back in zip(paths[::2], paths[1::2], strict=True))
    sweeps = get_scan("sweep3d")(t, h, w)
    voxels = np.arange(t * h * w).reshape(t, h, w)
    assert sweeps[0].is_identity
    np.testing.assert_array_equal(sweeps[2].order, voxels.transpose(1, 2, 0).ravel())
    np.testing.assert_array_equal(sweeps[4].order, voxels.transpose(2, 0, 1).ravel())


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_the_joint_hilbert_curve_is_as_local_as_a_hilbert_curve(bits):
    """Another member of the family than the package's, so compared by what makes it one."""
    side = 2**bits
    cells = decode(np.arange(side**3), num_dims=3, num_bits=bits).astype(np.int64)
    oracle = ScanPath(np.ravel_multi_index(cells.T, (side,) * 3), shape=(side,) * 3)
    wanted = path_metrics(oracle)
    for path in get_scan("hilbert3d")(side, side, side):
        ours = path_metrics(path)
        assert ours.max_jump == wanted.max_jump == 1
        assert ours.window_spread < 1.05 * wanted.window_spread
        assert ours.neighbor_gap < 1.05 * wanted.neighbor_gap


@pytest.mark.parametrize("grid", [(32, 32), (30, 31), (24, 40), (17, 50)], ids=str)
def test_hilbert_is_more_local_than_rows(grid):
    hilbert = path_metrics(get_scan("hilbert")(*grid)[0], window=64)
    zigzag = path_metrics(get_scan("zigzag")(*grid)[0], window=64)
    assert hilbert.window_spread < 0.7 * zigzag.window_spread


@quick
@given(h=st.integers(1, 16), w=st.integers(1, 16))
def test_hilbert_official_is_the_inverse_of_hilbert(h, w):
    for ours, official in zip(get_scan("hilbert")(h, w), get_scan("hilbert_official")(h, w), strict=True):
        np.testing.assert_array_equal(official.order, ours.inverse)


def test_hilbert_official_is_not_continuous():
    assert path_metrics(get_scan("hilbert_official")(8, 8)[0]).continuity < 0.5


def test_random_follows_from_seed_and_index():
    scan = get_scan("random")
    assert scan(4, 4, seed=1) == scan(2, 8, seed=1)
    assert scan(4, 4, seed=1, count=3) == scan(4, 4, seed=1)[:3]
    assert scan(4, 4, seed=1) != scan(4, 4, seed=2)
    assert scan(4, 4) == scan(4, 4, seed=0)
    assert len({path for seed in range(20) for path in scan(4, 4, seed=seed)}) == 160
    assert scan(4, 4, seed=-3) == scan(4, 4, seed=2**64 - 3)
    with pytest.raises(ValueError, match="count must be at least 1, got 0"):
        scan(4, 4, count=0)


def test_random_is_the_same_everywhere():
    """Computed once with plain Python integers; a checkpoint's paths depend on these numbers."""
    for seed in (0, 7, -1):
        for index, path in enumerate(get_scan("random")(4, 5, seed=seed, count=2)):
            assert list(path.order) == _python_shuffle(20, seed, index)
    assert list(get_scan("random")(2, 3, seed=0)[0].order) == GOLDEN


def _python_shuffle(length, seed, index):
    word = 2**64 - 1
    stride = 0x9E3779B97F4A7C15

    def mix(z):
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & word
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & word
        return z ^ (z >> 31)

    key = mix((mix(seed & word) + stride * (index + 1)) & word)
    return sorted(range(length), key=lambda k: mix((stride * k + key) & word))


def test_random_looks_random():
    """Where token 0 goes is uniform: chi-squared over 16 places and 1600 paths stays below its 0.1 % point."""
    places = [path.inverse[0] for seed in range(200) for path in get_scan("random")(4, 4, seed=seed)]
    counts = np.bincount(places, minlength=16)
    assert ((counts - 100) ** 2 / 100).sum() < 37.7
    continuity = np.mean([path_metrics(p).continuity for p in get_scan("random")(16, 16)])
    assert continuity < 0.05


GOLDEN = [0, 3, 1, 4, 2, 5]
