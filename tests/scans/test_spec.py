"""The official strings, what they mean, and what is refused."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from scans import ScanSpec, UnknownScanError, get_scan, list_scans, parse_scan_type
from tests.scans.properties import quick


@pytest.mark.parametrize(
    "text, mixer, scan, num_paths, word, directions",
    [
        ("v1", "mamba", "sweep1", None, "", 1),
        ("v2", "bi_mamba", "sweep1", None, "", 2),
        ("zigzagN1", "mamba", "zigzag", 1, "", 1),
        ("zigzagN8", "mamba", "zigzag", 8, "", 1),
        ("hilbertN2", "mamba", "hilbert_official", 2, "", 1),
        ("randomN4", "mamba", "random", 4, "", 1),
        ("randomN20", "mamba", "random", 20, "", 1),
        ("parallelN8", "parallel_mamba", "zigzag", 8, "", 8),
        ("zzvideo_sst", "mamba", "zigzag", None, "sst", 1),
        ("video_st", "mamba", "zigzag", None, "st", 1),
        ("spiral", "mamba", "spiral", None, "", 1),
        ("hilbert:4", "mamba", "hilbert", 4, "", 1),
    ],
)
def test_forms(text, mixer, scan, num_paths, word, directions):
    assert parse_scan_type(text) == ScanSpec(mixer, scan, num_paths, word, directions, text)


@pytest.mark.parametrize("text", ["v1", "v2"])
@pytest.mark.parametrize("t", [1, 3])
def test_raster_forms(text, t):
    schedule = parse_scan_type(text).schedule(4, t, 2, 5)
    assert all(step.path.is_identity and step.fold == "none" for step in schedule)
    assert all(len(step.path) == t * 10 for step in schedule)
    assert schedule.branch_orders is None


@pytest.mark.parametrize("k", range(1, 9))
@pytest.mark.parametrize(
    "stem, scan", [("zigzag", "zigzag"), ("hilbert", "hilbert_official"), ("random", "random")]
)
def test_layer_i_takes_path_i_mod_k(stem, scan, k):
    schedule = parse_scan_type(f"{stem}N{k}").schedule(11, 1, 4, 6)
    paths = get_scan(scan)(4, 6)
    assert [step.path for step in schedule] == [paths[i % k] for i in range(11)]


def test_random_takes_the_seed_and_others_do_not_mind_it():
    spec = parse_scan_type("randomN3")
    assert spec.is_seeded
    assert not parse_scan_type("zigzagN3").is_seeded
    paths = get_scan("random")(4, 4, seed=5, count=3)
    assert [step.path for step in spec.schedule(4, 1, 4, 4, seed=5)] == [*paths, paths[0]]
    assert spec.schedule(4, 1, 4, 4, seed=5) != spec.schedule(4, 1, 4, 4, seed=6)
    assert parse_scan_type("zigzagN3").schedule(4, 1, 4, 4, seed=5) == parse_scan_type("zigzagN3").schedule(
        4, 1, 4, 4
    )


def test_parallel_walks_all_orders_in_one_layer():
    schedule = parse_scan_type("parallelN5").schedule(3, 1, 4, 6)
    assert all(step.path.is_identity for step in schedule)
    orders = schedule.branch_orders
    assert orders is not None
    assert orders.shape == (5, 24)
    np.testing.assert_array_equal(orders, [path.order for path in get_scan("zigzag")(4, 6)[:5]])


def test_a_video_without_a_word_is_one_joint_walk():
    schedule = parse_scan_type("zigzagN2").schedule(3, 4, 2, 3)
    assert [step.path for step in schedule] == [get_scan("zigzag")(4, 2, 3)[i % 2] for i in range(3)]
    with pytest.raises(ValueError, match="no joint"):
        parse_scan_type("hilbertN2").schedule(3, 4, 2, 3)


@pytest.mark.parametrize(
    "text, message",
    [
        ("zigzagN9", "'zigzagN9' asks for 9 paths.* 8 paths"),
        ("hilbertN12", "12 paths.* 8 paths"),
        ("parallelN9", "9 paths.* 8 paths"),
        ("zigzagN0", "0 paths"),
        ("randomN0", "0 paths"),
        ("spiral:0", "0 paths"),
        ("zzvideo_sxt", "letters s and t.*'sxt'"),
        ("video_", "letters s and t"),
        ("zigzaqN8", r"forms are v1, v2, zigzagN\{k\}.*Did you mean 'zigzagN8'"),
        ("zigzag8", "Did you mean 'zigzagN8'"),
        ("spirl", "Did you mean 'spiral'"),
        ("hilbert:x", "Did you mean 'hilbert'"),
        ("spiralN8", "Did you mean 'spiral'"),
        ("V2", "forms are"),
        ("", "forms are"),
        ("zigzagN8 ", "forms are"),
        ("from_model", "forms are"),
    ],
)
def test_bad_strings(text, message):
    with pytest.raises(ValueError, match=message):
        parse_scan_type(text)


def test_not_a_string():
    with pytest.raises(TypeError, match="got 8"):
        parse_scan_type(8)


@quick
@given(st.text(max_size=12))
def test_any_text_is_read_or_refused_with_a_value_error(text):
    try:
        spec = parse_scan_type(text)
    except ValueError:
        return
    assert spec.text == text


def test_too_many_paths_of_a_registered_scan_name_both_numbers():
    with pytest.raises(ValueError, match="'sweep:5' asks for 5 paths, scan 'sweep' has 4"):
        parse_scan_type("sweep:5").schedule(2, 1, 4, 4)


@pytest.mark.parametrize("name", list_scans(dims=2))
@pytest.mark.parametrize("text", ["v2", "zigzagN2", "zzvideo_sst", "parallelN3"])
def test_an_override_keeps_mixer_and_folds(text, name):
    before = parse_scan_type(text)
    after = before.with_scan(name)
    t = 3 if before.word else 1
    assert (after.mixer, after.word, after.num_directions) == (
        before.mixer,
        before.word,
        before.num_directions,
    )
    old, new = before.schedule(7, t, 4, 5), after.schedule(7, t, 4, 5)
    assert [step.fold for step in new] == [step.fold for step in old]
    paths = get_scan(name).over(1, 4, 5)
    spatial = [step.path for step in new if step.fold != "pixels"]
    if before.mixer == "parallel_mamba":
        assert new.branches == tuple(paths[i % len(paths)] for i in range(3))
    else:
        assert spatial == [paths[i % len(paths)] for i in range(len(spatial))]
    assert [s for s in new if s.fold == "pixels"] == [s for s in old if s.fold == "pixels"]


def test_override_with_a_number_and_unknown_override():
    assert parse_scan_type("zigzagN8").with_scan("hilbert:2").num_paths == 2
    with pytest.raises(UnknownScanError, match="unknown scan 'hilbrt'. Did you mean 'hilbert'"):
        parse_scan_type("v2").with_scan("hilbrt")
    with pytest.raises(UnknownScanError):
        parse_scan_type("v2").with_scan("zigzagN8")


@pytest.mark.parametrize("arguments", [(0, 1, 4, 4), (-1, 1, 4, 4), (2, 0, 4, 4), (2, 1, 4, 0)])
def test_schedule_sizes(arguments):
    with pytest.raises(ValueError, match="at least 1"):
        parse_scan_type("zigzagN8").schedule(*arguments)


def test_specs_are_values():
    assert len({parse_scan_type("v2"), parse_scan_type("v2"), parse_scan_type("v1")}) == 2


@pytest.mark.parametrize("name", [name for name in list_scans(dims=3) if 2 not in get_scan(name).dims])
def test_a_scan_of_videos_alone_replaces_a_factorized_schedule(name):
    paths = get_scan(name)(3, 4, 5)
    for text in ("zzvideo_sst", "v2", "zigzagN2"):
        after = parse_scan_type(text).with_scan(name)
        assert after.mixer == parse_scan_type(text).mixer
        schedule = after.schedule(2 * len(paths), 3, 4, 5)
        assert [step.path for step in schedule] == [*paths, *paths]
        assert {step.fold for step in schedule} == {"none"}
