"""Checks of the stored metric values."""

import numpy as np
import pytest
from PIL import Image

from tests.parity.harness import parity_kind
from zigflow.data.published_crops import CROPS
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


@parity_kind("data.image_crops", cases=lambda fixture: ["0", "1", "2"])
def check_image_crops(fixture, case):
    stored = fixture.tensors
    image = Image.fromarray(stored[f"{case}.img"].numpy())
    for name, crop in (("adm_crop16", "adm"), ("lanczos_crop16", "lanczos")):
        got = np.array(CROPS[crop](image, 16)).astype(int)
        # Pillow's resampling may round differently from one version to another, by one grey level.
        assert np.abs(got - stored[f"{case}.{name}"].numpy()).max() <= 1, name
