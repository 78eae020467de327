"""The checks on second fixtures with other settings, made from the definitions in the test session.

What a check assumes of the cases in fixtures/ fails here.
"""

import copy
import json
from collections.abc import Iterator
from functools import cache
from typing import Any

import pytest

from tests.parity import harness
from tests.parity.harness import assert_all_read, find_fixtures, load_kinds
from tests.parity.make_second_fixtures import PARTS, make
from tests.parity.recording import documentary
from tests.parity.second_drawn import DRAWN

KINDS = load_kinds()


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Part -> its folder and the kinds in it, made once."""

    @cache
    def folder_of(part):
        folder = tmp_path_factory.mktemp(part.__name__)
        return folder, make(folder, (part,))

    return folder_of


@pytest.mark.parametrize("part", PARTS, ids=lambda part: part.__name__)
def test_other_settings(made, part):
    """Every case of every fixture, and that no setting of it is left unread."""
    folder, kinds = made(part)
    fixtures = find_fixtures(folder)
    assert {fixture.kind for fixture in fixtures} == kinds
    wrong = []
    for fixture in fixtures:
        try:
            assert_all_read(KINDS[fixture.kind], fixture.path)
        except Exception as error:
            wrong.append(f"{fixture.path.stem}: {error!r}"[:300])
    assert not wrong, "\n".join(wrong)


def test_every_kind_has_a_second_fixture(made):
    assert set().union(*(made(part)[1] for part in PARTS)) == set(KINDS)


# Settings of a second fixture that change no number there, with the reason.
WITHOUT_EFFECT = {
    ("dim_orders", "items.1.scan_pattern_len"): "there are four directions",
    ("dim_orders", "items.2.num_layers"): "no direction but the first",
    ("dim_orders", "items.2.encoder_start_blk_id"): "no direction but the first",
    ("steps_uvit", "kwargs.depth"): "an odd depth has the blocks of the even one below",
    ("dis_ddim", "kwargs.depth"): "an odd depth has the blocks of the even one below",
    ("dis_ddim", "kwargs.num_classes"): "no classes either way",
    ("zigma_steps", "drop_path_rate"): "a single block drops too rarely at 0.01",
    ("ancestral", "eta"): "of DDIM alone",
    ("dpm_continuous", "sample_kwargs.fast_version"): "order 1 has one plan",
    ("dpm_discrete", "predict_x0"): "both forms of order 1 are DDIM",
    ("intervals", "rows.0.train_eps_given"): "a velocity on Linear has no ends",
    ("intervals", "rows.0.sample_eps_given"): "a velocity on Linear has no ends",
}
# Changed are the cheap ones; of statistics a change may be within their error.
CHANGED = [
    part
    for part in PARTS
    if part not in (*DRAWN,) and part.__name__ not in ("networks", "transport", "drawn")
]


def _numbers(content: Any, path: tuple = ()) -> Iterator[tuple]:
    """Paths of booleans and numbers."""
    for key, value in content.items() if isinstance(content, dict) else enumerate(content):
        if isinstance(value, dict | list):
            yield from _numbers(value, (*path, key))
        elif isinstance(value, int | float):
            yield (*path, key)


def _changed(value: float) -> float:
    if isinstance(value, bool):
        return not value
    return value + 1 if isinstance(value, int) else 1.3 * value + 0.01


@pytest.mark.slow
@pytest.mark.parametrize("part", CHANGED, ids=lambda part: part.__name__)
def test_a_changed_setting_fails(tmp_path, part):
    """Every number of the JSON, one after the other: the check does not only read it, it depends on it."""
    make(tmp_path, (part,))
    unnoticed = []
    for fixture in find_fixtures(tmp_path):
        text, tolerances = fixture.path.read_text(), ("f32_minus_f64", "suggested_tol")
        content = json.loads(text)
        for path in _numbers(content):
            dotted = ".".join(map(str, path))
            name = (fixture.path.stem, dotted)
            if documentary(fixture.kind, dotted) or path[0] in tolerances or name in WITHOUT_EFFECT:
                continue
            # Sizes of a network show in its weights, and others in networks() by their numbers.
            if fixture.kind.endswith(".model") and path[0] == "kwargs":
                continue
            other = copy.deepcopy(content)
            inner = other
            for key in path[:-1]:
                inner = inner[key]
            inner[path[-1]] = _changed(inner[path[-1]])
            fixture.path.write_text(json.dumps(other))
            harness._READ.pop(fixture.path, None)
            try:
                assert_all_read(KINDS[fixture.kind], fixture.path)
                unnoticed.append(name)
            except Exception:
                continue
        fixture.path.write_text(text)
    assert not unnoticed
