"""The checks on second fixtures with other settings, made from the definitions in the test session.

What a check assumes of the cases in fixtures/ fails here.
"""

import pytest

from tests.parity.harness import assert_all_read, find_fixtures, load_kinds
from tests.parity.make_second_fixtures import PARTS, make

KINDS = load_kinds()


@pytest.mark.parametrize("part", PARTS, ids=lambda part: part.__name__)
def test_other_settings(tmp_path, part):
    """Every case of every fixture, and that no setting of it is left unread."""
    kinds = make(tmp_path, (part,))
    made = find_fixtures(tmp_path)
    assert {fixture.kind for fixture in made} == kinds
    wrong = []
    for fixture in made:
        try:
            assert_all_read(KINDS[fixture.kind], fixture.path)
        except Exception as error:
            wrong.append(f"{fixture.path.stem}: {error!r}"[:300])
    assert not wrong, "\n".join(wrong)


# Kinds whose settings are read (test_parity.py), and whose numbers have no short formula of their own.
ALONE = {
    "dim.dpm_solver", "dim.init_stats", "dim.sample", "dim.upsample_tau", "dim.vpsde", "dis.init_stats",
    "dit.diffusion_core", "transport.check_interval", "transport.transport", "uvit.end_to_end", "uvit.init_stats",
    "zigma.checkpoint", "zigma.drop_path", "zigma.init_stats", "zigma.train_steps",
}  # fmt: skip


def test_a_new_kind_comes_with_a_second_fixture(tmp_path):
    assert make(tmp_path) == set(KINDS) - ALONE
