"""Mirrored schedules over a padded layout, and layers with one gather between them."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from scans import ScanSchedule, TokenLayout, composed_walk, factorized_steps, get_scan, mirrored_schedule
from tests.scans.properties import quick

SCANS = ("sweep1", "sweep2", "sweep4", "zigzag", "hilbert", "spiral")


@quick
@given(
    h=st.integers(1, 5),
    w=st.integers(1, 5),
    pads=st.integers(0, 3),
    bottom=st.sampled_from(["rows", "cycle", None]),
    depth=st.integers(1, 12),
    name=st.sampled_from(SCANS),
)
def test_composed_gathers_equal_each_layers_order_and_inverse(h, w, pads, bottom, depth, name):
    layout = TokenLayout.row_end_pads(h, w, pads, bottom, num_prefix=2)
    paths = get_scan(name)(*layout.body_shape)
    schedule = mirrored_schedule(layout, paths, depth)
    walk = composed_walk(layout, schedule)
    table = np.arange(h * w + layout.num_learned)
    tokens = table[walk.enter]
    assert len(walk.moves) == depth - 1 and len(walk.homes) == depth
    for layer, step in enumerate(schedule):
        if layer:
            tokens = tokens[walk.moves[layer - 1].order]
        np.testing.assert_array_equal(tokens, layout.source[step.path.order])
        np.testing.assert_array_equal(tokens[walk.homes[layer].order], layout.source)
        np.testing.assert_array_equal(tokens[:2], layout.source[:2])
    np.testing.assert_array_equal(tokens[walk.leave], np.arange(h * w))


@quick
@given(depth=st.integers(1, 30), count=st.integers(1, 6))
def test_the_cycle_goes_up_and_back_down(depth, count):
    layout = TokenLayout.prefix(12, 1)
    paths = get_scan("random")(3, 4, count=count)
    schedule = mirrored_schedule(layout, paths, depth)
    assert schedule.depth == depth
    for i, step in enumerate(schedule):
        assert step.path == schedule[depth - 1 - i].path
        if i <= (depth - 1) // 2:
            assert step.path == layout.lift(paths[i % count])


def test_wrong_input_is_explained():
    layout = TokenLayout.prefix(12, 1)
    with pytest.raises(ValueError, match="at least one path"):
        mirrored_schedule(layout, (), 3)
    with pytest.raises(ValueError, match="at least one layer"):
        mirrored_schedule(layout, get_scan("sweep4")(3, 4), 0)
    with pytest.raises(ValueError, match="after its prefix"):
        mirrored_schedule(layout, get_scan("sweep4")(3, 3), 3)
    video = ScanSchedule(factorized_steps("st", 2, get_scan("zigzag")(3, 4), 2), (2, 3, 4))
    with pytest.raises(ValueError, match="folds some"):
        composed_walk(TokenLayout.plain(24), video)
