"""Checks of the stored metric values."""

import pytest

from tests.parity.harness import parity_kind
from zigflow.metrics.frechet import frechet_distance, frechet_from_features


@parity_kind("metrics.frechet", cases=lambda fixture: ["moments", "features"])
def check_frechet(fixture, case):
    stored = fixture.tensors
    if case == "moments":
        got = frechet_distance(stored["mu1"], stored["sigma1"], stored["mu2"], stored["sigma2"])
        assert got == pytest.approx(stored["fid"].item(), rel=1e-9)
    else:
        # Fewer vectors than features: the original's Schur square root of a singular product keeps half its
        # digits (tests/metrics/test_frechet.py compares with the exact value at 1e-12).
        got = frechet_from_features(stored["a"], stored["b"])
        assert got == pytest.approx(stored["fid_ab"].item(), rel=1e-7)
