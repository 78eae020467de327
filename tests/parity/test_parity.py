"""Every stored fixture is checked; a kind that nobody can check is a failure, never a skip.

The case "every setting is read" fails where a check has assumed what the fixture says.
"""

import json

import pytest
import torch
from safetensors.torch import save_file

from tests.parity.harness import (
    ROOT,
    Fixture,
    Kind,
    assert_all_read,
    find_fixtures,
    load_kinds,
    run_case,
)
from tests.parity.recording import Recorded

KINDS = load_kinds()
SETTINGS = "every setting is read"


def _cases(root):
    for fixture in find_fixtures(root):
        known = KINDS.get(fixture.kind)
        for case in [*known.cases(fixture), SETTINGS] if known else ["unknown kind"]:
            name = fixture.path.relative_to(root).with_suffix("")
            yield pytest.param(fixture.path, case, id=f"{fixture.kind}-{name}-{case}")


def check(path, case):
    kind = Fixture(path).kind
    if kind not in KINDS:
        pytest.fail(f"{path.name} has kind {kind!r}, which no check is registered for")
    if case == SETTINGS:
        assert_all_read(KINDS[kind], path)
    else:
        run_case(KINDS[kind], path, case)


def test_fixtures_are_there():
    assert find_fixtures(), f"no fixtures under {ROOT}; set PARITY_FIXTURES or restore tests/parity/fixtures"


@pytest.mark.parametrize("path, case", list(_cases(ROOT)))
def test_parity(path, case):
    check(path, case)


def test_an_unknown_kind_fails(tmp_path):
    (tmp_path / "new.json").write_text(json.dumps({"fixture_kind": "dim.modle"}))
    ((path, case),) = (param.values for param in _cases(tmp_path))
    with pytest.raises(pytest.fail.Exception, match=r"dim\.modle"):
        check(path, case)


READS = {
    "steps": lambda fixture: fixture.meta["steps"],
    "rows.0.b": lambda fixture: fixture.meta["rows"][0]["b"],
    "options.eta": lambda fixture: dict(fixture.meta["options"]),
    "x": lambda fixture: fixture.tensors["x"],
    "step0.y": lambda fixture: fixture.under("step0."),
}


@pytest.mark.parametrize("left", [None, *READS])
def test_what_a_check_leaves_unread_is_named(tmp_path, left):
    path = tmp_path / "made.json"
    made = {"fixture_kind": "made", "steps": 3, "rows": [{"b": 2}], "options": {"eta": 0.5}, "note": "prose"}
    path.write_text(json.dumps(made))
    save_file({"x": torch.zeros(1), "step0.y": torch.zeros(1)}, path.with_suffix(".safetensors"))

    def part(fixture, case):
        """Two cases that together read everything but one; asking whether something is there reads nothing."""
        assert all(key in fixture.meta for key in made)
        for name in list(READS)[int(case) :: 2]:
            if name != left:
                READS[name](fixture)

    kind = Kind(part, lambda fixture: ["0", "1"])
    if left is None:
        assert_all_read(kind, path)
    else:
        with pytest.raises(AssertionError, match=left.replace(".", r"\.")):
            assert_all_read(kind, path)


def _saying(tmp_path, **content):
    path = tmp_path / "said.json"
    path.write_text(json.dumps(content))
    return Fixture(path)


@pytest.mark.parametrize(
    "said", [{"eps": 0.001}, *({"note": f"DPM-Solver, {words}; order 2."} for words in (
        "eps 1e-3", "eps=1/1000", "eps = .001", "eps: 0.001", "eps of 1e-3"))]
)  # fmt: skip
def test_a_setting_is_found_by_key_or_in_prose(tmp_path, said):
    fixture = _saying(tmp_path, **said)
    assert fixture.setting("eps", told={"DPM": 0.5}) == pytest.approx(1e-3)


def test_a_setting_is_told_by_the_script_that_the_prose_names_or_missed_by_name(tmp_path):
    fixture = _saying(
        tmp_path, meaning={"path": "eval_ldm.py, clip_denoised False; skip_type=logSNR, ieps 4"}
    )
    assert fixture.setting("eps", told={"eval_ldm_discrete": 1e-3, "eval_ldm": 1e-4}) == 1e-4
    assert fixture.word("skip_type") == "logSNR" and fixture.flag("clip_denoised") is False
    with pytest.raises(AssertionError, match=r"said\.json does not say order.*neither"):
        fixture.setting("order", told={"sample.py": 3})
    with pytest.raises(AssertionError, match="does not say method"):
        fixture.word("method")


def test_reading_is_noted_leaf_by_leaf():
    made = Recorded({"a": {"b": 1, "c": [1, 2]}, "rows": [{"d": 1}, {"d": 2}], "empty": {}})
    assert made.leaves() == ["a.b", "a.c", "rows.0.d", "rows.1.d", "empty"]
    assert "a" in made and not made.read
    assert made["a"]["c"] == [1, 2] and made.get("none") is None
    assert made.read == {"a.c"}
    made["rows"][1]["d"]
    assert made.read == {"a.c", "rows.1.d"}
    assert made.plain() == {"a": {"b": 1, "c": [1, 2]}, "rows": [{"d": 1}, {"d": 2}], "empty": {}}
    assert made.read == set(made.leaves())
