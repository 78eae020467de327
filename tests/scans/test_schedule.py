"""Steps, folds and schedules: what a layer gathers is what it puts back."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from scans import ScanPath, ScanSchedule, ScanStep, factorized_steps, get_scan, parse_scan_type
from tests.scans.properties import quick

small = st.integers(1, 5)


def mix_and_undo(x_BLD, resolved, mixer):
    """What a block does with a resolved step, in numpy."""
    b, length, d = x_BLD.shape
    folded = x_BLD[:, resolved.order].reshape(b * resolved.segments, length // resolved.segments, d)
    return mixer(folded).reshape(b, length, d)[:, resolved.undo]


def tokens(t, h, w, batch=2, width=3):
    return np.random.default_rng(0).standard_normal((batch, t * h * w, width))


@quick
@given(t=small, h=small, w=small, word=st.text("st", min_size=1, max_size=4), depth=st.integers(1, 9))
def test_a_factorized_schedule_undoes_itself(t, h, w, word, depth):
    x = tokens(t, h, w)
    for name in ("zzvideo", "video"):
        schedule = parse_scan_type(f"{name}_{word}").schedule(depth, t, h, w)
        assert [step.fold for step in schedule] == [
            {"s": "frames", "t": "pixels"}[word[i % len(word)]] for i in range(depth)
        ]
        for layer in range(depth):
            resolved = schedule.resolve(layer)
            np.testing.assert_array_equal(np.sort(resolved.order), np.arange(t * h * w))
            np.testing.assert_array_equal(mix_and_undo(x, resolved, lambda y: y), x)


def test_frames_are_separate_sequences():
    t, h, w = 3, 2, 4
    path = get_scan("zigzag")(h, w)[3]
    resolved = ScanStep(path, "frames").resolve(t, h, w)
    assert resolved.segments == t
    frame_of = np.repeat(np.arange(t), h * w)
    rows = frame_of[resolved.order].reshape(t, h * w)
    assert (rows == np.arange(t)[:, None]).all()
    x = tokens(t, h, w)
    got = mix_and_undo(x, resolved, lambda y: np.cumsum(y, axis=1))
    for f in range(t):
        frame = x[:, f * h * w : (f + 1) * h * w]
        want = np.cumsum(frame[:, path.order], axis=1)[:, path.inverse]
        np.testing.assert_allclose(got[:, f * h * w : (f + 1) * h * w], want)


@pytest.mark.parametrize("backwards", [False, True])
def test_pixels_are_separate_histories(backwards):
    t, h, w = 4, 2, 3
    path = ScanPath.identity(t)
    path = path.reversed() if backwards else path
    resolved = ScanStep(path, "pixels").resolve(t, h, w)
    assert resolved.segments == h * w
    x = tokens(t, h, w)
    got = mix_and_undo(x, resolved, lambda y: np.cumsum(y, axis=1)).reshape(2, t, h * w, 3)
    video = x.reshape(2, t, h * w, 3)
    want = np.cumsum(video[:, ::-1], axis=1)[:, ::-1] if backwards else np.cumsum(video, axis=1)
    np.testing.assert_allclose(got, want)


def test_pixels_with_a_path_that_is_not_its_own_inverse():
    t, h, w = 3, 2, 2
    path = ScanPath([1, 2, 0])
    x = tokens(t, h, w)
    got = mix_and_undo(x, ScanStep(path, "pixels").resolve(t, h, w), lambda y: np.cumsum(y, axis=1))
    want = np.cumsum(x.reshape(2, t, 4, 3)[:, path.order], axis=1)[:, path.inverse]
    np.testing.assert_allclose(got.reshape(2, t, 4, 3), want)


def test_no_fold_is_the_path_itself():
    path = get_scan("hilbert")(2, 3, 4)[0]
    resolved = ScanStep(path).resolve(2, 3, 4)
    assert resolved.segments == 1
    np.testing.assert_array_equal(resolved.order, path.order)
    np.testing.assert_array_equal(resolved.undo, path.inverse)


def test_resolved_arrays_are_read_only_int64():
    for step in (ScanStep(ScanPath(range(4)), "frames"), ScanStep(ScanPath(range(3)), "pixels")):
        for array in step.resolve(3, 2, 2)[:2]:
            assert array.dtype == np.int64
            assert not array.flags.writeable


@pytest.mark.parametrize(
    "fold, length, message",
    [
        ("none", 4, "needs a path of 12"),
        ("frames", 12, "needs a path of 4"),
        ("pixels", 4, "needs a path of 3"),
    ],
)
def test_a_path_of_the_wrong_length_is_refused(fold, length, message):
    step = ScanStep(ScanPath(range(length), name="wrong"), fold)
    with pytest.raises(ValueError, match=rf"{message} tokens, its path 'wrong' has {length}"):
        step.resolve(3, 2, 2)
    with pytest.raises(ValueError, match=message):
        ScanSchedule((step,), (3, 2, 2))


def test_step_arguments_are_checked():
    with pytest.raises(ValueError, match="none, frames, pixels, got 'time'"):
        ScanStep(ScanPath(range(4)), "time")
    with pytest.raises(ValueError, match="undo has 3 tokens, but the path has 4"):
        ScanStep(ScanPath(range(4)), undo=ScanPath(range(3)))
    with pytest.raises(ValueError, match="at least one layer"):
        ScanSchedule((), (1, 2, 2))
    with pytest.raises(ValueError, match="branch path"):
        ScanSchedule((ScanStep(ScanPath(range(4))),), (1, 2, 2), (ScanPath(range(3)),))


def test_temporal_layers_alternate_and_spatial_ones_count_their_own():
    paths = get_scan("zigzag")(2, 3)
    steps = factorized_steps("st", 8, paths[:3], 5)
    assert [s.path for s in steps[::2]] == [paths[0], paths[1], paths[2], paths[0]]
    forwards = ScanPath.identity(5)
    assert [s.path for s in steps[1::2]] == [forwards, forwards.reversed(), forwards, forwards.reversed()]
    assert all(s.is_exact for s in steps)


def test_the_published_temporal_undo_reverses_time():
    t, h, w = 3, 2, 2
    x = tokens(t, h, w)
    schedule = parse_scan_type("zzvideo_st").schedule(4, t, h, w, official_temporal_reversal=True)
    for layer, step in enumerate(schedule):
        got = mix_and_undo(x, schedule.resolve(layer), lambda y: y)
        want = x if step.fold == "frames" else x.reshape(2, t, 4, 3)[:, ::-1].reshape(x.shape)
        np.testing.assert_array_equal(got, want)
        assert step.is_exact == (step.fold == "frames")


def test_factorized_words_are_checked():
    for word in ("", "sxt", "S"):
        with pytest.raises(ValueError, match="letters s"):
            factorized_steps(word, 3, get_scan("zigzag")(2, 2), 2)


def test_distinct_steps_are_shared():
    schedule = parse_scan_type("zigzagN3").schedule(8, 1, 4, 4)
    steps, layers = schedule.distinct()
    assert len(steps) == 3
    assert layers == (0, 1, 2, 0, 1, 2, 0, 1)
    assert [steps[i] for i in layers] == list(schedule)
    assert schedule.depth == len(schedule) == 8
    assert schedule[1:3] == schedule.steps[1:3]
    steps, layers = parse_scan_type("video_sst").schedule(6, 2, 2, 2).distinct()
    assert len(steps) == 6
    assert parse_scan_type("video_t").schedule(6, 2, 2, 2).distinct()[1] == (0, 1, 0, 1, 0, 1)


def test_a_swapped_undo_is_another_step():
    forwards = ScanPath.identity(3)
    assert ScanStep(forwards, "pixels") != ScanStep(forwards, "pixels", forwards.reversed())
    assert ScanStep(forwards, "pixels") == ScanStep(ScanPath(range(3)), "pixels")
