"""The first samples of a source are a source."""

import pytest

from zigflow.data.source import check_source
from zigflow.data.subset import Subset
from zigflow.datasets.synthetic import ShapesSource


def test_a_subset_meets_the_contract_and_shows_the_same_samples():
    whole = ShapesSource(12, 8)
    part = Subset(whole, 5)
    check_source(part)
    assert len(part) == 5
    assert part[4]["key"] == whole[4]["key"]
    assert part.fingerprint not in (whole.fingerprint, Subset(whole, 6).fingerprint)


@pytest.mark.parametrize("limit", [0, 13])
def test_a_limit_outside_the_source_is_refused(limit):
    with pytest.raises(ValueError, match="12 samples"):
        Subset(ShapesSource(12, 8), limit)
