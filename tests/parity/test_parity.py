"""Every stored fixture is checked; a kind that nobody can check is a failure, never a skip."""

import pytest

from tests.parity.harness import ROOT, find_fixtures, load_kinds

KINDS = load_kinds()


def _cases():
    for fixture in find_fixtures():
        known = KINDS.get(fixture.kind)
        for case in known.cases(fixture) if known else ["unknown kind"]:
            name = fixture.path.relative_to(ROOT).with_suffix("")
            yield pytest.param(fixture, case, id=f"{fixture.kind}-{name}-{case}")


def test_fixtures_are_there():
    assert find_fixtures(), f"no fixtures under {ROOT}; set PARITY_FIXTURES or restore tests/parity/fixtures"


@pytest.mark.parametrize("fixture, case", list(_cases()))
def test_parity(fixture, case):
    if fixture.kind not in KINDS:
        pytest.fail(f"{fixture.path.name} has kind {fixture.kind!r}, which no check is registered for")
    KINDS[fixture.kind].check(fixture, case)
