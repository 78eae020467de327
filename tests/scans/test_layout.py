"""TokenLayout: where raster and learned tokens stand, and paths lifted over both."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from scans import TokenLayout, get_scan
from tests.scans.properties import quick


def build(layout, x_ND, table_ED):
    """The (L', D) sequence, as a model builds it."""
    return np.concatenate([x_ND, table_ED])[layout.source]


def example(layout, width=2):
    rng = np.random.default_rng(0)
    return rng.standard_normal((layout.num_raster, width)), rng.standard_normal((layout.num_learned, width))


@quick
@given(
    h=st.integers(1, 6),
    w=st.integers(1, 6),
    pads=st.integers(0, 4),
    prefix=st.integers(0, 5),
    bottom=st.sampled_from(["rows", "cycle", None]),
)
def test_raster_tokens_come_back(h, w, pads, prefix, bottom):
    for layout in (
        TokenLayout.plain(h * w),
        TokenLayout.prefix(h * w, prefix),
        TokenLayout.row_end_pads(h, w, pads, bottom, prefix),
    ):
        x, table = example(layout)
        sequence = build(layout, x, table)
        assert len(sequence) == len(layout) == layout.num_prefix + layout.body_length
        np.testing.assert_array_equal(sequence[layout.positions], x)
        np.testing.assert_array_equal(sequence[: layout.num_prefix], table[: layout.num_prefix])


def test_plain():
    layout = TokenLayout.plain(6)
    assert (len(layout), layout.num_prefix, layout.num_learned) == (6, 0, 0)
    path = get_scan("zigzag")(2, 3)[1]
    assert layout.lift(path) == path


def test_prefix_stays_in_front():
    layout = TokenLayout.prefix(6, 2)
    np.testing.assert_array_equal(layout.source, [6, 7, 0, 1, 2, 3, 4, 5])
    np.testing.assert_array_equal(layout.positions, [2, 3, 4, 5, 6, 7])
    path = get_scan("zigzag")(2, 3)[4]
    assert path.inverted() != path
    lifted = layout.lift(path)
    np.testing.assert_array_equal(lifted.order, [0, 1, 5, 6, 7, 4, 3, 2])
    x, table = example(layout)
    walked = build(layout, x, table)[lifted.order]
    np.testing.assert_array_equal(walked[:2], table)
    np.testing.assert_array_equal(walked[2:], x[path.order])
    np.testing.assert_array_equal(walked[lifted.inverse][layout.positions], x)


def test_pads_at_row_ends_by_hand():
    rows = TokenLayout.row_end_pads(2, 2, 3, "rows")
    assert rows.body_shape == (5, 5)
    a, b, c = 4, 5, 6
    want = [[0, 1, a, b, c], [2, 3, a, b, c], [a] * 5, [b] * 5, [c] * 5]
    np.testing.assert_array_equal(rows.source.reshape(5, 5), want)
    cycle = TokenLayout.row_end_pads(2, 2, 3, "cycle")
    want = [[0, 1, a, b, c], [2, 3, a, b, c], [a, b, c, a, b], [c, a, b, c, a], [b, c, a, b, c]]
    np.testing.assert_array_equal(cycle.source.reshape(5, 5), want)
    bare = TokenLayout.row_end_pads(2, 2, 3, None)
    np.testing.assert_array_equal(bare.source.reshape(2, 5), [[0, 1, a, b, c], [2, 3, a, b, c]])
    assert rows.num_learned == cycle.num_learned == bare.num_learned == 3


def test_dim_sizes_and_columns():
    """DiM at 256 pixels: five tokens in front, 16 x 16 patches, three pads: 366 tokens."""
    layout = TokenLayout.row_end_pads(16, 16, 3, "rows", num_prefix=5)
    assert len(layout) == 366
    assert layout.num_learned == 8
    columns = get_scan("sweep")(*layout.body_shape)[2]
    lifted = layout.lift(columns)
    np.testing.assert_array_equal(lifted.order[:5], range(5))
    np.testing.assert_array_equal(lifted.order[5:8], [5, 24, 43])


def test_a_path_over_something_else_is_refused():
    layout = TokenLayout.row_end_pads(2, 3, 1, num_prefix=2)
    with pytest.raises(
        ValueError, match=r"6 tokens; .* the 12 tokens after its prefix \(a grid of \(3, 4\)\)"
    ):
        layout.lift(get_scan("zigzag")(2, 3)[0])


@pytest.mark.parametrize(
    "source, num_raster, num_prefix, body",
    [
        ([0, 1, 1], 2, 0, None),
        ([0, 2], 2, 0, None),
        ([0, 1, 3], 2, 0, None),
        ([-1, 0, 1], 2, 0, None),
        ([0, 1, 2], 2, 1, None),
        ([2, 0, 1], 2, 1, (3, 1)),
        ([], 2, 0, None),
    ],
)
def test_bad_layouts(source, num_raster, num_prefix, body):
    with pytest.raises(ValueError):
        TokenLayout(source, num_raster, num_prefix, body)


def test_bad_arguments():
    with pytest.raises(TypeError, match="integers, got dtype float64"):
        TokenLayout(np.array([0.0, 1.0]), 2)
    with pytest.raises(ValueError, match="'rows', 'cycle' or None, got 'rho'"):
        TokenLayout.row_end_pads(2, 2, 1, "rho")
    with pytest.raises(ValueError, match="not negative"):
        TokenLayout.row_end_pads(2, 2, -1)
    with pytest.raises(ValueError, match="not negative"):
        TokenLayout.prefix(4, -1)
    with pytest.raises(ValueError, match="at least 1"):
        TokenLayout.row_end_pads(0, 2, 1)
