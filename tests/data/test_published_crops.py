"""The crops that published data were made with; adm and lanczos are held to stored pixels by tests/parity."""

import numpy as np
import pytest
from PIL import Image

from zigflow.data.published_crops import CROPS


def test_the_face_crop_is_the_published_square():
    columns = np.broadcast_to(np.arange(178, dtype=np.uint8), (218, 178))
    rows = np.broadcast_to(np.arange(218, dtype=np.uint8)[:, None], (218, 178))
    whole = [
        np.asarray(CROPS["celeba"](Image.fromarray(np.ascontiguousarray(a)), 128)) for a in (columns, rows)
    ]
    assert np.array_equal(whole[0], columns[57:185, 25:153]) and np.array_equal(
        whole[1], rows[57:185, 25:153]
    )
    # Reduced, pixel i is the mean of a neighborhood of 2 i and 2 i + 1; the edges are cut.
    half = np.asarray(CROPS["celeba"](Image.fromarray(np.ascontiguousarray(columns)), 64)).astype(float)
    assert np.abs(half[:, 1:-1] - (25.5 + 2 * np.arange(64))[1:-1]).max() <= 0.5


def test_the_face_crop_needs_an_aligned_image():
    with pytest.raises(ValueError, match="178 x 218, this one is 30 x 20"):
        CROPS["celeba"](Image.new("RGB", (30, 20)), 64)
