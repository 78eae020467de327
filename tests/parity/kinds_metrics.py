"""Checks of the stored metric values."""

import re

import numpy as np
import pytest
from PIL import Image

from tests.parity.harness import parity_kind
from zigflow.data.published_crops import CROPS
from zigflow.metrics.frechet import frechet_distance, frechet_from_features


def _frechet_cases(fixture):
    return [case for case, key in (("moments", "fid"), ("features", "fid_ab")) if key in fixture.tensors]


@parity_kind("metrics.frechet", cases=_frechet_cases)
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


@parity_kind("data.image_crops", cases=lambda fixture: sorted({k.split(".")[0] for k in fixture.tensors}))
def check_image_crops(fixture, case):
    """ "{case}.img", and what is left of it as "{case}.{crop}_crop{side}"."""
    stored = fixture.tensors
    image = Image.fromarray(stored[f"{case}.img"].numpy())
    names = [name for name in fixture.names(f"{case}.") if name != "img"]
    assert names
    for name in names:
        crop, side = re.fullmatch(r"(.+)_crop(\d+)", name).groups()
        got = np.array(CROPS[crop](image, int(side))).astype(int)
        # Pillow's resampling may round differently from one version to another, by one grey level.
        assert np.abs(got - stored[f"{case}.{name}"].numpy()).max() <= 1, name
