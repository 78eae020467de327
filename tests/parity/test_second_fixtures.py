"""The checks on second fixtures with other settings, made from the definitions in the test session.

What a check assumes of the cases in fixtures/ fails here.
"""

from functools import cache

import pytest

from tests.parity.harness import assert_all_read, find_fixtures, load_kinds
from tests.parity.make_second_fixtures import PARTS, make

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
